"""What a backend does for a call that finds a mask or uses one, with a pooled tail or without.

With a tail all that belongs to a mask (masses, scores, bits) is of the sequence in the mask's order,
which every search finds anew; outputs and LSE are of the tokens as they came.
"""

from typing import NamedTuple

import torch

from ..backends.permuted import Permuted
from ..block_mask import BlockMask
from ..call import Call
from ..config import AdaSpaConfig
from ..orders.choice import find_order
from ..orders.position import in_raster
from ..run.precision import LowPrecision
from .fused_online_search import fused_online_search
from .lse_cached_search import lse_cached_search, rows_of


class Found(NamedTuple):
    """What a search measured.

    Args:
        masses: [B, H, Nq, Nk] float32.
        scores: the same, what to rank blocks by where that is not the masses.
        out: [B, H, L, D]. lse: [B, H, L] float32. Both are of a dense search only.
        order: [B, H, L] int32, the token at every place of the mask's sequence, or None where that
            is q's. similar: [B, H] bool, which heads are ordered by similarity.
    """

    masses: torch.Tensor
    scores: torch.Tensor | None = None
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    order: torch.Tensor | None = None
    similar: torch.Tensor | None = None


def search_dense(
    backend, dense_with_lse, call: Call, config: AdaSpaConfig, *, previous_lse=None
) -> Found:
    """Answer with dense attention, and search on the way.

    Args:
        dense_with_lse: dense_with_lse(q, k, v, key_bias) -> (out, lse).
        previous_lse: [B, H, L] float32 of an earlier step, or None.
    """
    q, k, v, bias, permuted = call.q, call.k, call.v, call.key_bias, None
    if config.pooled:
        order, similar = find_order(backend, q, k, v, call, config)
        if previous_lse is not None:
            previous_lse = previous_lse.gather(-1, order.long())
        permuted = backend.permute(q, k, v, order, bias)
        q, k, v, bias = permuted.q, permuted.k, permuted.v, permuted.key_bias
    out, lse, masses = fused_online_search(
        backend, lambda q, k, v: dense_with_lse(q, k, v, bias), q, k, v,
        scale=call.scale, key_bias=bias, previous_lse=previous_lse, **config.blocks,
    )  # fmt: skip
    if permuted is None:
        return Found(masses, None, out, lse)
    scores = None
    if not config.recall:
        pooled = _pooled(backend, permuted, lse, call, config)
        scores = _scores(backend, permuted, masses, pooled)
    # the permuted copies go before the output is copied
    del permuted, q, k, v
    return Found(masses, scores, in_raster(out, order), in_raster(lse, order), order, similar)


def search_again(
    backend, lse, call: Call, config: AdaSpaConfig, *, int8=False
) -> Found:  # fmt: skip
    """Search with the `lse` [B, H, L] of an earlier step, for the price of QK^T alone.

    Args:
        int8: measure with INT8 q and k, where the backend can.
    """
    q, k, v = call.q, call.k, call.v
    options = {"scale": call.scale, "int8": int8, **config.blocks}
    if not config.pooled:
        return Found(lse_cached_search(backend, q, k, lse, key_bias=call.key_bias, **options))
    order, similar = find_order(backend, q, k, v, call, config)
    lse = lse.gather(-1, order.long())
    permuted = backend.permute(q, k, v, order, call.key_bias)
    masses = lse_cached_search(
        backend, permuted.q, permuted.k, lse, key_bias=permuted.key_bias,
        renormalise=False, **options,
    )  # fmt: skip
    # the drift of the LSE is the same for both kinds of masses
    total = masses.sum(-1, keepdim=True)
    drift = rows_of(call.layout.tokens, config.block_q, q.device)[:, None] / total
    drift = drift.where(total > 0, 1.0)
    pooled = _pooled(backend, permuted, lse, call, config).mul_(drift)
    masses.mul_(drift)
    scores = _scores(backend, permuted, masses, pooled)
    return Found(masses, scores, order=order, similar=similar)


def _pooled(backend, permuted: Permuted, lse, call, config):
    pooled = permuted.pooled
    return backend.pooled_masses(
        permuted.q, pooled.k_mean, pooled.log_sizes, lse, block_q=config.block_q, scale=call.scale
    )


def _scores(backend, permuted: Permuted, masses, pooled):
    return backend.tail_error(masses, pooled, permuted.v, permuted.pooled.v_mean)


def sparse(
    backend, mask: BlockMask, call: Call, low_precision: LowPrecision, *, order=None
):  # fmt: skip
    """Attend what a mask keeps and, with an `order`, the means of what it skips.

    Args:
        order: [B, H, L] int32, the token at every place of the mask's sequence, or None.

    Returns:
        out: [B, H, L, D]. lse: [B, H, L] float32, or None where the backend does not tell it.
    """
    q, k, v = call.q, call.k, call.v
    serves = low_precision.serves(
        backend, q, k, v, mask.block_q, mask.block_k, call.low_precision
    )  # fmt: skip
    options = {"scale": call.scale, "key_bias": call.key_bias, "mask": mask, "order": order}
    if order is not None:
        permuted = backend.permute(q, k, v, order, call.key_bias)
        q, k, v = permuted.q, permuted.k, permuted.v
        options |= {"key_bias": permuted.key_bias, "pooled": permuted.pooled}
    found = low_precision.attend(backend, q, k, v, **options) if serves else None
    return found or backend.attention(q, k, v, **options)
