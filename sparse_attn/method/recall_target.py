"""Row-wise recall: the rows of a head keep k or k - 1 key blocks, the fewest that hold a recall.

The rows of a head are ranked once. The mass that the k-th best blocks of all rows add, summed over
the ranks, is the head's recall at every k at once. Of the k-th blocks only those of most mass are
kept, as many as are still needed.
"""

import torch

WORKSPACE_BYTES = 256 << 20
# float32 sums differ by this much; the recall kept must not fall below the request by it
ROUNDING = 2e-6


def row_wise_recall(
    masses: torch.Tensor,
    request: float,
    least_budget: int,
    sink_k: torch.Tensor,
    sink_q: torch.Tensor,
) -> torch.Tensor:
    """Keep the blocks of most mass in every row, just as many as bring their head to `request`.

    Nothing is read back from the device.

    Args:
        masses: [B, H, Nq, Nk] float32.
        request: recall that every head shall have, below 1.
        least_budget: blocks that every row keeps whatever it holds, the sinks among them.
        sink_k: [Nk] bool, key blocks that every row keeps.
        sink_q: [Nq] bool, query blocks that keep everything.

    Returns:
        [B, H, Nq, Nk] bool.
    """
    B, H, Nq, Nk = masses.shape
    keep = torch.zeros_like(masses, dtype=torch.bool)
    slots = torch.arange(Nk, device=masses.device)
    # a few heads at a time: ranking takes 32 bytes per block pair
    step = max(1, WORKSPACE_BYTES // (32 * B * Nq * Nk))
    for start in range(0, H, step):
        heads = slice(start, start + step)
        part = masses[:, heads]
        order = part.masked_fill(sink_k, float("inf")).argsort(dim=-1, descending=True)
        # what the k-th best block adds, over the rows that have a choice
        gain = part.gather(-1, order).masked_fill_(sink_q[:, None], 0.0)
        added = gain.sum(-2)  # [B, h, Nk]
        total = part.sum((-1, -2))[..., None]
        held = total - added.sum(-1, keepdim=True) + added.cumsum(-1)
        wanted = (request + ROUNDING) * total
        budgets = (held < wanted).sum(-1, keepdim=True).add_(1).clamp_(least_budget, Nk)
        # [B, h, Nq], the k-th block of each row, and how many of them are needed
        last = gain.gather(-1, (budgets - 1)[..., None].expand(*gain.shape[:-1], 1))[..., 0]
        before = held.gather(-1, budgets - 1) - last.sum(-1, keepdim=True)
        best, rows = last.sort(dim=-1, descending=True)
        needed = (before + best.cumsum(-1) < wanted).sum(-1, keepdim=True) + 1
        spared = (rows.argsort(dim=-1) >= needed) & (budgets > least_budget)
        within = slots < (budgets - spared.long())[..., None]
        keep[:, heads] = keep[:, heads].scatter(-1, order, within)
    return keep.logical_or_(sink_q[:, None])
