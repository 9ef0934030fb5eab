"""LSE-cached search: a new mask for the price of QK^T alone (AdaSpa, algorithm 2).

A row's softmax denominator hardly changes over denoising steps, so the LSE kept from the first
search stands in for today's; the masses are renormalised by row, which mends its mean drift.
"""

import torch

from ..backends.choice import Backend
from ..call import Call
from ..config import AdaSpaConfig
from .mask_search import Found, Masses, search_mask


def lse_cached_search(
    backend: Backend, call: Call, config: AdaSpaConfig, lse: torch.Tensor, int8: bool
) -> Found:
    """Search with the `lse` [B, H, L] of an earlier step, float16, or of this one, float32.

    Args:
        int8: measure with INT8 q and k, where the backend can.
    """
    rows = rows_of(call.layout.tokens, config.block_q, lse.device)[:, None]

    def measure(call, heads, order):
        some = lse[:, heads].float()
        if order is not None:
            some = some.gather(-1, order.long())
        masses = backend.block_masses(
            call.q, call.k, some, scale=call.scale, key_bias=call.key_bias, int8=int8,
            renormalise=order is None, **config.blocks,
        )  # fmt: skip
        if order is None:
            return Masses(masses, some)
        # the drift of the LSE is the same for the masses of keys and of pooled keys
        total = masses.sum(-1, keepdim=True)
        drift = (rows / total).where(total > 0, 1.0)
        return Masses(masses.mul_(drift), some, drift)

    mask, recall, order, similar = search_mask(backend, call, config, measure)
    return Found(mask, recall, False, order, similar)


def rows_of(tokens: int, block_q: int, device=None) -> torch.Tensor:
    """Query rows of every block, [Nq] float32."""
    return (tokens - torch.arange(0, tokens, block_q, device=device)).clamp(max=block_q).float()
