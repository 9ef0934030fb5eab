"""From q, k and v to a mask, a few heads at a time: order, masses, scores, choice.

With a pooled tail all that belongs to a mask (masses, scores, bits) is of the sequence in the mask's
order, which every search finds anew; outputs and LSE are of the tokens as they came.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from ..backends.choice import Backend
from ..block_mask import BlockMask
from ..call import Call
from ..config import AdaSpaConfig
from ..head_groups import head_groups
from ..orders.choice import find_order
from ..orders.position import video_first
from .query_sample import query_sample
from .selection import Selection

# of every pair of blocks: a float32 mass, a score, which blocks are kept, and those on their way to
# bits; where the kernels measure smaller blocks than were asked for, both maps of masses
PAIR_BYTES = 12


class Found(NamedTuple):
    """What a search found.

    Args:
        mask: of the sequence in `order`, on the device of the call.
        recall: [B, H] float32, the share of mass that the mask holds.
        exact: whether the masses are of all rows, measured with the call's own LSE.
        order: [B, H, L] int32, the token at every place of the mask's sequence, or None where that
            is q's. similar: [B, H] bool, which heads are ordered by similarity, or None.
        out: [B, H, L, D]. lse: [B, H, L] float32. Both are of a search with dense attention only.
    """

    mask: BlockMask
    recall: torch.Tensor
    exact: bool
    order: torch.Tensor | None = None
    similar: torch.Tensor | None = None
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None


class Masses(NamedTuple):
    """Measured masses of some heads.

    Args:
        masses: [B, h, Nq, Nk] float32. lse: [B, h, R] float32, what they were measured with.
        block_q: measured rows of a block.
        drift: [B, h, Nq, 1] float32, by what other masses by this LSE are to be scaled, or None.
    """

    masses: torch.Tensor
    lse: torch.Tensor
    block_q: int
    drift: torch.Tensor | None = None


def search_mask(
    backend: Backend, call: Call, config: AdaSpaConfig, measure: Callable, *, stride: int = 1,
    copies: int = 0,
) -> tuple[BlockMask, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Find the mask of a call. Nothing is read back from the device.

    Args:
        measure: measure(call, heads, rows) -> `Masses` of the heads of a slice, whose k and v the
            call has in the mask's order. Its q are those of `rows`, [B, h, R] int32: which token each
            is of; None where q is the whole sequence in its own order.
        stride: only so many-th rows of every block are measured.
        copies: how many tensors as large as q `measure` makes.

    Returns:
        mask, recall, order and similar of `Found`.
    """
    order = similar = None
    layout = call.layout
    if config.pooled:
        order, similar = find_order(backend, call, config)
        layout, copies = video_first(layout), copies + 3
    chosen = Selection(backend, layout, config, call.q)
    sample = None if stride == 1 else query_sample(layout.tokens, stride, call.q.device)
    for some, part in head_groups(call, copies, PAIR_BYTES):
        if order is None:
            q, rows = _sampled(part.q, None, sample)
            chosen.add(measure(replace(part, q=q), some, rows).masses)
        else:
            chosen.add(*_with_scores(backend, part, some, order[:, some], config, measure, sample))
    return *chosen.settle(), order, similar


def _sampled(q, order, sample):
    """q [B, h, R, D] and its rows, of all places where there is no `sample`."""
    if sample is None:
        return q, order
    rows = sample.expand(*q.shape[:2], -1) if order is None else order[..., sample]
    return q.gather(2, rows.long()[..., None].expand(*rows.shape, q.shape[-1])), rows


def _with_scores(backend, call, heads, order, config, measure, sample):
    """Masses and, unless a recall was asked for, scores; permuted copies go as early as they can."""
    whole = call.q if sample is None else None
    moved = backend.permute(whole, call.k, call.v, order, call.key_bias)
    q, rows = (moved.q, order) if sample is None else _sampled(call.q, order, sample)
    v, pooled = moved.v, moved.pooled
    part = replace(call, q=q, k=moved.k, v=v, key_bias=moved.key_bias)
    del moved
    found = measure(part, heads, rows)
    del part
    # a recall that was asked for is one of masses, and the masses rank there
    if config.recall:
        return found.masses, None
    stand_ins = backend.pooled_masses(
        q, pooled.k_mean, pooled.log_sizes, found.lse, block_q=found.block_q, scale=call.scale
    )
    del q
    if found.drift is not None:
        stand_ins.mul_(found.drift)
    # the error that skipping each block leaves to its average
    return found.masses, backend.tail_error(found.masses, stand_ins, v, pooled.v_mean)
