"""Pieces the attention kernels share: tiles of rows in and out, scores, and their weights.

The state of an online softmax is (acc, max, sum) everywhere: weighted values, the largest score of a
row so far, and the sum of its weights relative to that. Scores stay in units of log2 inside a kernel: they are scaled by `scale * log2(e)`, so that a
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
def int8_scores(b_q, b_k):
    """[Q, K] products of int8 in float32."""
    b_k = tl.trans(b_k)
    if INTERPRETED:
        b_s = tl.dot(b_q.to(tl.float32), b_k.to(tl.float32))
    else:
        b_s = tl.dot(b_q, b_k, out_dtype=tl.int32).to(tl.float32)
    return b_s


@triton.jit
def load_rows(
    src, i_b, i_h, first, stride_b, stride_h, stride_l, L,
    ROWS: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """[ROWS, D] tile from row `first`; rows past L are zero. Strides are in units of 8 elements."""
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
    b_s, scale_log2, key_bias, bits, first, L,
    COLS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BITS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Hide the keys past L and those whose bit is set, and add a bias.

    Biased scores come back scaled; plain ones are left for the exponent to scale.
    """
    o_k = first + tl.arange(0, COLS)
    if HAS_BITS:
        b_byte = tl.load(bits + o_k // 8, mask=o_k < L, other=0).to(tl.int32)
        b_s = tl.where(((b_byte >> (o_k % 8)) & 1 == 1)[None, :], float("-inf"), b_s)
    if HAS_BIAS:
        # keys past L get -inf
        b_bias = tl.load(key_bias + o_k, mask=o_k < L, other=float("-inf"))
        b_s = b_s * scale_log2 + (b_bias * LOG2_E)[None, :]
    elif RAGGED:
        b_s = tl.where((o_k < L)[None, :], b_s, float("-inf"))
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
def store_rows(
    out, lse, b_acc, b_max, b_sum, i_b, i_h, H, Lq, o_q, order, D: tl.constexpr,
    HAS_ORDER: tl.constexpr,
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
