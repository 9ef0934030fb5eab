"""What a search finds, and what it ranks blocks by where averages stand for skipped ones.

With a pooled tail all that belongs to a mask (masses, scores, bits) is of the sequence in the mask's
order, which every search finds anew; outputs and LSE are of the tokens as they came.
"""

from typing import NamedTuple

import torch

from ..backends.choice import Backend
from ..backends.permuted import Permuted
from ..block_mask import BlockMask
from ..config import AdaSpaConfig


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


def tail_scores(
    backend: Backend, permuted: Permuted, masses: torch.Tensor, lse: torch.Tensor,
    config: AdaSpaConfig, scale: float, drift: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The error that skipping each block leaves to its average.

    Args:
        masses: [B, H, Nq, N] float32. lse: [B, H, L] float32. Both are in the permuted order.
        drift: [B, H, Nq, 1] float32, by what the masses of an earlier LSE are to be scaled.

    Returns:
        [B, H, Nq, N] float32.
    """
    pooled = permuted.pooled
    stand_ins = backend.pooled_masses(
        permuted.q, pooled.k_mean, pooled.log_sizes, lse, block_q=config.block_q, scale=scale
    )
    if drift is not None:
        stand_ins.mul_(drift)
    return backend.tail_error(masses, stand_ins, permuted.v, pooled.v_mean)
