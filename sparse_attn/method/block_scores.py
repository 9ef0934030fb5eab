"""What a backend does for a call that finds a mask or uses one, with a pooled tail or without.

With a tail all that belongs to a mask (masses, scores, bits) is of the sequence in the mask's order,
which every search finds anew; outputs and LSE are of the tokens as they came.
"""

from typing import NamedTuple

import torch

from ..backends.permuted import Arranged
from ..backends.torch.tail_error import rows_of, tail_error
from ..block_mask import BlockMask
from ..call import Call
from ..config import AdaSpaConfig
from ..orders.choice import find_order
from ..orders.position import in_raster
from ..run.precision import LowPrecision
from .fused_online_search import fused_online_search
from .lse_cached_search import lse_cached_search


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
    q, k, v, bias, arranged = call.q, call.k, call.v, call.key_bias, None
    if config.pooled:
        order, similar = find_order(backend, q, k, v, call, config)
        if previous_lse is not None:
            previous_lse = previous_lse.gather(-1, order.long())
        arranged = backend.arrange(q, k, v, order, bias)
        q, k, v, bias = arranged.q, arranged.token_k, arranged.token_v, arranged.token_bias
    out, lse, masses = fused_online_search(
        backend, lambda q, k, v: dense_with_lse(q, k, v, bias), q, k, v,
        scale=call.scale, key_bias=bias, previous_lse=previous_lse, **config.blocks,
    )  # fmt: skip
    if arranged is None:
        return Found(masses, None, out, lse)
    scores = None
    if not config.recall:
        pooled = _pooled(backend, arranged, lse, call, config)
        scores = _scores(arranged, masses, pooled)
    # the arranged copies go before the output is copied
    del arranged, q, k, v
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
    arranged = backend.arrange(q, k, v, order, call.key_bias)
    masses = lse_cached_search(
        backend, arranged.q, arranged.token_k, lse, key_bias=arranged.token_bias,
        renormalise=False, **options,
    )  # fmt: skip
    # the drift of the LSE is the same for both kinds of masses
    total = masses.sum(-1, keepdim=True)
    drift = rows_of(arranged.tokens, config.block_q, q.device)[:, None] / total
    drift = drift.where(total > 0, 1.0)
    pooled = _pooled(backend, arranged, lse, call, config).mul_(drift)
    masses.mul_(drift)
    scores = _scores(arranged, masses, pooled)
    return Found(masses, scores, order=order, similar=similar)


def _pooled(backend, arranged: Arranged, lse, call, config):
    return backend.pooled_masses(
        arranged.q, arranged.k_mean, arranged.log_sizes, lse, block_q=config.block_q,
        scale=call.scale,
    )  # fmt: skip


def _scores(arranged: Arranged, masses, pooled):
    return tail_error(masses, pooled, arranged.token_v, arranged.v_mean)


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
    blocks = {"block_q": mask.block_q, "block_k": mask.block_k, "scale": call.scale}
    serves = low_precision.serves(
        backend, q, k, v, mask.block_q, mask.block_k, call.low_precision
    )  # fmt: skip
    options, more = {"key_bias": call.key_bias, **blocks}, 0
    if order is not None:
        arranged = backend.arrange(q, k, v, order, call.key_bias)
        q, k, v, more = arranged.q, arranged.k, arranged.v, arranged.pseudo_blocks
        options |= {"key_bias": arranged.key_bias, "tail": mask.bits, "order": order}
    lists = backend.unpack_mask(mask.bits, mask.num_k, more=more)
    options |= dict(zip(("kv_indices", "kv_num_blocks"), lists, strict=True))
    found = low_precision.attend(backend, q, k, v, **options) if serves else None
    return found or backend.sparse_attention(q, k, v, **options)
