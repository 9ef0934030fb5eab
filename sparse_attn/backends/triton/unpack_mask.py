"""Bits of a block mask -> the packed lists that the sparse kernel walks.

One program owns one row of the mask: it ranks the set bits with a running count and writes each
block number to its place. Slots past the count are not written and must not be read.
"""

import torch
import triton
import triton.language as tl

from . import launch as inputs

# bits per turn of one warp. ms at 24 heads x 1860 x 1860 blocks, density 0.2 (H200, torch 2.11,
# Triton 3.6, 2026-11-23): 256 bits 0.18, 512 0.16; 4 warps with 1024 0.23, 8 with 2048 0.28
CHUNK = 512


@triton.jit(
    do_not_specialize=["num_bytes", "num_k", "list_stride", "more"],
    do_not_specialize_on_alignment=["bits", "kv_indices", "kv_num_blocks"],
)
def _unpack_mask_kernel(
    bits, kv_indices, kv_num_blocks, num_bytes, num_k, list_stride, more, CHUNK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    p_row = bits + row * num_bytes
    p_list = kv_indices + row * list_stride
    count = 0
    for first in tl.range(0, num_k, CHUNK):
        o_k = first + tl.arange(0, CHUNK)
        b_byte = tl.load(p_row + o_k // 8, mask=o_k < num_k, other=0).to(tl.int32)
        b_kept = (b_byte >> (o_k % 8)) & 1
        o_slot = count + tl.cumsum(b_kept, 0) - 1
        # a caller that gives a smaller width than a row needs loses blocks, not memory
        tl.store(p_list + o_slot, o_k, mask=(b_kept == 1) & (o_slot < list_stride))
        count += tl.sum(b_kept, 0)
    for first in tl.range(0, more, CHUNK):
        o_k = first + tl.arange(0, CHUNK)
        tl.store(p_list + count + o_k, num_k + o_k, mask=(o_k < more) & (count + o_k < list_stride))
    tl.store(kv_num_blocks + row, tl.minimum(count + more, list_stride))


def unpack_mask(bits: torch.Tensor, num_k: int, max_blocks: int | None = None, more: int = 0):
    """(kv_indices, kv_num_blocks) of a mask stored as bits.

    Args:
        bits: [B, H, Nq, ceil(num_k / 8)] uint8, bit j of byte b is key block 8 * b + j.
        num_k: number of key blocks.
        max_blocks: width of the lists, at least the largest count; num_k + more if not known.
        more: blocks num_k to num_k + more - 1, which no bit tells of, end every list.

    Returns:
        kv_indices [B, H, Nq, max_blocks] int32, ascending, unset past the count;
        kv_num_blocks [B, H, Nq] int32.
    """
    inputs.refuse(why_not(bits, num_k))
    width = num_k + more if max_blocks is None else min(max_blocks, num_k + more)
    bits = bits.contiguous()
    kv_indices = torch.empty((*bits.shape[:3], width), device=bits.device, dtype=torch.int32)
    kv_num_blocks = torch.empty(bits.shape[:3], device=bits.device, dtype=torch.int32)
    if kv_num_blocks.numel():
        with inputs.on_device(bits):
            _unpack_mask_kernel[(kv_num_blocks.numel(),)](
                bits,
                kv_indices,
                kv_num_blocks,
                bits.shape[-1],
                num_k,
                width,
                more,
                CHUNK=CHUNK,
                num_warps=1,
            )
    return kv_indices, kv_num_blocks


def listed(k, v, key_bias, mask, pooled) -> dict:
    """k, v, bias, lists and tail as the kernels take them."""
    if pooled is None:
        indices, counts = unpack_mask(mask.bits, mask.num_k)
        return {
            "k": k, "v": v, "key_bias": key_bias, "kv_indices": indices, "kv_num_blocks": counts
        }  # fmt: skip
    B, _, Lk, _ = k.shape
    pads, N = -Lk % 64, mask.num_k
    more = -(-N // 64)
    indices, counts = unpack_mask(mask.bits, N, more=more)
    nothing = torch.full((B, 64), float("-inf"), device=k.device)
    bias = torch.zeros((B, Lk), device=k.device) if key_bias is None else key_bias
    key_bias = torch.cat([bias, nothing[:, :pads], pooled.log_sizes, nothing[:, : -N % 64]], 1)
    zeros = k.new_zeros(*k.shape[:2], 64, k.shape[3])
    k, v = (
        torch.cat([x, zeros[:, :, :pads], means, zeros[:, :, : -N % 64]], 2)
        for x, means in ((k, pooled.k_mean), (v, pooled.v_mean))
    )
    return {
        "k": k, "v": v, "key_bias": key_bias, "kv_indices": indices, "kv_num_blocks": counts,
        "tail": mask.bits,
    }  # fmt: skip


def why_not(bits: torch.Tensor, num_k: int) -> str | None:
    """Reason why this kernel cannot serve the call, or None."""
    if bits.dtype != torch.uint8 or bits.ndim != 4:
        return f"needs uint8 bits [B, H, Nq, bytes], got {bits.dtype} with {bits.ndim} dimensions"
    if bits.shape[-1] != triton.cdiv(num_k, 8):
        return f"needs {triton.cdiv(num_k, 8)} bytes for {num_k} key blocks, got {bits.shape[-1]}"
    return inputs.why_not_device(bits)
