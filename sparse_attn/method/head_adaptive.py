"""Head-adaptive sparsity: heads that concentrate give blocks to heads that do not (AdaSpa, 4.3)."""

import torch

HIGH_RECALL = 0.8


def budget_shift(budget: int, num_k: int, num_sinks: int) -> int:
    """Blocks per row that one head can give and another take.

    The paper moves a head of sparsity s to (1 + s) / 2 or (3 s - 1) / 2, that is half the kept
    blocks down or up. One shift for both directions keeps the sum over heads exact after rounding.
    """
    return max(0, min(budget // 2, budget - num_sinks - 1, num_k - budget))


def head_budgets(recall: torch.Tensor, budget: int, shift: int) -> torch.Tensor:
    """Give every head its number of key blocks per row.

    n heads have a recall above 0.8, and at most half of all heads count: the n of highest recall
    keep `budget - shift` blocks, the n of lowest recall `budget + shift`, the rest `budget`.

    Args:
        recall: [B, H] at the uniform budget.

    Returns:
        [B, H] int64; every row sums to H * budget.
    """
    heads = recall.shape[-1]
    n = (recall > HIGH_RECALL).sum(-1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    moves = (rank >= heads - n).long() - (rank < n).long()
    return budget + shift * moves
