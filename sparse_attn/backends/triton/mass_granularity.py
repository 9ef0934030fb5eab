"""Block masses as a kernel yields them, and as its caller asked for them."""

import torch
import triton

from ...block_mask import sum_pool

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
    return renormalised(masses, Lq, wanted[0]) if renormalise else masses


def renormalised(masses: torch.Tensor, Lq: int, block_q: int) -> torch.Tensor:
    """Scale every row of blocks, in place, to sum to its number of query rows; empty rows stay."""
    rows = torch.full((masses.shape[2], 1), float(block_q), device=masses.device)
    rows[-1] = Lq - (masses.shape[2] - 1) * block_q
    total = masses.sum(-1, keepdim=True)
    return masses.mul_(torch.where(total == 0, 1.0, rows / total))
