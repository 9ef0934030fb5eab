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
# 1.5 * 2^23, and its bits
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)
# keeps a hopelessly stale LSE from turning a whole row into inf / inf
MAX_MASS = tl.constexpr(1e30)
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
    b_zero = tl.full([b_q.shape[0], b_k.shape[0]], MAGIC_BITS, tl.int32)
    return int8_matmul(b_q, tl.trans(b_k), b_zero) - MAGIC


@triton.jit
def int8_matmul(b_x, b_y, b_bits):
    """MAGIC + b_x @ b_y in float32, of int8; b_bits is MAGIC's bits plus what comes on top.

    A whole number n below 2^22 rides in the bits of the float32 1.5 * 2^23 + n: no instruction makes
    floats of integers, which are few a clock.
    """
    if INTERPRETED:
        b_sum = tl.dot(b_x.to(tl.float32), b_y.to(tl.float32)).to(tl.int32) + b_bits
    else:
        b_sum = tl.dot(b_x, b_y, b_bits, out_dtype=tl.int32)
    return b_sum.to(tl.float32, bitcast=True)


@triton.jit
def load_tile(
    src, i_b, i_h, first, o_l, column, stride_b, stride_h, stride_l, L,
    COLS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Rows first + o_l, COLS of them from `column`; past L zeros. Strides are in units of 8 elements."""
    base = i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    # the interpreter counts loops in Python's integers
    base += tl.full([], first, tl.int64) * stride_l
    # the factor 8 tells the compiler that every row starts on 16 bytes
    p_x = src + base * 8 + column
    p_x += (o_l * stride_l)[:, None] * 8 + tl.arange(0, COLS)[None, :]
    if RAGGED:  # noqa: SIM108
        b_x = tl.load(p_x, mask=(first + o_l < L)[:, None], other=0.0)
    else:
        b_x = tl.load(p_x)
    return b_x


@triton.jit
def load_rows(
    src, i_b, i_h, first, stride_b, stride_h, stride_l, L,
    ROWS: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """[ROWS, D] tile from row `first`; rows past L are zero. Strides are in units of 8 elements."""
    o_l = tl.arange(0, ROWS)
    return load_tile(src, i_b, i_h, first, o_l, 0, stride_b, stride_h, stride_l, L, D, RAGGED)


@triton.jit
def _word(bits, byte, last, BYTES: tl.constexpr):
    """BYTES bytes from `byte` on, at most 4; those past the last are others'."""
    word = 0
    for i in tl.static_range(BYTES):
        word |= tl.load(bits + tl.minimum(byte + i, last)).to(tl.int32) << (8 * i)
    return word


@triton.jit
def _bits(bits, first, L, COLS: tl.constexpr):
    """[COLS] bits from `first` on, at most 64 and both multiples of 8; those past L are others'.

    Words that all lanes read alike: an address for every key would take more than the scores. A lane
    has the same places of all bytes, so it shifts a word twice and not for every key.
    """
    o_k = tl.arange(0, COLS)
    byte, last = first // 8, (L - 1) // 8
    word = _word(bits, byte, last, min(COLS // 8, 4)) >> o_k % 8
    if COLS > 32:
        word = tl.where(o_k < 32, word, _word(bits, byte + 4, last, COLS // 8 - 4) >> o_k % 8)
    return (word >> (o_k // 8 * 8) % 32) & 1 == 1


@triton.jit
def bias_scores(
    b_s, scale_log2, key_bias, bits, first, L,
    COLS: tl.constexpr, HAS_BITS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Scale scores, add a bias, and hide the keys past L and those whose bit is set.

    Args:
        scale_log2: one number, or [Q, 1].
    """
    o_k = first + tl.arange(0, COLS)
    if RAGGED:
        b_bias = tl.load(key_bias + o_k, mask=o_k < L, other=float("-inf")) * LOG2_E
    else:
        b_bias = tl.load(key_bias + o_k) * LOG2_E
    if HAS_BITS:
        b_bias = tl.where(_bits(bits, first, L, COLS), float("-inf"), b_bias)
    return tl.fma(b_s, scale_log2, b_bias[None, :])


@triton.jit
def hide_past(b_s, first, L, COLS: tl.constexpr):
    """Hide the keys past L."""
    return tl.where((first + tl.arange(0, COLS) < L)[None, :], b_s, float("-inf"))


@triton.jit
def weights(b_s, b_pivot, scale_log2, HAS_BIAS: tl.constexpr):
    """exp2 of the scores relative to `b_pivot`, one value per row."""
    if HAS_BIAS:
        b_p = tl.exp2(b_s - b_pivot[:, None])
    else:
        b_p = tl.exp2(tl.fma(b_s, scale_log2, -b_pivot[:, None]))
    return b_p


@triton.jit
def output_rows(
    out, i_b, i_h, H, Lq, o_q, column, order, D: tl.constexpr, COLS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """COLS columns from `column` of rows of an output [B, Lq, H, D], row o_q at order[o_q]."""
    o_to = o_q
    if HAS_ORDER:
        o_to = tl.load(order + o_q, mask=o_q < Lq, other=0)
    row = (i_b.to(tl.int64) * Lq + o_to) * H + i_h
    return out + row[:, None] * D + (column + tl.arange(0, COLS))[None, :]


@triton.jit
def store_tile(
    out, b_out, i_b, i_h, H, Lq, o_q, column, order, D: tl.constexpr, COLS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Store `output_rows`."""
    p_out = output_rows(out, i_b, i_h, H, Lq, o_q, column, order, D, COLS, HAS_ORDER)
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=(o_q < Lq)[:, None])


@triton.jit
def store_lse(lse, b_max, b_sum, i_b, i_h, H, Lq, o_q):
    """Store the natural-log LSE; -inf for a row without a key."""
    b_lse = (b_max + tl.log2(b_sum)) * LN_2
    tl.store(lse + (i_b.to(tl.int64) * H + i_h) * Lq + o_q, b_lse, mask=o_q < Lq)


@triton.jit
def neighbours(TILE_Q: tl.constexpr):
    """Rows of a tile in the order in which each of four warps holds neighbours.

    A matrix instruction is sixteen rows high, and four warps take turns at them.
    """
    o = tl.arange(0, TILE_Q)
    return (o // 16 % 4) * (TILE_Q // 4) + o // 64 * 16 + o % 16


@triton.jit
def store_masses(b_p, p_masses, i_q, Nq, Nk, BLOCK_Q: tl.constexpr):
    """Store masses of BLOCK_Q rows each, 16 or 64, of one block of keys.

    Args:
        b_p: [TILE_Q, K] what adds up to them, rows in the order of `neighbours`.
        p_masses: mass of the tile's first block of rows, i_q; there are Nq of them, Nk apart.
    """
    TILE_Q: tl.constexpr = b_p.shape[0]
    RUNS: tl.constexpr = TILE_Q // 64
    NUM: tl.constexpr = TILE_Q // BLOCK_Q
    K: tl.constexpr = b_p.shape[1]
    if BLOCK_Q == 16:
        b_p = tl.permute(tl.reshape(b_p, [RUNS, 4, 16, K]), [1, 0, 2, 3])
    else:
        b_p = tl.permute(tl.reshape(b_p, [RUNS, RUNS, 4 // RUNS, 16, K]), [1, 0, 2, 3, 4])
    b_masses = tl.sum(tl.reshape(b_p, [NUM, BLOCK_Q * K]), 1)
    b_masses = tl.where(b_masses > MAX_MASS, MAX_MASS, b_masses)
    o_row = tl.arange(0, NUM)
    tl.store(p_masses + o_row.to(tl.int64) * Nk, b_masses, mask=i_q + o_row < Nq)
