"""Head-adaptive sparsity: heads that concentrate give blocks to heads that do not (AdaSpa, 4.3)."""

import torch

HIGH_RECALL = 0.8


def budget_shift(budget: int, num_k: int, num_sinks: int) -> int:
    """Blocks per row that one head can give and another take.

    The paper moves a head of sparsity s to (1 + s) / 2 or (3 s - 1) / 2, that is half the kept
    blocks down or up. One shift for both directions keeps the sum over heads exact after rounding.
    """
    return max(0, min(budget // 2, budget - num_sinks - 1, num_k - budget))


def moved_heads(recall: torch.Tensor) -> torch.Tensor:
    """Which heads give blocks and which take them.

    n heads have a recall above 0.8, and at most half of all heads count: the n of highest recall
    give, the n of lowest recall take, the rest do neither.

    Args:
        recall: [B, H] at the uniform budget.

    Returns:
        [B, H] int64 of 1 (takes), 0 and -1 (gives); every row sums to 0.
    """
    heads = recall.shape[-1]
    n = (recall > HIGH_RECALL).sum(-1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank >= heads - n).long() - (rank < n).long()
