"""Fused online search: dense attention that also yields exact block masses (AdaSpa, algorithm 1).

With the LSE of an earlier step at hand one pass does both; without it a second pass recomputes
QK^T and sums exp(S - LSE). Either way the dense output is the step's output.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from ..backends.choice import Backend
from ..call import Call
from ..config import AdaSpaConfig
from ..orders.choice import find_order
from ..orders.position import in_raster, video_first
from .block_scores import Found, tail_scores
from .selection import select


def fused_online_search(
    backend: Backend, call: Call, config: AdaSpaConfig, previous_lse: torch.Tensor | None,
    dense: Callable,
) -> Found:  # fmt: skip
    """Answer with dense attention, and search on the way.

    Args:
        previous_lse: [B, H, L] float32 of an earlier step, or None.
        dense: dense(call) -> (out, lse), for the case of two passes; its tensors may be permuted.
    """
    if not config.pooled:
        out, lse, masses, exact = _measure(backend, call, config, previous_lse, dense)
        mask, recall = select(backend, masses, call.layout, config)
        return Found(mask, recall, exact, out=out, lse=lse)
    order, similar = find_order(backend, call, config)
    if previous_lse is not None:
        previous_lse = previous_lse.gather(-1, order.long())
    permuted = backend.permute(call.q, call.k, call.v, order, call.key_bias)
    moved = replace(
        call, q=permuted.q, k=permuted.k, v=permuted.v, key_bias=permuted.key_bias
    )  # fmt: skip
    out, lse, masses, exact = _measure(backend, moved, config, previous_lse, dense)
    scores = None
    # a recall that was asked for is one of masses, and the masses rank there
    if not config.recall:
        scores = tail_scores(backend, permuted, masses, lse, config, call.scale)
    # the permuted copies go before the output is copied
    del permuted, moved
    mask, recall = select(backend, masses, video_first(call.layout), config, scores)
    del masses, scores
    return Found(
        mask, recall, exact, order, similar, in_raster(out, order), in_raster(lse, order)
    )  # fmt: skip


def _measure(backend, call, config, previous_lse, dense):
    """(out, lse, masses [B, H, Nq, Nk], whether these are exact) of a call."""
    options = {"scale": call.scale, "key_bias": call.key_bias, **config.blocks}
    # one pass knows its rows' LSE only when it ends, and takes the earlier one's
    if previous_lse is not None and backend.one_pass_search:
        found = backend.attention_with_masses(
            call.q, call.k, call.v, previous_lse=previous_lse, **options
        )
        return *found, False
    out, lse = dense(call)
    return out, lse, backend.block_masses(call.q, call.k, lse, **options), True
