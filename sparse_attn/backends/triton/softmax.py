"""Pieces the attention kernels share: loading a tile of rows, and one online-softmax step.

Scores stay in units of log2 inside a kernel: they are scaled by `scale * log2(e)`, so that a
weight is one `exp2` of one fused multiply-add.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# float32 products on tensor cores, as precise as float32: each number in three parts
FLOAT32 = tl.constexpr("ieee" if torch.version.hip else "tf32x3")


@triton.jit
def matmul(b_x, b_y, b_acc):
    """b_acc + b_x @ b_y in float32."""
    # the interpreter multiplies bfloat16 as if it were integers (Triton 3.4 to 3.9)
    if INTERPRETED:
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_acc)


@triton.jit
def raw_scores(b_q, b_k):
    """[Q, K] products, not scaled yet."""
    b_zero = tl.zeros([b_q.shape[0], b_k.shape[0]], dtype=tl.float32)
    return matmul(b_q, tl.trans(b_k), b_zero)


@triton.jit
def load_rows(
    src, i_b, i_h, first, stride_b, stride_h, stride_l, L,
    ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """[ROWS, D] tile from row `first`; rows past L are zero. Strides are in units of 8 elements."""
    if TMA:
        b_x = src.load([i_b, i_h, first, 0]).reshape(ROWS, D)
    else:
        o_l = first + tl.arange(0, ROWS)
        base = i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
        # the factor 8 tells the compiler that every row starts on 16 bytes
        p_x = src + (base + o_l.to(tl.int64) * stride_l)[:, None] * 8 + tl.arange(0, D)[None, :]
        if RAGGED:  # noqa: SIM108
            b_x = tl.load(p_x, mask=(o_l < L)[:, None], other=0.0)
        else:
            b_x = tl.load(p_x)
    return b_x


@triton.jit
def mask_scores(
    b_s, scale_log2, key_bias, first, Lk, p_listed, first_pseudo, num_listed,
    COLS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Biased scores come back scaled; plain ones are left for the exponent to scale."""
    o_k = first + tl.arange(0, COLS)
    if HAS_TAIL:
        # the stand-in of a block that is listed counts for nothing
        o_block = o_k - first_pseudo
        m_block = (o_block >= 0) & (o_block < num_listed)
        b_byte = tl.load(p_listed + o_block // 8, mask=m_block, other=0).to(tl.int32)
        b_s = tl.where(((b_byte >> (o_block % 8)) & 1 == 1)[None, :], float("-inf"), b_s)
    if HAS_BIAS:
        # keys past Lk get -inf
        b_bias = tl.load(key_bias + o_k, mask=o_k < Lk, other=float("-inf"))
        b_s = b_s * scale_log2 + (b_bias * LOG2_E)[None, :]
    elif RAGGED:
        b_s = tl.where((o_k < Lk)[None, :], b_s, float("-inf"))
    return b_s


@triton.jit
def weights(b_s, b_pivot, scale_log2, HAS_BIAS: tl.constexpr):
    """exp2 of the scores relative to `b_pivot`, one value per row."""
    if HAS_BIAS:
        b_p = tl.exp2(b_s - b_pivot[:, None])
    else:
        b_p = tl.exp2(tl.fma(b_s, scale_log2, -b_pivot[:, None]))
    return b_p


@triton.jit
def attend_pair(
    b_q, b_acc, b_max, b_sum,
    k, v, i_b, i_h, k0, k1,
    stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl,
    Lk, key_bias, scale_log2,
    D: tl.constexpr, TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, TMA: tl.constexpr, RAGGED: tl.constexpr,
    p_listed=None, first_pseudo=0, num_listed=0, HAS_TAIL: tl.constexpr = False,
):  # fmt: skip
    """Online softmax over the key tiles that start at k0 and k1.

    The pair shares one maximum and one rescale of the accumulator. A tile that starts at Lk or
    past it counts for nothing, if the other one holds a key.

    Returns:
        b_acc, b_max, b_sum, and the row sums of both tiles relative to the new b_max.
    """
    # [TILE_K, D]
    b_k0 = load_rows(k, i_b, i_h, k0, stride_kb, stride_kh, stride_kl, Lk, TILE_K, D, TMA, RAGGED)
    b_k1 = load_rows(k, i_b, i_h, k1, stride_kb, stride_kh, stride_kl, Lk, TILE_K, D, TMA, RAGGED)
    # [TILE_Q, TILE_K]
    b_s0 = raw_scores(b_q, b_k0)
    b_s1 = raw_scores(b_q, b_k1)
    b_s0 = mask_scores(
        b_s0, scale_log2, key_bias, k0, Lk, p_listed, first_pseudo, num_listed,
        TILE_K, HAS_BIAS, HAS_TAIL, RAGGED,
    )  # fmt: skip
    b_s1 = mask_scores(
        b_s1, scale_log2, key_bias, k1, Lk, p_listed, first_pseudo, num_listed,
        TILE_K, HAS_BIAS, HAS_TAIL, RAGGED,
    )  # fmt: skip

    b_top = tl.max(tl.maximum(b_s0, b_s1), 1)
    if HAS_BIAS:
        b_new = tl.maximum(b_max, b_top)
        # a row may have met only keys at -inf so far
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
    else:
        b_new = tl.maximum(b_max, b_top * scale_log2)
        b_pivot = b_new
    b_p0 = weights(b_s0, b_pivot, scale_log2, HAS_BIAS)
    b_p1 = weights(b_s1, b_pivot, scale_log2, HAS_BIAS)
    b_rescale = tl.exp2(b_max - b_pivot)
    b_sum0 = tl.sum(b_p0, 1)
    b_sum1 = tl.sum(b_p1, 1)
    b_sum = b_sum * b_rescale + (b_sum0 + b_sum1)
    b_acc = b_acc * b_rescale[:, None]

    b_v0 = load_rows(v, i_b, i_h, k0, stride_vb, stride_vh, stride_vl, Lk, TILE_K, D, TMA, RAGGED)
    b_acc = matmul(b_p0.to(b_v0.dtype), b_v0, b_acc)
    b_v1 = load_rows(v, i_b, i_h, k1, stride_vb, stride_vh, stride_vl, Lk, TILE_K, D, TMA, RAGGED)
    b_acc = matmul(b_p1.to(b_v1.dtype), b_v1, b_acc)
    return b_acc, b_new, b_sum, b_sum0, b_sum1


@triton.jit
def store_rows(
    out, lse, b_acc, b_sum, b_max, i_b, i_h, H, Lq, o_q, D: tl.constexpr,
    order=None, HAS_ORDER: tl.constexpr = False,
):  # fmt: skip
    """Divide, and store output rows [B, Lq, H, D], row o_q at order[o_q], and natural-log LSE."""
    m_q = o_q < Lq
    # a row without a key has sum 0: its output is zero and its LSE -inf
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    b_lse = (b_max + tl.log2(b_sum)) * LN_2
    o_to = o_q
    if HAS_ORDER:
        o_to = tl.load(order + o_q, mask=m_q, other=0)
    row = (i_b.to(tl.int64) * Lq + o_to) * H + i_h
    p_out = out + row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_q[:, None])
    tl.store(lse + (i_b.to(tl.int64) * H + i_h) * Lq + o_q, b_lse, mask=m_q)
