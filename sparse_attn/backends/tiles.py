"""The one table of tile sizes, warps and stages, per kernel and GPU architecture."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """Tokens that one program holds on chip; the attention kernels take two key tiles a turn."""

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    hopper: bool = False  # the Gluon kernel; `num_stages` pairs of tiles in its ring

    def mass_block(self, block_q: int, block_k: int) -> tuple[int, int]:
        """Blocks whose masses a kernel yields; those asked for are made up of them."""
        return (64, 64) if self.hopper else (block_q, min(block_k, 2 * self.tile_k))


# block masses, which INT8 queries leave more registers to than bfloat16 ones
MASSES = ("masses", "int8 masses")

# largest shared memory of one program, bytes
SHARED_MEMORY = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (11, 0): 227 * 1024,
    (12, 0): 99 * 1024,
    (12, 1): 99 * 1024,
}


# ms at 24 heads x 119040 tokens x 128 bfloat16 in blocks of 64 keys; NVIDIA H200, torch 2.11,
# Triton 3.6, 2026-11-23; cuDNN dense took 279 in the same process:
#   sparse at density 0.2, 128 rows: 6 stages 57.5 and 55.1 (two runs), 5 stages 59.5, 4 stages
#   56.8 and 59.1; with a key bias on the last 200 keys 59.8 (57.1 and 60.1 without), on all 81.3
#   sparse at density 0.2, 64 rows: 3 stages 68.6 and 68.3, 2 stages 73.4
#   dense: 289.8 and 300.1; with masses 297.9; 64 rows 327.7
#   masses: 3 consumers with two tiles in turn 146.5; 4 with one tile 144.1 and 143.9, but then
#   Triton 3.9 spills; 2 with two pairs of tiles 162.3 and 159.9. A quarter of the exponentials as a
#   polynomial: 153.2 instead of 144.1
#   masses from INT8: 4 consumers 114.8, 3 of them 120.2; every eighth exponential as a polynomial 116.1
#   low precision, INT8 scores, 1.28 for quantising not included: sparse at 0.2 39.2, 64 rows 44.6,
#   dense 196.5; with P V summed in float32 48.2, 54.4 and 232.8; two consumers that exponentiate by
#   turns 41.8, 45.6 and 196.5
#   low precision, 2026-11-24: sparse at 0.2 39.0, with a tail 44.7, with a key bias on the last 200
#   keys 39.7, 64 rows 43.0; with one loop for all tiles, which looked for a bias in every turn and
#   always rescaled the sums, 39.5, 49.7, 45.3 and 42.2
def hopper_tile(kernel: str, block_q: int) -> Tile:
    """The tile of the Gluon kernels."""
    if kernel in MASSES:
        # 64 rows a consumer
        rows = 192 if kernel == "masses" else 256
        return Tile(rows, 64, 4, 4, tma=True, hopper=True)
    if kernel == "sparse" and block_q == 64:
        return Tile(64, 64, 4, 3, tma=True, hopper=True)
    return Tile(128, 64, 4, 6, tma=True, hopper=True)


# the same work without the Gluon kernels, on the same day and card:
#   sparse, 128 rows, pairs of 64 keys, 8 warps: TMA 75.9, pointers 79.4; pairs of 32 keys 102.6
#   sparse, 64 rows, 4 warps: pairs of 32 keys 90.6 with TMA, 100.5 with pointers; of 64 103.1
#   masses, TMA: 128 x 64 197.6, 64 x 128 194.6, 128 x 128 235.4, 64 x 256 389.9
# Other cards were compiled for, not measured: their tiles fit shared memory without spilling.
def tile_for(kernel: str, capability: tuple[int, int], D: int, block_q: int, block_k: int) -> Tile:
    """The tile that the plain Triton `kernel` uses on a card of this compute capability."""
    tma = capability[0] in (9, 10)
    if kernel in MASSES:
        return Tile(128, 128 if block_k == 128 else 64, 8, 3 if tma else 2, tma)
    warps = 4 if block_q == 64 else 8
    if tma and block_q == 128:
        return Tile(block_q, 64, warps, 2, tma)
    return Tile(block_q, 32, warps, 3 if tma else 2, tma)


# AMD cards were compiled for only: gfx942 takes the same tiles without a spill; on gfx1100 those
# spill up to 1,374 registers, these at most 107, and that in the search with blocks of 128 alone
def amd_tile(kernel: str, arch: str, D: int, block_q: int, block_k: int) -> Tile:
    """The tile of the plain Triton `kernel` on an AMD card such as "gfx942" or "gfx1100"."""
    if arch.startswith("gfx9"):
        return tile_for(kernel, (8, 0), D, block_q, block_k)
    if kernel in MASSES:
        return Tile(block_q, block_k, 16, 1)
    return Tile(block_q, 16, 8 if block_q == 64 else 16, 1)


@cache
def _amd_arch(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).gcnArchName


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _has_hopper_kernels() -> bool:
    try:
        from .hopper import attention, block_masses, quantised_attention  # noqa: F401
    except (ImportError, AttributeError):
        # Gluon is younger than the oldest Triton served
        return False
    return True


def choose(kernel: str, q: torch.Tensor, block_q: int, block_k: int) -> Tile:
    """The tile for a call with these queries."""
    if q.device.type != "cuda":
        # interpreted, where any tile will do
        return tile_for(kernel, (8, 0), q.shape[-1], block_q, block_k)
    if torch.version.hip is not None:
        return amd_tile(kernel, _amd_arch(q.device), q.shape[-1], block_q, block_k)
    capability = _capability(q.device)
    if capability == (9, 0) and _has_hopper_kernels():
        return hopper_tile(kernel, block_q)
    return tile_for(kernel, capability, q.shape[-1], block_q, block_k)
