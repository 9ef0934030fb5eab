"""Attention in eight bits, sparse or dense: INT8 scores, FP8 values where the card has it.

The quantisation is part of every call. Below compute capability 8.9 values stay in their own dtype.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from . import launch
from .operands import operands_of
from .quantise import TILE, quantise, to_fp8
from .softmax import (
    INTERPRETED,
    LOG2_E,
    int8_scores,
    load_rows,
    mask_scores,
    matmul,
    store_lse,
    store_tile,
)

# log2(448): the largest weight of a row becomes the largest number of FP8 (e4m3)
WEIGHT_SHIFT = tl.constexpr(8.807354922057604)

SIZES = [
    "stride_vb", "stride_vh", "stride_vl", "stride_ob", "stride_oh",
    "H", "Lq", "Lk", "Nq", "Nk", "num_rows", "list_stride", "num_pooled",
]  # fmt: skip


@triton.jit
def _attend_tile(
    b_acc, b_max, b_sum, b_q, b_scale, p_k, p_k_scale, v, p_v, key_bias, bits,
    tile, i_b, i_h, stride_vb, stride_vh, stride_vl, L,
    D: tl.constexpr, TILE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BITS: tl.constexpr,
    RAGGED: tl.constexpr, FP8_VALUES: tl.constexpr,
):  # fmt: skip
    """Online softmax over one tile of keys."""
    o_t = tl.arange(0, TILE)
    o_d = tl.arange(0, D)
    first = tile * TILE
    # the keys are padded
    b_k = tl.load(p_k + (first + o_t)[:, None] * D + o_d[None, :])
    b_s = int8_scores(b_q, b_k) * (b_scale * tl.load(p_k_scale + tile))[:, None]
    # they are scaled already
    b_s = mask_scores(b_s, 1.0, key_bias, bits, first, L, TILE, HAS_BIAS, HAS_BITS, RAGGED)
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # a row may have met only keys at -inf so far
    b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new) if HAS_BIAS else b_new
    b_p = tl.exp2(b_s - (b_pivot - WEIGHT_SHIFT)[:, None])
    b_rescale = tl.exp2(b_max - b_pivot)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_zero = tl.zeros([b_q.shape[0], D], dtype=tl.float32)
    if FP8_VALUES:
        b_v = tl.load(p_v + (o_d + tile * D)[:, None] * TILE + o_t[None, :])
        b_p = to_fp8(b_p, b_v.dtype)
        # a sum of its own: the tensor cores add up FP8 products in about 14 bits
        if INTERPRETED:
            b_new_acc = tl.dot(b_p.to(tl.float32), tl.trans(b_v).to(tl.float32))
        else:
            b_new_acc = tl.dot(b_p, tl.trans(b_v))
    else:
        b_v = load_rows(v, i_b, i_h, first, stride_vb, stride_vh, stride_vl, L, TILE, D, RAGGED)
        b_new_acc = matmul(b_p.to(b_v.dtype), b_v, b_zero)
    return b_acc * b_rescale[:, None] + b_new_acc, b_new, b_sum


@triton.jit
def _tile(p_list, t, BLOCK_K: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr):
    PARTS: tl.constexpr = BLOCK_K // TILE
    if LISTED:
        t = tl.load(p_list + t // PARTS) * PARTS + t % PARTS
    return t


@triton.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        "lse", "key_bias", "q_scale", "q_shift", "k_scale", "v_scale", "v_mean", "pooled_k_scale",
        "log_sizes", "kv_indices", "kv_num_blocks", "bits", "order",
    ],
)  # fmt: skip
def _quantised_attention_kernel(
    q, k, v, v8, key_bias, q_scale, q_shift, k_scale, v_scale, v_mean,
    pooled_k, pooled_v8, pooled_k_scale, pooled_v, log_sizes,
    kv_indices, kv_num_blocks, bits, order, out, lse,
    stride_vb, stride_vh, stride_vl, stride_ob, stride_oh,
    H, Lq, Lk, Nq, Nk, num_rows, list_stride, num_pooled,
    D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LISTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_POOLED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    FP8_VALUES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_bh, i_q = (pid // Nq).to(tl.int64), pid % Nq
    i_b, i_h = pid // Nq // H, pid // Nq % H
    o_q = i_q * TILE_Q + tl.arange(0, TILE_Q)
    o_d = tl.arange(0, D)
    p_bias = key_bias
    if HAS_BIAS:
        p_bias += i_b.to(tl.int64) * Lk
    p_list = kv_indices
    if LISTED:
        PARTS: tl.constexpr = BLOCK_K // TILE
        p_list += (i_bh * Nq + i_q) * list_stride
        num_blocks = tl.load(kv_num_blocks + i_bh * Nq + i_q)
        # the list ascends, so only its last block can run past Lk, or have one tile
        last = tl.load(p_list + num_blocks - 1, mask=num_blocks > 0, other=0)
        num_tiles = tl.where(num_blocks > 0, (num_blocks - 1) * PARTS, 0)
        num_all = num_tiles + tl.where(num_blocks > 0, tl.minimum(PARTS, Nk - last * PARTS), 0)
        num_whole = tl.where((last + 1) * BLOCK_K > Lk, num_tiles, num_all)
    else:
        num_all = Nk
        num_whole = Lk // TILE

    # [TILE_Q, D]; the queries are padded
    row = i_bh * num_rows + o_q
    b_q = tl.load(q + row[:, None] * D + o_d[None, :])
    b_scale = tl.load(q_scale + row)
    p_k = k + i_bh * Nk * TILE * D
    p_k_scale = k_scale + i_bh * Nk
    p_v = v8
    if FP8_VALUES:
        p_v += i_bh * Nk * TILE * D
    b_acc = tl.zeros([TILE_Q, D], dtype=tl.float32)
    b_max = tl.full([TILE_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([TILE_Q], dtype=tl.float32)
    for t in tl.range(0, num_whole):
        b_acc, b_max, b_sum = _attend_tile(
            b_acc, b_max, b_sum, b_q, b_scale, p_k, p_k_scale, v, p_v, p_bias, bits,
            _tile(p_list, t, BLOCK_K, TILE, LISTED), i_b, i_h, stride_vb, stride_vh, stride_vl, Lk,
            D, TILE, HAS_BIAS, False, False, FP8_VALUES,
        )  # fmt: skip
    # at most two turns
    for t in tl.range(num_whole, num_all, num_stages=1):
        b_acc, b_max, b_sum = _attend_tile(
            b_acc, b_max, b_sum, b_q, b_scale, p_k, p_k_scale, v, p_v, p_bias, bits,
            _tile(p_list, t, BLOCK_K, TILE, LISTED), i_b, i_h, stride_vb, stride_vh, stride_vl, Lk,
            D, TILE, HAS_BIAS, False, True, FP8_VALUES,
        )  # fmt: skip
    if HAS_POOLED:
        num_pooled_tiles = tl.cdiv(num_pooled, TILE)
        p_bits = bits + (i_bh * Nq + i_q) * tl.cdiv(num_pooled, 8)
        p_sizes = log_sizes + i_b.to(tl.int64) * num_pooled
        p_k = pooled_k + i_bh * num_pooled_tiles * TILE * D
        p_k_scale = pooled_k_scale + i_bh * num_pooled_tiles
        p_v = pooled_v8
        if FP8_VALUES:
            p_v += i_bh * num_pooled_tiles * TILE * D
        # strides of contiguous means, in units of 8 elements
        stride_h = num_pooled.to(tl.int64) * (D // 8)
        for t in tl.range(0, num_pooled_tiles):
            b_acc, b_max, b_sum = _attend_tile(
                b_acc, b_max, b_sum, b_q, b_scale, p_k, p_k_scale, pooled_v, p_v, p_sizes, p_bits,
                t, i_b, i_h, H * stride_h, stride_h, D // 8, num_pooled,
                D, TILE, True, True, True, FP8_VALUES,
            )  # fmt: skip

    if FP8_VALUES:
        b_acc *= tl.load(v_scale + i_bh * D + o_d)[None, :]
        # a row without a key has sum 0
        b_acc += b_sum[:, None] * tl.load(v_mean + i_bh * D + o_d)[None, :]
    b_max += tl.load(q_shift + row) * LOG2_E - WEIGHT_SHIFT
    if HAS_ORDER:
        order += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    # a row without a key has sum 0: its output is zero
    b_acc /= tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    store_tile(out, b_acc, i_b, i_h, H, Lq, o_q, 0, order, D, D, HAS_ORDER)
    store_lse(lse, b_max, b_sum, i_b, i_h, H, Lq, o_q)


def quantised_attention(
    q, k, v, *, scale, key_bias=None, mask=None, pooled=None, order=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in eight bits; arguments and results are those of `attention`."""
    x = operands_of(q, k, v, key_bias=key_bias, mask=mask, pooled=pooled, order=order)
    B, H, Lq, Lk, D = x.sizes
    if x.out.numel() == 0:
        return x.out, x.lse
    if Lk == 0:
        return x.out.zero_(), x.lse.fill_(float("-inf"))
    # without lists the larger one is faster
    block_q, block_k = (128, TILE) if mask is None else (mask.block_q, mask.block_k)
    Nq = triton.cdiv(Lq, block_q)
    tile, fp8_values = tiles.quantised_attention(block_q), has_fp8(q)
    with launch.on_device(q):
        y = quantise(
            x.q, x.k, x.v, scale=float(scale), values=fp8_values, ordered=False,
            key_bias=x.key_bias, pooled=x.pooled,
        )  # fmt: skip
        _quantised_attention_kernel[(B * H * Nq,)](
            y.q, y.k, x.v, y.v, x.key_bias, y.q_scale, y.q_shift, y.k_scale, y.v_scale, y.v_mean,
            y.pooled_k, y.pooled_v, y.pooled_k_scale, *x.pooled_tensors[1:],
            x.kv_indices, x.kv_num_blocks, x.bits, x.order, x.out, x.lse,
            *launch.row_strides(x.v), *x.order_strides,
            H, Lq, Lk, Nq, y.k_scale.shape[2], y.q.shape[2], mask.num_k if mask else 0,
            x.num_pooled,
            D=D,
            TILE_Q=block_q,
            TILE=TILE,
            BLOCK_K=block_k,
            LISTED=mask is not None,
            HAS_BIAS=x.key_bias is not None,
            HAS_POOLED=x.pooled is not None,
            HAS_ORDER=x.order is not None,
            FP8_VALUES=fp8_values,
            **tile.options,
        )  # fmt: skip
    return x.out, x.lse


def has_fp8(q) -> bool:
    """Whether the tensor cores of q's device multiply FP8."""
    if q.device.type != "cuda":
        # interpreted
        return True
    return torch.cuda.get_device_capability(q.device) >= (8, 9)


def why_not_quantised(q, k, v, block_q: int, block_k: int) -> str | None:
    """Reason why this kernel cannot serve the call, or None."""
    reason = launch.why_not(q, k, v, block_q, block_k)
    if reason is None and q.device.type == "cuda" and torch.version.hip is not None:
        return "needs an NVIDIA card for eight bits"
    return reason
