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
from .selection import Selection

# of every pair of blocks: a float32 mass, a score, which blocks are kept, and those on their way to
# bits; where the kernels measure smaller blocks than were asked for, both maps of masses
PAIR_BYTES = 12


class Found(NamedTuple):
    """What a search found.

    Args:
        mask: of the sequence in `order`, on the device of the call.
        recall: [B, H] float32, the share of mass that the mask holds.
        exact: whether the masses were measured with the call's own LSE.
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
        masses: [B, h, Nq, Nk] float32. lse: [B, h, L] float32, what they were measured with.
        drift: [B, h, Nq, 1] float32, by what other masses by this LSE are to be scaled, or None.
    """

    masses: torch.Tensor
    lse: torch.Tensor
    drift: torch.Tensor | None = None


def search_mask(
    backend: Backend, call: Call, config: AdaSpaConfig, measure: Callable, *, copies: int = 0
) -> tuple[BlockMask, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Find the mask of a call. Nothing is read back from the device.

    Args:
        measure: measure(call, heads, order) -> `Masses` of the heads of a slice, whose q, k and v the
            call has in the mask's order; order is [B, h, L] int32, or None where that is their own.
        copies: how many tensors as large as q `measure` makes.

    Returns:
        mask, recall, order and similar of `Found`.
    """
    order = similar = None
    layout = call.layout
    if config.pooled:
        order, similar = find_order(backend, call, config)
        layout, copies = video_first(layout), copies + 3
    videos, heads = call.q.shape[:2]
    chosen = Selection(backend, layout, config, videos, heads, call.q.device)
    for some, part in head_groups(call, copies, PAIR_BYTES):
        if order is None:
            chosen.add(measure(part, some, None).masses)
        else:
            chosen.add(*_with_scores(backend, part, some, order[:, some], config, measure))
    return *chosen.settle(), order, similar


def _with_scores(backend, call, heads, order, config, measure):
    """Masses and, unless a recall was asked for, scores; permuted copies go as early as they can."""
    moved = backend.permute(call.q, call.k, call.v, order, call.key_bias)
    q, v, pooled = moved.q, moved.v, moved.pooled
    part = replace(call, q=q, k=moved.k, v=v, key_bias=moved.key_bias)
    del moved
    found = measure(part, heads, order)
    del part
    # a recall that was asked for is one of masses, and the masses rank there
    if config.recall:
        return found.masses, None
    stand_ins = backend.pooled_masses(
        q, pooled.k_mean, pooled.log_sizes, found.lse, block_q=config.block_q, scale=call.scale
    )
    del q
    if found.drift is not None:
        stand_ins.mul_(found.drift)
    # the error that skipping each block leaves to its average
    return found.masses, backend.tail_error(found.masses, stand_ins, v, pooled.v_mean)
