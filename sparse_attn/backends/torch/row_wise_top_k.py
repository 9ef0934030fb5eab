"""Row-wise top-k: every query block of a head keeps the same number of key blocks.

For one row the blocks of largest mass are the best choice at a given count (AdaSpa, eq. 14), and
one count for all rows leaves no area of the video without attention.
"""

import torch

WORKSPACE_BYTES = 256 << 20


def row_budget(density: float, num_k: int, num_sinks: int) -> int:
    """Key blocks per row at `density`: the sinks and at least one more, at most all."""
    return min(num_k, max(round(density * num_k), num_sinks + 1, 1))


def row_wise_top_k(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    largest_budget: int,
    sink_k: torch.Tensor,
    sink_q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep the `budgets` blocks of highest score in every row, the sink among them.

    Args:
        scores: [B, H, Nq, Nk] float32: mass, error or any other score.
        budgets: [B, H] int, key blocks per row; at least the number of sinks.
        largest_budget: the largest of `budgets`, known without reading the device.
        sink_k: [Nk] bool, key blocks that every row keeps.
        sink_q: [Nq] bool, query blocks that keep everything; None where they are those of `sink_k`.

    Returns:
        [B, H, Nq, Nk] bool.
    """
    B, H, Nq, Nk = scores.shape
    keep = torch.zeros_like(scores, dtype=torch.bool)
    slots = torch.arange(largest_budget, device=scores.device)
    # a few heads at a time: ranking takes 20 bytes per block pair
    step = max(1, WORKSPACE_BYTES // (20 * B * Nq * Nk))
    for start in range(0, H, step):
        heads = slice(start, start + step)
        ranked = scores[:, heads].masked_fill(sink_k, float("inf"))
        best = ranked.topk(largest_budget, dim=-1, sorted=True).indices
        within = slots < budgets[:, heads, None, None]
        keep[:, heads].scatter_(-1, best, within.expand(best.shape))
    return keep.logical_or_((sink_k if sink_q is None else sink_q)[:, None])
