"""Queries, keys and values in eight bits.

Keys lose their mean over the tokens, which shifts every score of a row alike and so leaves the
softmax as it is. Queries and keys are then rotated by one random orthogonal (Hadamard) matrix: it
leaves their products as they are, but spreads a channel that stands out over all of them, so that
256 steps are enough. Values lose their mean too, which the output gets back, and each channel has
a scale of its own. Pooled keys and values are shifted, rotated and scaled as those of tokens are.

Keys that a bias of -inf hides are zeros to all of this: what they held would only coarsen the rest.

Scales: one per query, one per 64 keys, one per channel of the values and, of INT8 ones, one more per
64 keys and channels. At 24 heads x 119040 tokens x
128 in bfloat16 all of it took 1.28 ms (NVIDIA H200, torch 2.11, Triton 3.6, 2026-11-23), before
scales looked for NaN.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import tiles
from ..permuted import Pooled
from . import launch
from .softmax import INTERPRETED, LOG2_E, load_rows, matmul

# keys that share a scale, and values of one transposed tile
TILE = 64
# queries are padded to a multiple of this
PAD = 128
# channels of INT8 values that share a scale within a tile: what attention sums up at a time
COLS = 64
# programs that add up one head, and tiles that one program rotates
SPLITS = 2 if launch.INTERPRETED else tiles.SUM_SPLITS
TURNS = 1 if launch.INTERPRETED else tiles.ROTATE_TURNS
# any shift of the keys is exact, so a share of them is enough to find the one to take
SAMPLED = 8
LARGEST_FP8 = tl.constexpr(448.0)
LARGEST_INT8 = tl.constexpr(127.0)
# added to a float32, it leaves the nearest integer in the lowest bits
ROUND = tl.constexpr(12582912.0)

STRIDES = ["stride_b", "stride_h", "stride_l"]


class QuantisedScores(NamedTuple):
    """Queries and keys."""

    q: torch.Tensor  # [B, H, Nq, D] int8, rotated; Nq is a multiple of 128
    q_scale: torch.Tensor  # [B, H, Nq]: times k_scale and a product, a score in units of log2
    q_shift: torch.Tensor  # [B, H, Nq]: what the keys' mean adds to the LSE
    k: torch.Tensor  # [B, H, Nk * TILE, D] int8, rotated
    k_scale: torch.Tensor  # [B, H, Nk]
    k_mean: torch.Tensor  # [B, H, D], rotated


class Quantised(NamedTuple):
    """One attention call's operands; those of pooled keys are None without any."""

    q: torch.Tensor  # these five as of `QuantisedScores`
    q_scale: torch.Tensor
    q_shift: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor  # [B, H, Nk * D, 64] e4m3 or int8: tiles of 64 keys in `key_order`, transposed
    v_tile_scale: torch.Tensor | None  # [B, H, Nk, D / 64] of int8
    v_scale: torch.Tensor  # [B, H, D]
    v_mean: torch.Tensor  # [B, H, D]
    pooled_k: torch.Tensor | None  # [B, H, Np * TILE, D] int8, rotated
    pooled_k_scale: torch.Tensor | None  # [B, H, Np]
    pooled_v: torch.Tensor | None  # [B, H, Np * D, 64], as v
    pooled_v_tile_scale: torch.Tensor | None  # [B, H, Np, D / 64]


@cache
def rotation(D: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[D, D] of 1 and -1 whose rows are orthogonal, the same on every machine."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < D:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (D, 1), generator=generator) * 2 - 1
    return (matrix * signs).to(device, dtype)


def key_order() -> torch.Tensor:
    """[64] which key lies where in a tile of values, for the registers of tensor cores.

    A lane holds keys 2t, 2t + 1, 2t + 8 and 2t + 9 of sixteen as scores, and must hold 4t to
    4t + 3 as weights.
    """
    order = torch.arange(64).view(4, 2, 4, 2).transpose(1, 2)
    return order.reshape(-1)


@triton.jit
def _visible(key_bias, i_bh, H, o_l, L, HAS_BIAS: tl.constexpr):
    """Which keys there are and count for something."""
    m_l = o_l < L
    if HAS_BIAS:
        p_bias = key_bias + (i_bh // H).to(tl.int64) * L + o_l
        m_l = tl.load(p_bias, mask=m_l, other=float("-inf")) != float("-inf")
    return m_l


@triton.jit(
    do_not_specialize=[*STRIDES, "H", "L", "step"], do_not_specialize_on_alignment=["key_bias"]
)
def _sums_kernel(
    x, key_bias, out, stride_b, stride_h, stride_l, H, L, step,
    D: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Sum, minimum, maximum and number of every step-th tile of this program, per channel."""
    i_split, i_bh = tl.program_id(0), tl.program_id(1)
    # [PART, D]: added up over the rows only once, at the end
    b_sum = tl.zeros([PART, D], dtype=tl.float32)
    b_low = tl.full([PART, D], float("inf"), dtype=tl.float32)
    b_high = tl.full([PART, D], float("-inf"), dtype=tl.float32)
    b_count = tl.zeros([PART], dtype=tl.float32)
    for i in tl.range(i_split * step, tl.cdiv(L, TILE), SPLITS * step):
        for j in tl.static_range(TILE // PART):
            o_l = tl.arange(0, PART) + (i * TILE + j * PART)
            base = (i_bh // H).to(tl.int64) * stride_b + (i_bh % H).to(tl.int64) * stride_h
            p_x = x + (base + o_l.to(tl.int64) * stride_l)[:, None] * 8 + tl.arange(0, D)[None, :]
            m_l = _visible(key_bias, i_bh, H, o_l, L, HAS_BIAS)
            b_count += m_l.to(tl.float32)
            m_l = m_l[:, None]
            b_x = tl.load(p_x, mask=m_l, other=0.0).to(tl.float32)
            b_sum += b_x
            b_low = tl.minimum(b_low, tl.where(m_l, b_x, float("inf")))
            b_high = tl.maximum(b_high, tl.where(m_l, b_x, float("-inf")))
    p_out = out + (i_bh * SPLITS + i_split) * 4 * D + tl.arange(0, D)
    tl.store(p_out, tl.sum(b_sum, 0))
    tl.store(p_out + D, tl.min(b_low, 0))
    tl.store(p_out + 2 * D, tl.max(b_high, 0))
    tl.store(p_out + 3 * D, tl.full([D], tl.sum(b_count, 0), dtype=tl.float32))


@triton.jit
def _mean(p_sums, D: tl.constexpr):
    return tl.sum(tl.load(p_sums), 0) / tl.maximum(tl.sum(tl.load(p_sums + 3 * D), 0), 1.0)


@triton.jit
def _finish_kernel(
    k_sums, v_sums, matrix, k_mean, v_mean, v_scale,
    D: tl.constexpr, SPLITS: tl.constexpr, HAS_V: tl.constexpr,
):  # fmt: skip
    """The keys' mean, rotated; the values' mean and scales."""
    i_bh = tl.program_id(0)
    o_d = tl.arange(0, D)
    o_in = i_bh * SPLITS * 4 * D + tl.arange(0, SPLITS)[:, None] * 4 * D + o_d[None, :]
    b_mean = _mean(k_sums + o_in, D)
    b_matrix = tl.load(matrix + o_d[:, None] * D + o_d[None, :]).to(tl.float32)
    tl.store(k_mean + i_bh * D + o_d, tl.sum(b_mean[:, None] * b_matrix, 0))
    if HAS_V:
        b_mean = _mean(v_sums + o_in, D)
        b_low = tl.min(tl.load(v_sums + o_in + D), 0)
        b_high = tl.max(tl.load(v_sums + o_in + 2 * D), 0)
        # in steps that all the values share, so that what is left lies between two numbers of FP8
        # as it did, and ties go either way; a mean finer than that would come back without ever
        # having left
        b_top = tl.maximum(b_high, -b_low)
        b_step = (b_top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) / 128
        b_mean = tl.where(b_step > 0, tl.floor(b_mean / b_step + 0.5) * b_step, 0.0)
        b_range = tl.maximum(b_high - b_mean, b_mean - b_low)
        b_scale = tl.where(b_range > 0, b_range / LARGEST_FP8, 1.0)
        tl.store(v_mean + i_bh * D + o_d, b_mean)
        tl.store(v_scale + i_bh * D + o_d, b_scale)


@triton.jit
def to_fp8(b_x, dtype: tl.constexpr):
    """Float32 as FP8 (e4m3), rounded to the nearest."""
    if INTERPRETED:
        # the interpreter loses the carry, and makes 64 of 127
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) & -0x100000
        b_x = b_bits.to(tl.float32, bitcast=True)
    return b_x.to(dtype)


@triton.jit
def _largest(b_x):
    """Largest magnitude of a tile; NaN where it holds one, since integers have none to tell by."""
    # a maximum passes NaN over
    spoilt = tl.sum(tl.sum((b_x != b_x).to(tl.int32), 1), 0) > 0
    return tl.where(spoilt, float("nan"), tl.max(tl.abs(b_x)))


@triton.jit
def _in_steps(b_x, b_largest):
    """b_x in steps of which its largest magnitude has 127, and what one is worth."""
    b_x = b_x * tl.where(b_largest > 0, LARGEST_INT8 / b_largest, 0.0)
    return b_x, b_largest / LARGEST_INT8


@triton.jit
def _rounded(b_x):
    """b_x to the nearest integer, as int8."""
    return (b_x + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _to_int8(b_x, b_largest):
    """b_x as int8, its largest magnitude made 127, and what one step is worth."""
    b_x, b_step = _in_steps(b_x, b_largest)
    return _rounded(b_x), b_step


@triton.jit
def _to_int8_of_one_sum(b_x, b_largest):
    """`_to_int8` whose columns add up to what they did: weights that are alike see no error.

    A column's errors of rounding add up to some 2 steps of its 64 values. They are made to cancel by
    rounding not at halves but a little off, which moves the values that lie nearest to them.
    """
    b_x, b_step = _in_steps(b_x, b_largest)
    b_sum = tl.sum(b_x, 0)
    b_off = tl.zeros_like(b_sum)
    for i in tl.static_range(4):
        b_found = tl.sum((b_x + b_off[None, :] + ROUND) - ROUND, 0)
        b_off += tl.where(b_found < b_sum, 1.0, -1.0) / (16 << i)
    return _rounded(b_x + b_off[None, :]), b_step


@triton.jit(
    do_not_specialize=[*STRIDES, "H", "L", "num_rows"],
    do_not_specialize_on_alignment=["key_bias"],
)
def _rows_kernel(
    x, key_bias, matrix, k_mean, out, scale_out, shift_out,
    stride_b, stride_h, stride_l, H, L, num_rows, scale, shift_scale,
    D: tl.constexpr, TILE: tl.constexpr, TURNS: tl.constexpr, KEYS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Rotate and quantise TURNS tiles, keys less their mean."""
    i_bh = tl.program_id(1)
    o_d = tl.arange(0, D)
    b_matrix = tl.load(matrix + o_d[:, None] * D + o_d[None, :])
    b_mean = tl.load(k_mean + i_bh * D + o_d)
    row = i_bh.to(tl.int64) * num_rows
    first = tl.program_id(0) * TURNS
    for i_l in tl.range(first, first + TURNS):
        o_l = i_l * TILE + tl.arange(0, TILE)
        # [TILE, D]
        b_x = load_rows(
            x, i_bh // H, i_bh % H, i_l * TILE, stride_b, stride_h, stride_l, L, TILE, D, RAGGED=True
        )  # fmt: skip
        b_x = matmul(b_x, b_matrix, tl.zeros([TILE, D], dtype=tl.float32))
        p_out = out + (row + o_l)[:, None] * D + o_d[None, :]
        m_out = o_l < num_rows
        if KEYS:
            m_l = _visible(key_bias, i_bh, H, o_l, L, HAS_BIAS)
            b_x = tl.where(m_l[:, None], b_x - b_mean[None, :], 0.0)
            b_x, b_scale = _to_int8(b_x, _largest(b_x))
            p_scale = scale_out + i_bh * (num_rows // TILE) + i_l
            tl.store(p_scale, b_scale * scale, mask=i_l * TILE < num_rows)
        else:
            b_shift = tl.sum(b_x * b_mean[None, :], 1)
            b_largest = tl.max(tl.abs(b_x), 1)
            b_x, b_scale = _to_int8(b_x, b_largest[:, None])
            tl.store(shift_out + row + o_l, b_shift * shift_scale, mask=m_out)
            tl.store(scale_out + (row + o_l)[:, None], b_scale * scale, mask=m_out[:, None])
        tl.store(p_out, b_x, mask=m_out[:, None])


@triton.jit(
    do_not_specialize=[*STRIDES, "H", "L"], do_not_specialize_on_alignment=["key_bias"]
)  # fmt: skip
def _values_kernel(
    v, key_bias, v_mean, v_scale, out, scale_out, stride_b, stride_h, stride_l, H, L,
    D: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr, INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """COLS channels of a tile of 64 values, transposed and in `key_order`."""
    i_k, i_bh, i_half = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_d = i_half * COLS + tl.arange(0, COLS)
    o_t = tl.arange(0, TILE)
    # bits g g t t j b of a place are bits g g j t t b of its key
    o_key = (o_t & 0x31) | ((o_t & 2) << 2) | ((o_t & 0xC) >> 1)
    o_key += i_k * TILE
    base = (i_bh // H).to(tl.int64) * stride_b + (i_bh % H).to(tl.int64) * stride_h
    p_v = v + (base + o_key.to(tl.int64) * stride_l)[:, None] * 8 + o_d[None, :]
    m_l = _visible(key_bias, i_bh, H, o_key, L, HAS_BIAS)[:, None]
    b_v = tl.load(p_v, mask=m_l, other=0.0).to(tl.float32)
    b_mean = tl.load(v_mean + i_bh * D + o_d)
    b_scale = tl.load(v_scale + i_bh * D + o_d)
    b_v = tl.where(m_l, (b_v - b_mean[None, :]) / b_scale[None, :], 0.0)
    tile = i_bh.to(tl.int64) * tl.num_programs(0) + i_k
    if INT8:
        b_v, b_scale = _to_int8_of_one_sum(b_v, _largest(b_v))
        tl.store(scale_out + tile * (D // COLS) + i_half, b_scale)
    else:
        b_v = to_fp8(b_v, out.dtype.element_ty)
    tl.store(out + (tile * D + o_d)[:, None] * TILE + o_t[None, :], tl.trans(b_v))


def _sums(x, key_bias, step: int):
    """Partial sums of every step-th tile."""
    B, H, L, D = x.shape
    sums = torch.empty(B * H, SPLITS, 4, D, device=x.device, dtype=torch.float32)
    _sums_kernel[(SPLITS, B * H)](
        x, key_bias, sums, *launch.row_strides(x), H, L, step,
        D=D, TILE=TILE, PART=tiles.SUMS.tile_q, SPLITS=SPLITS, HAS_BIAS=key_bias is not None,
        **tiles.SUMS.options,
    )  # fmt: skip
    return sums


def _means(k, v, key_bias):
    """k_mean rotated, v_mean and v_scale [B, H, D] of tokens that count; v may be None."""
    B, H, L, D = k.shape
    k_mean = torch.empty((B, H, D), device=k.device)
    v_mean, v_scale = (None if v is None else torch.empty_like(k_mean) for _ in range(2))
    # a short sequence is read whole
    step = SAMPLED if triton.cdiv(L, TILE) >= 16 * SAMPLED else 1
    _finish_kernel[(B * H,)](
        _sums(k, key_bias, step), None if v is None else _sums(v, key_bias, 1),
        rotation(D, k.dtype, k.device), k_mean, v_mean, v_scale,
        D=D, SPLITS=SPLITS, HAS_V=v is not None, **tiles.MEANS.options,
    )  # fmt: skip
    return k_mean, v_mean, v_scale


def _quantise_rows(x, k_mean, *, keys: bool, key_bias=None, scale=1.0, shift_scale=1.0):
    """Rows of x [B, H, L, D] as int8, padded, and their scales; of queries their shifts too."""
    B, H, L, D = x.shape
    pad = TILE if keys else PAD
    num_rows = triton.cdiv(L, pad) * pad
    out = torch.empty((B, H, num_rows, D), device=x.device, dtype=torch.int8)
    scales = torch.empty((B, H, num_rows // TILE if keys else num_rows), device=x.device)
    shifts = None if keys else torch.empty_like(scales)
    _rows_kernel[(triton.cdiv(L if keys else num_rows, TILE * TURNS), B * H)](
        x, key_bias, rotation(D, x.dtype, x.device), k_mean, out, scales, shifts,
        *launch.row_strides(x), H, L, num_rows, scale, shift_scale,
        D=D, TILE=TILE, TURNS=TURNS, KEYS=keys, HAS_BIAS=key_bias is not None,
        **tiles.rotate(tiles.card_of(x.device), launch.TRITON).options,
    )  # fmt: skip
    return out, scales, shifts


def _quantise_values(v, v_mean, v_scale, dtype, key_bias=None):
    """Tiles of v [B, H, L, D], transposed, and of int8 their scales."""
    B, H, L, D = v.shape
    num_tiles, int8 = triton.cdiv(L, TILE), dtype == torch.int8
    out = torch.empty((B, H, num_tiles * D, TILE), device=v.device, dtype=dtype)
    halves = D // COLS
    scales = torch.empty((B, H, num_tiles, halves), device=v.device) if int8 else None
    _values_kernel[(num_tiles, B * H, halves)](
        v, key_bias, v_mean, v_scale, out, scales, *launch.row_strides(v), H, L,
        D=D, COLS=COLS, TILE=TILE, INT8=int8, HAS_BIAS=key_bias is not None, **tiles.VALUES.options,
    )  # fmt: skip
    return out, scales


def _quantise_qk(q, k, k_mean, scale, key_bias) -> QuantisedScores:
    D = q.shape[-1]
    # the rotation multiplies every product by D
    q, q_scale, q_shift = _quantise_rows(
        q, k_mean, keys=False, scale=scale * LOG2_E.value / D, shift_scale=scale / D
    )
    k, k_scale, _ = _quantise_rows(k, k_mean, keys=True, key_bias=key_bias)
    return QuantisedScores(q, q_scale, q_shift, k, k_scale, k_mean)


def quantise_qk(q, k, *, scale: float, key_bias=None) -> QuantisedScores:
    """Quantise aligned queries and keys [B, H, L, D].

    Args:
        scale: factor of the scores.
        key_bias: contiguous [B, Lk] float32, or None; keys whose bias is -inf become zeros.
    """
    return _quantise_qk(q, k, _means(k, None, key_bias)[0], scale, key_bias)


def quantise(
    q, k, v, *, scale: float, values: torch.dtype, key_bias=None, pooled: Pooled | None = None
) -> Quantised:
    """Quantise aligned [B, H, L, D] tensors.

    Args:
        scale: factor of the scores.
        values: float8_e4m3fn or int8.
        key_bias: contiguous [B, Lk] float32, or None; keys whose bias is -inf become zeros.
        pooled: contiguous, or None; keys of log size -inf become zeros.
    """
    k_mean, v_mean, v_scale = _means(k, v, key_bias)
    scores = _quantise_qk(q, k, k_mean, scale, key_bias)
    v8 = _quantise_values(v, v_mean, v_scale, values, key_bias)
    pooled_k = pooled_k_scale = None
    pooled_v8 = None, None
    if pooled is not None:
        sizes = pooled.log_sizes
        pooled_k, pooled_k_scale, _ = _quantise_rows(
            pooled.k_mean, k_mean, keys=True, key_bias=sizes
        )
        pooled_v8 = _quantise_values(pooled.v_mean, v_mean, v_scale, values, sizes)
    return Quantised(
        *scores[:5], *v8, v_scale, v_mean, pooled_k, pooled_k_scale, *pooled_v8
    )  # fmt: skip
