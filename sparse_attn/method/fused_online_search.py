"""Fused online search: dense attention that also yields block masses (AdaSpa, algorithm 1).

With the LSE of an earlier step at hand one pass does both; without it a second pass recomputes
QK^T, of all rows or of a sample, and sums exp(S - LSE). Either way the dense output is the step's
output.
"""

from collections.abc import Callable

import torch

from ..backends.choice import Backend
from ..backends.permuted import put_in_raster
from ..call import Call, empty_output
from ..config import AdaSpaConfig
from .lse_cached_search import lse_cached_search
from .mask_search import Found, Masses, search_mask


def fused_online_search(
    backend: Backend, call: Call, config: AdaSpaConfig, previous_lse: torch.Tensor | None,
    dense: Callable, int8: bool = False,
) -> Found:  # fmt: skip
    """Answer with dense attention, and search on the way.

    Args:
        previous_lse: [B, H, L] float32 of an earlier step, or None.
        dense: dense(call) -> (out, lse), for the case of two passes.
        int8: whether `dense` computes in INT8; then the masses are of INT8 q and k, too.
    """
    if int8 or previous_lse is None or not backend.one_pass_search:
        out, lse = dense(call)
        found = lse_cached_search(backend, call, config, lse, int8)
        exact = config.search_stride == 1 and not int8
        return found._replace(exact=exact, out=out, lse=lse)
    out, lse = empty_output(call.v), torch.empty_like(previous_lse)
    attend = backend.attention_with_masses
    assert attend is not None, "`one_pass_search` says so"

    def measure(call, heads, rows):
        some = previous_lse[:, heads]
        if rows is not None:
            some = some.gather(-1, rows.long())
        # one pass knows its rows' LSE only when it ends, and takes the earlier one's
        options = {"scale": call.scale, "key_bias": call.key_bias, **config.blocks}
        found, found_lse, masses = attend(call.q, call.k, call.v, previous_lse=some, **options)
        for whole, part in ((out, found), (lse, found_lse)):
            if rows is None:
                whole[:, heads] = part
            else:
                put_in_raster(whole[:, heads], part, rows)
        return Masses(masses, found_lse, config.block_q)

    mask, recall, order, similar = search_mask(backend, call, config, measure, copies=1)
    return Found(mask, recall, False, order, similar, out, lse)
