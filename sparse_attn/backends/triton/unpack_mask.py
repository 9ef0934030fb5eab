"""Bits of a block mask -> the packed lists that the attention kernels walk.

One program owns one row of the mask: it ranks the set bits with a running count and writes each
block number to its place. Slots past the count are not written and must not be read.
"""

import torch
import triton
import triton.language as tl

from ...block_mask import BlockMask
from .. import tiles
from . import launch


@triton.jit(
    do_not_specialize=["num_bytes", "num_k"],
    do_not_specialize_on_alignment=["bits", "kv_indices", "kv_num_blocks"],
)
def _unpack_mask_kernel(
    bits, kv_indices, kv_num_blocks, num_bytes, num_k, CHUNK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p_row = bits + row * num_bytes
    p_list = kv_indices + row * num_k
    count = 0
    for first in tl.range(0, num_k, CHUNK):
        o_k = first + tl.arange(0, CHUNK)
        b_byte = tl.load(p_row + o_k // 8, mask=o_k < num_k, other=0).to(tl.int32)
        b_kept = (b_byte >> (o_k % 8)) & 1
        o_slot = count + tl.cumsum(b_kept, 0) - 1
        tl.store(p_list + o_slot, o_k, mask=b_kept == 1)
        count += tl.sum(b_kept, 0)
    tl.store(kv_num_blocks + row, count)


def unpack_mask(mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    """The lists of a mask.

    Returns:
        kv_indices: [B, H, Nq, Nk] int32, ascending, unset past the count.
        kv_num_blocks: [B, H, Nq] int32.
    """
    bits = mask.bits.contiguous()
    kv_indices = torch.empty((*bits.shape[:3], mask.num_k), device=bits.device, dtype=torch.int32)
    kv_num_blocks = torch.empty(bits.shape[:3], device=bits.device, dtype=torch.int32)
    if kv_num_blocks.numel():
        with launch.on_device(bits):
            _unpack_mask_kernel[(kv_num_blocks.numel(),)](
                bits, kv_indices, kv_num_blocks, bits.shape[-1], mask.num_k,
                CHUNK=tiles.UNPACK_MASK.tile_k, num_warps=tiles.UNPACK_MASK.num_warps,
            )  # fmt: skip
    return kv_indices, kv_num_blocks
