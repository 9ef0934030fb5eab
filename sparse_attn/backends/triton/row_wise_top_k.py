"""Row-wise top-k in one pass over the scores, and the recall of what it keeps.

One program owns one row of blocks and holds it on chip. It finds the k-th largest score bit by bit,
from the highest down, and stops as soon as exactly k scores lie above what it has.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from . import launch

HIGHEST_BIT = tl.constexpr(1 << 31)
LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit(
    do_not_specialize=["Nq", "Nk"],
    do_not_specialize_on_alignment=[
        "scores", "masses", "budgets", "sink_k", "sink_q", "keep", "held", "total",
    ],
)  # fmt: skip
def _row_wise_top_k_kernel(
    scores, masses, budgets, sink_k, sink_q, keep, held, total, Nq, Nk, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    m_k = o_k < Nk
    budget = tl.load(budgets + row // Nq)
    b_sink = tl.load(sink_k + o_k, mask=m_k, other=0) != 0
    b_score = tl.load(scores + row * Nk + o_k, mask=m_k, other=0.0)
    # integers in the order of the scores, NaN above all; sinks first, blocks past Nk last
    b_int = b_score.to(tl.int32, bitcast=True)
    b_int = tl.where(b_sink, LARGEST, tl.where(b_int < 0, b_int ^ LARGEST, b_int))
    b_rank = b_int.to(tl.uint32, bitcast=True) ^ HIGHEST_BIT
    b_rank = tl.where(m_k, b_rank, 0)

    least = tl.zeros([], tl.uint32)
    bit = tl.full([], HIGHEST_BIT, tl.uint32)
    reached = tl.full([], BLOCK, tl.int32)
    while (bit != 0) & (reached != budget):
        tried = least | bit
        count = tl.sum((b_rank >= tried).to(tl.int32), 0)
        least = tl.where(count >= budget, tried, least)
        reached = tl.where(count >= budget, count, reached)
        bit = bit >> 1
    b_keep = (b_rank >= least).to(tl.int32)
    if reached != budget:
        # of equal scores the first
        b_equal = (b_rank == least).to(tl.int32)
        spared = tl.cumsum(b_equal, 0) > tl.sum(b_equal, 0) - (reached - budget)
        b_keep = tl.where((b_equal == 1) & spared, 0, b_keep)
    b_keep = ((b_keep == 1) | (tl.load(sink_q + row % Nq) != 0)) & m_k

    tl.store(keep + row * Nk + o_k, b_keep.to(tl.uint8), mask=m_k)
    b_mass = tl.load(masses + row * Nk + o_k, mask=m_k, other=0.0)
    tl.store(held + row, tl.sum(tl.where(b_keep, b_mass, 0.0), 0))
    tl.store(total + row, tl.sum(b_mass, 0))


def row_wise_top_k(
    scores, masses, budgets, largest_budget, sink_k, sink_q
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the `budgets` blocks of highest score in every row, the sinks among them.

    Args:
        scores, masses: [B, H, Nq, Nk] float32.
        budgets: [B, H] int, key blocks per row; from the number of sinks, and 1, to Nk.
        largest_budget: not needed here.
        sink_k: [Nk] bool, key blocks that every row keeps.
        sink_q: [Nq] bool, query blocks that keep everything.

    Returns:
        keep: [B, H, Nq, Nk] bool.
        recall: [B, H] float32, the share of mass on the kept blocks.
    """
    scores, masses = scores.contiguous(), masses.contiguous()
    Nq, Nk = scores.shape[2:]
    keep = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    # of every row, what it keeps and all of it
    sums = torch.empty((2, *scores.shape[:3]), device=scores.device)
    tile = tiles.row_wise_top_k(Nk)
    with launch.on_device(scores):
        _row_wise_top_k_kernel[(sums[0].numel(),)](
            scores, masses, budgets.to(torch.int32).contiguous(), sink_k.view(torch.uint8),
            sink_q.view(torch.uint8), keep, *sums, Nq, Nk, BLOCK=tile.tile_k, **tile.options,
        )  # fmt: skip
    held, total = sums.sum(-1)
    return keep.view(torch.bool), held / total


def why_not(scores: torch.Tensor, *_) -> str | None:
    """Reason why this kernel cannot serve the call, or None."""
    if scores.dtype != torch.float32 or scores.ndim != 4:
        return (
            f"needs float32 scores [B, H, Nq, Nk], got {scores.dtype} of {scores.ndim} dimensions"
        )
    if scores.shape[-1] > tiles.SCORES_MOST:
        return f"needs at most {tiles.SCORES_MOST} key blocks, got {scores.shape[-1]}"
    return launch.why_not_device(scores)
