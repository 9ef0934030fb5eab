"""LSE-cached search: a new mask for the price of QK^T alone (AdaSpa, algorithm 2).

A row's softmax denominator hardly changes over denoising steps, so the LSE kept from the first
search stands in for today's; the masses are renormalised by row, which mends its mean drift.
"""

import torch

from ..backends.choice import Backend
from ..call import Call
from ..config import AdaSpaConfig
from ..orders.choice import find_order
from ..orders.position import video_first
from .block_scores import Found, tail_scores
from .selection import select


def lse_cached_search(
    backend: Backend, call: Call, config: AdaSpaConfig, lse: torch.Tensor, int8: bool
) -> Found:
    """Search with the `lse` [B, H, L] float32 of an earlier step.

    Args:
        int8: measure with INT8 q and k, where the backend can.
    """
    options = {"scale": call.scale, "int8": int8, **config.blocks}
    if not config.pooled:
        masses = backend.block_masses(call.q, call.k, lse, key_bias=call.key_bias, **options)
        mask, recall = select(backend, masses, call.layout, config)
        return Found(mask, recall, exact=False)
    order, similar = find_order(backend, call, config)
    lse = lse.gather(-1, order.long())
    permuted = backend.permute(call.q, call.k, call.v, order, call.key_bias)
    masses = backend.block_masses(
        permuted.q, permuted.k, lse, key_bias=permuted.key_bias, renormalise=False, **options
    )
    # the drift of the LSE is the same for the masses of keys and of pooled keys
    total = masses.sum(-1, keepdim=True)
    drift = rows_of(call.layout.tokens, config.block_q, lse.device)[:, None] / total
    drift = drift.where(total > 0, 1.0)
    masses.mul_(drift)
    scores = tail_scores(backend, permuted, masses, lse, config, call.scale, drift)
    mask, recall = select(backend, masses, video_first(call.layout), config, scores)
    return Found(mask, recall, False, order, similar)


def rows_of(tokens: int, block_q: int, device=None) -> torch.Tensor:
    """Query rows of every block, [Nq] float32."""
    return (tokens - torch.arange(0, tokens, block_q, device=device)).clamp(max=block_q).float()
