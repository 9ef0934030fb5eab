"""Attention in eight bits, sparse or dense: scores and values in INT8.

A tile's weights are rounded to 127 steps of its own largest one, row by row: scaled by the running
maximum, a flat row would have few steps left. Integer sums of one tile are merged in float32 (after
SageAttention's kernels in comfy-kitchen). The denominator adds up the weights as they were before: the
many small ones that round to nothing then stand for the mean of the values, which these are relative
to, and not for more of what is large. The quantisation is part of every call.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from .. import tiles
from . import launch
from .operands import operands_of
from .quantise import COLS, TILE, quantise
from .softmax import (
    INTERPRETED,
    LOG2_E,
    MAGIC,
    MAGIC_BITS,
    bias_scores,
    hide_past,
    int8_matmul,
    int8_scores,
    store_lse,
    store_tile,
)

# log2(127): the largest weight of a tile
STEPS = tl.constexpr(6.9886846867721655)

SIZES = [
    "stride_ob", "stride_oh",
    "H", "Lq", "Lk", "Nq", "Nk", "num_rows", "list_stride", "num_pooled",
]  # fmt: skip


# four float32 as int8, rounded to the nearest; two conversions become one instruction
FOUR_INT8 = tl.constexpr("""{
.reg .s32 a, b, c, d; .reg .b32 t;
cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;
cvt.pack.sat.s8.s32.b32 t, d, c, 0;
cvt.pack.sat.s8.s32.b32 $0, b, a, t;
}""")


@triton.jit
def _to_operand(b_p, TILE_Q: tl.constexpr, KEYS: tl.constexpr):
    """Weights as int8, columns in `key_order`: a lane has those already that the product asks of it."""
    b_p = tl.permute(tl.reshape(b_p, [TILE_Q, KEYS // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    b_p = tl.reshape(b_p, [TILE_Q, KEYS])
    if INTERPRETED:
        return (b_p + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    return tl.inline_asm_elementwise(
        FOUR_INT8, "=r,r,r,r,r", [b_p], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def _merge(b_acc, b_p, b_v, b_old, b_new):
    """b_acc * b_old + b_new * (b_p @ b_v), b_old and b_new one value per row."""
    b_zero = tl.full(b_acc.shape, MAGIC_BITS, tl.int32)
    b_sum = int8_matmul(b_p, b_v, b_zero)
    b_acc = tl.fma(b_acc, b_old[:, None], (b_new * -MAGIC)[:, None])
    return tl.fma(b_sum, b_new[:, None], b_acc)


@triton.jit
def _attend_tile(
    b_acc0, b_acc1, b_max, b_sum, b_q, b_scale, p_k, p_k_scale, p_v, p_v_scale, key_bias, bits,
    first, L,
    D: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, TILE_Q: tl.constexpr,
    COLS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BITS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Online softmax over KEYS keys of one tile, from `first` on."""
    tile = first // TILE
    o_t = tl.arange(0, KEYS)
    o_c = tl.arange(0, COLS)
    # the keys are padded
    b_k = tl.load(p_k + tl.full([], first, tl.int64) * D
                  + (o_t[:, None] * D + tl.arange(0, D)[None, :]))  # fmt: skip
    b_factor = b_scale * tl.load(p_k_scale + tile)
    if HAS_BIAS or RAGGED:
        b_s, b_scale = int8_scores(b_q, b_k), b_factor[:, None]
        if HAS_BIAS:
            b_s = bias_scores(b_s, b_scale, key_bias, bits, first, L, KEYS, HAS_BITS, RAGGED)
        else:
            b_s = hide_past(b_s * b_scale, first, L, KEYS)
        b_top = tl.max(b_s, 1)
        b_p = tl.exp2(b_s - (tl.where(b_top == float("-inf"), 0.0, b_top) - STEPS)[:, None])
        b_next = tl.maximum(b_max, b_top)
        # a row may have met only keys at -inf so far
        b_pivot = tl.where(b_next == float("-inf"), 0.0, b_next)
    else:
        b_zero = tl.full([TILE_Q, KEYS], MAGIC_BITS, tl.int32)
        b_s = int8_matmul(b_q, tl.trans(b_k), b_zero)
        # two steps above the largest, or rounding could lift a weight past 127
        b_top = (tl.max(b_s, 1) - (MAGIC - 2.0)) * b_factor
        b_shift = -(b_top - STEPS) - b_factor * MAGIC
        b_p = tl.exp2(tl.fma(b_s, b_factor[:, None], b_shift[:, None]))
        b_next = tl.maximum(b_max, b_top)
        b_pivot = b_next
    b_old = tl.exp2(b_max - b_pivot)
    b_new = tl.exp2(b_top - b_pivot)
    b_sum = tl.fma(b_sum, b_old, tl.sum(b_p, 1) * b_new)
    b_p = _to_operand(b_p, TILE_Q, KEYS)
    p_v_scale += tile * (D // COLS)
    p_v += tl.full([], tile, tl.int64) * (TILE * D) + (o_c[:, None] * TILE + o_t[None, :])
    if KEYS < TILE:
        p_v += tl.multiple_of(first % TILE, KEYS)
    b_v = tl.trans(tl.load(p_v))
    b_acc0 = _merge(b_acc0, b_p, b_v, b_old, b_new * tl.load(p_v_scale))
    if D > COLS:
        b_v = tl.trans(tl.load(p_v + COLS * TILE))
        b_acc1 = _merge(b_acc1, b_p, b_v, b_old, b_new * tl.load(p_v_scale + 1))
    return b_acc0, b_acc1, b_next, b_sum


@triton.jit
def _tile(
    p_list, t, num_blocks, BLOCK_K: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr
):  # fmt: skip
    """The t-th tile, of all or of a list of key blocks."""
    PARTS: tl.constexpr = BLOCK_K // TILE
    if LISTED:
        i = t // PARTS
        t = tl.load(p_list + i, mask=i < num_blocks, other=0) * PARTS + t % PARTS
    return t


@triton.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        "lse", "key_bias", "q_scale", "q_shift", "k_scale", "v_tile_scale", "v_scale", "v_mean",
        "pooled_k_scale", "pooled_v_tile_scale", "log_sizes", "kv_indices", "kv_num_blocks", "bits", "order",
    ],
)  # fmt: skip
def _quantised_attention_kernel(
    q, k, v, key_bias, q_scale, q_shift, k_scale, v_tile_scale, v_scale, v_mean,
    pooled_k, pooled_v, pooled_k_scale, pooled_v_tile_scale, log_sizes,
    kv_indices, kv_num_blocks, bits, order, out, lse,
    stride_ob, stride_oh,
    H, Lq, Lk, Nq, Nk, num_rows, list_stride, num_pooled,
    D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LISTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_POOLED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = BLOCK_Q // TILE_Q
    pid = tl.program_id(0)
    num_q = Nq * HALVES
    i_bh, i_q = (pid // num_q).to(tl.int64), pid % num_q
    i_b, i_h = pid // num_q // H, pid // num_q % H
    row_of_blocks = i_bh * Nq + i_q // HALVES
    o_q = i_q * TILE_Q + tl.arange(0, TILE_Q)
    p_bias = key_bias
    if HAS_BIAS:
        p_bias += i_b.to(tl.int64) * Lk
    p_list = kv_indices
    num_blocks = 0
    num_whole = Lk // TILE
    # keys of a block that runs past Lk
    first_edge = num_whole * TILE
    past_edge = Lk
    if LISTED:
        PARTS: tl.constexpr = BLOCK_K // TILE
        p_list += row_of_blocks * list_stride
        num_blocks = tl.load(kv_num_blocks + row_of_blocks)
        # the list ascends
        last = tl.load(p_list + num_blocks - 1, mask=num_blocks > 0, other=0)
        first_edge = tl.minimum(last * BLOCK_K, Lk)
        past_edge = tl.where((num_blocks > 0) & ((last + 1) * BLOCK_K > Lk), Lk, first_edge)
        num_whole = (num_blocks - tl.where(past_edge > first_edge, 1, 0)) * PARTS

    # [TILE_Q, D]; the queries are padded
    row = i_bh * num_rows + o_q
    b_q = tl.load(q + row[:, None] * D + tl.arange(0, D)[None, :])
    b_scale = tl.load(q_scale + row)
    p_k = k + i_bh * Nk * TILE * D
    p_v = v + i_bh * Nk * TILE * D
    p_k_scale = k_scale + i_bh * Nk
    p_v_scale = v_tile_scale + i_bh * Nk * (D // COLS)
    b_acc0 = tl.zeros([TILE_Q, COLS], dtype=tl.float32)
    b_acc1 = tl.zeros([TILE_Q, COLS], dtype=tl.float32)
    b_max = tl.full([TILE_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([TILE_Q], dtype=tl.float32)
    # first what is masked, by smaller tiles: the loop that matters gets all registers
    EDGE: tl.constexpr = 32
    if HAS_POOLED:
        num_pooled_tiles = tl.cdiv(num_pooled, TILE)
        p_bits = bits + row_of_blocks * tl.cdiv(num_pooled, 8)
        # padded, so that no mask travels with their loads
        p_sizes = log_sizes + i_b.to(tl.int64) * (num_pooled_tiles * TILE)
        pooled_k += i_bh * num_pooled_tiles * TILE * D
        pooled_v += i_bh * num_pooled_tiles * TILE * D
        pooled_k_scale += i_bh * num_pooled_tiles
        pooled_v_tile_scale += i_bh * num_pooled_tiles * (D // COLS)
        for first in tl.range(0, num_pooled, TILE):
            b_acc0, b_acc1, b_max, b_sum = _attend_tile(
                b_acc0, b_acc1, b_max, b_sum, b_q, b_scale, pooled_k, pooled_k_scale, pooled_v,
                pooled_v_tile_scale, p_sizes, p_bits, first, num_pooled,
                D, TILE, TILE, TILE_Q, COLS, True, True, False,
            )  # fmt: skip
    for first in tl.range(first_edge, past_edge, EDGE, num_stages=1):
        b_acc0, b_acc1, b_max, b_sum = _attend_tile(
            b_acc0, b_acc1, b_max, b_sum, b_q, b_scale, p_k, p_k_scale, p_v, p_v_scale, p_bias, bits,
            first, Lk, D, TILE, EDGE, TILE_Q, COLS, HAS_BIAS, False, True,
        )  # fmt: skip
    # known a turn ahead, or no load of keys could run ahead of the turn that uses them
    following = _tile(p_list, 0, num_blocks, BLOCK_K, TILE, LISTED)
    for t in tl.range(0, num_whole):
        tile = following
        following = _tile(p_list, t + 1, num_blocks, BLOCK_K, TILE, LISTED)
        b_acc0, b_acc1, b_max, b_sum = _attend_tile(
            b_acc0, b_acc1, b_max, b_sum, b_q, b_scale, p_k, p_k_scale, p_v, p_v_scale, p_bias, bits,
            tile * TILE, Lk, D, TILE, TILE, TILE_Q, COLS, HAS_BIAS, False, False,
        )  # fmt: skip

    if HAS_ORDER:
        order += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    o_c = tl.arange(0, COLS)
    p_scale = v_scale + i_bh * D + o_c
    p_mean = v_mean + i_bh * D + o_c
    # a row without a key has sum 0: its output is zero
    b_share = 1 / tl.where(b_sum == 0.0, 1.0, b_sum)
    b_any = b_sum * b_share
    b_out = b_acc0 * b_share[:, None] * tl.load(p_scale)[None, :]
    b_out += b_any[:, None] * tl.load(p_mean)[None, :]
    store_tile(out, b_out, i_b, i_h, H, Lq, o_q, 0, order, D, COLS, HAS_ORDER)
    if D > COLS:
        b_out = b_acc1 * b_share[:, None] * tl.load(p_scale + COLS)[None, :]
        b_out += b_any[:, None] * tl.load(p_mean + COLS)[None, :]
        store_tile(out, b_out, i_b, i_h, H, Lq, o_q, COLS, order, D, COLS, HAS_ORDER)
    b_max += tl.load(q_shift + row) * LOG2_E - STEPS
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
    tile = tiles.quantised_attention(tiles.card_of(q.device), D)
    block_q, block_k = (tile.tile_q, TILE) if mask is None else (mask.block_q, mask.block_k)
    Nq = triton.cdiv(Lq, block_q)
    log_sizes = x.pooled_tensors[2]
    if log_sizes is not None:
        log_sizes = F.pad(log_sizes, (0, -x.num_pooled % TILE), value=float("-inf"))
    with launch.on_device(q):
        y = quantise(
            x.q, x.k, x.v, scale=float(scale), values=torch.int8, key_bias=x.key_bias,
            pooled=x.pooled,
        )  # fmt: skip
        _quantised_attention_kernel[(B * H * Nq * (block_q // tile.tile_q),)](
            y.q, y.k, y.v, x.key_bias, y.q_scale, y.q_shift, y.k_scale, y.v_tile_scale, y.v_scale,
            y.v_mean, y.pooled_k, y.pooled_v, y.pooled_k_scale, y.pooled_v_tile_scale,
            log_sizes, x.kv_indices, x.kv_num_blocks, x.bits, x.order, x.out, x.lse,
            *x.order_strides,
            H, Lq, Lk, Nq, y.k_scale.shape[2], y.q.shape[2], mask.num_k if mask else 0,
            x.num_pooled,
            D=D,
            TILE_Q=tile.tile_q,
            TILE=TILE,
            COLS=COLS,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            LISTED=mask is not None,
            HAS_BIAS=x.key_bias is not None,
            HAS_POOLED=x.pooled is not None,
            HAS_ORDER=x.order is not None,
            **tile.options,
        )  # fmt: skip
    return x.out, x.lse


def why_not_quantised(q, k, v, block_q: int, block_k: int) -> str | None:
    """Reason why this kernel cannot serve the call, or None."""
    reason = launch.why_not(q, k, v, block_q, block_k)
    if reason is None and q.device.type == "cuda" and torch.version.hip is not None:
        return "needs an NVIDIA card for eight bits"
    return reason
