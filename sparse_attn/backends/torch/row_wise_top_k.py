"""Row-wise top-k: every query block of a head keeps the same number of key blocks.

For one row the blocks of largest mass are the best choice at a given count (AdaSpa, eq. 14), and
one count for all rows leaves no area of the video without attention.
"""

import torch

from ...block_mask import recall

WORKSPACE_BYTES = 256 << 20
LARGEST = torch.finfo(torch.float32).max


def row_wise_top_k(
    scores: torch.Tensor,
    masses: torch.Tensor,
    budgets: torch.Tensor,
    largest_budget: int,
    sink_k: torch.Tensor,
    sink_q: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the `budgets` blocks of highest score in every row, the sinks among them.

    Args:
        scores: [B, H, Nq, Nk] float32: mass, error or any other score. masses: the same shape.
        budgets: [B, H] int, key blocks per row; at least the number of sinks.
        largest_budget: the largest of `budgets`, known without reading the device.
        sink_k: [Nk] bool, key blocks that every row keeps.
        sink_q: [Nq] bool, query blocks that keep everything.

    Returns:
        keep: [B, H, Nq, Nk] bool.
        recall: [B, H] float32, the share of mass on the kept blocks.
    """
    B, H, Nq, Nk = scores.shape
    keep = torch.zeros_like(scores, dtype=torch.bool)
    slots = torch.arange(largest_budget, device=scores.device)
    # a few heads at a time: ranking takes 20 bytes per block pair
    step = max(1, WORKSPACE_BYTES // (20 * B * Nq * Nk))
    for start in range(0, H, step):
        heads = slice(start, start + step)
        # what is not finite may not go before a sink
        ranked = scores[:, heads].nan_to_num(LARGEST, LARGEST).masked_fill_(sink_k, float("inf"))
        best = ranked.topk(largest_budget, dim=-1, sorted=True).indices
        within = slots < budgets[:, heads, None, None]
        keep[:, heads].scatter_(-1, best, within.expand(best.shape))
    keep.logical_or_(sink_q[:, None])
    return keep, recall(masses, keep)
