"""LSE-cached search: a new mask for the price of QK^T alone (AdaSpa, algorithm 2).

A row's softmax denominator hardly changes over denoising steps, so the LSE kept from the first
search stands in for today's; the masses are renormalised by row, which mends its mean drift.
"""

import torch

from ..backends.choice import Backend
from ..backends.permuted import row_scales
from ..call import Call
from ..config import AdaSpaConfig
from .mask_search import Found, Masses, search_mask


def lse_cached_search(
    backend: Backend, call: Call, config: AdaSpaConfig, lse: torch.Tensor, int8: bool
) -> Found:
    """Search with the `lse` [B, H, L] float32 of an earlier step, or of this one.

    Args:
        int8: measure with INT8 q and k, where the backend can.
    """
    stride = config.search_stride
    block_q = config.block_q // stride

    def measure(call, heads, rows):
        some = lse[:, heads]
        if rows is not None:
            some = some.gather(-1, rows.long())
        options = {"scale": call.scale, "key_bias": call.key_bias, "block_k": config.block_k}
        masses = backend.block_masses(
            call.q, call.k, some, block_q=block_q, int8=int8, renormalise=False, **options
        )
        # the drift of the LSE is the same for the masses of keys and of pooled keys
        drift = row_scales(masses, call.q.shape[2], block_q)
        return Masses(masses.mul_(drift), some, block_q, drift)

    # q and k in INT8, for which the rows that are no sample leave room
    copies = int(int8 and stride == 1)
    mask, recall, order, similar = search_mask(
        backend, call, config, measure, stride=stride, copies=copies
    )
    return Found(mask, recall, False, order, similar)
