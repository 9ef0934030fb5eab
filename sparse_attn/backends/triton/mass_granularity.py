"""Block masses as a kernel yields them, and as its caller asked for them."""

import torch
import triton

from ...block_mask import sum_pool
from ..permuted import row_scales

# query rows: what a warp owns of a tile, and a whole block
SMALL, WHOLE = 16, 64


def measured_rows(block_q: int) -> int:
    """Query rows of the blocks that a kernel measures for blocks of `block_q`."""
    return WHOLE if block_q % WHOLE == 0 else SMALL


def empty_masses(q, k, block_q: int, block_k: int) -> torch.Tensor:
    """Room for the masses of q [B, H, Lq, D] and k [B, H, Lk, D] in blocks of this size."""
    shape = (*q.shape[:2], triton.cdiv(q.shape[2], block_q), triton.cdiv(k.shape[2], block_k))
    return torch.empty(shape, device=q.device, dtype=torch.float32)


def to_granularity(masses, Lq: int, found, wanted, renormalise: bool) -> torch.Tensor:
    """Masses of blocks of the size `found` as those of blocks of `wanted`, (block_q, block_k)."""
    masses = sum_pool(masses, wanted[0] // found[0], wanted[1] // found[1])
    return masses.mul_(row_scales(masses, Lq, wanted[0])) if renormalise else masses
