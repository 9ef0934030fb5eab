"""Block masses for Hopper in Gluon: consumer warpgroups of 64 query rows share one stream of keys.
While the tensor cores form the scores of one tile, a consumer exponentiates and adds up those of the
tile before.

Shapes and helpers as in hopper_attention; the ring carries pairs of key tiles only. Queries and keys
may be INT8, as `quantise` leaves them.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from ..triton.softmax import LOG2_E
from .pipeline import (
    STRIP,
    TILE,
    add_bias,
    bias_tiles,
    load_pair,
    load_queries,
    source,
    start_scores,
    store_masses,
    wait_for,
)

# [warp, row, tile] as the threads of a warpgroup hold the rows of a score tile
STRIP_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 1, 2], [1, 8, 4], [4, 1, 1], [2, 1, 0]))
SIZES = ["H", "Lq", "Lk", "Nq", "Nk", "num_rows"]


@gluon.jit
def _produce(
    q_desc, k_desc, q_tiles, ring, q_ready, ready, free, num_pairs, i_b, i_h, first_q,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    load_queries(q_desc, q_tiles, q_ready, i_b, i_h, first_q, CONSUMERS)
    for n in range(num_pairs):
        first = 2 * n * TILE
        load_pair(k_desc, ring, ready, free, n, i_b, i_h, first, first + TILE, STAGES)


@gluon.jit
def _load_scales(p_scale, n, Nk, INT8: gl.constexpr):
    """The scales of both tiles of a pair."""
    if INT8:
        scale0 = gl.load(p_scale + 2 * n, mask=2 * n < Nk, other=0.0)
        scale1 = gl.load(p_scale + 2 * n + 1, mask=2 * n + 1 < Nk, other=0.0)
    else:
        scale0 = 1.0
        scale1 = 1.0
    return scale0, scale1


@gluon.jit
def _factor(b_scale, scale, INT8: gl.constexpr, POSITIVE: gl.constexpr):
    """What makes the scores of a tile units of log2."""
    if INT8:
        b_factor = b_scale * scale
        if POSITIVE:
            b_factor = gl.maximum(b_factor, 1e-30, propagate_nan=tl.PropagateNan.ALL)
        b_factor = b_factor[:, None]
    else:
        b_factor = b_scale
    return b_factor


@gluon.jit
def _put_weights(b_strip, o_t, t, b_s, b_lse, b_factor):
    """Exponentiate the scores of tile t and note their sums."""
    b_p = gl.exp2(gl.fma(b_s, b_factor, -b_lse[:, None]))
    # rows first: the two of a thread become one before threads exchange anything
    b_rows = gl.sum(gl.sum(b_p.reshape([4, 2, 8, TILE]), 1), 2)
    b_rows = gl.convert_layout(b_rows, gl.SliceLayout(2, STRIP_LAYOUT))
    return gl.where((o_t == t % STRIP)[None, None, :], b_rows[:, :, None], b_strip)


@gluon.jit
def _put_tile(
    b_strip, o_t, t, b_s, b_lse, b_factor, p_bias, p_flags, o_k, Lk, HAS_BIAS: gl.constexpr
):  # fmt: skip
    """The same for a tile within Lk whose keys may have a bias."""
    b_s = b_s.to(gl.float32)
    if HAS_BIAS:  # noqa: SIM102  one is known to the compiler
        if gl.load(p_flags + t):
            b_s = add_bias(b_s, p_bias, t * TILE, o_k, Lk, b_factor)
    return _put_weights(b_strip, o_t, t, b_s, b_lse, b_factor)


@gluon.jit
def _put_last(
    b_strip, o_t, t, b_s, b_lse, b_factor, p_bias, o_k, Lk, HAS_BIAS: gl.constexpr
):  # fmt: skip
    """The same for a tile that may run past Lk."""
    b_s = b_s.to(gl.float32)
    if HAS_BIAS:
        b_s = add_bias(b_s, p_bias, t * TILE, o_k, Lk, b_factor)
    else:
        b_s = gl.where((t * TILE + o_k < Lk)[None, :], b_s, float("-inf"))
    return _put_weights(b_strip, o_t, t, b_s, b_lse, b_factor)


@gluon.jit
def _consume(
    q_tiles, ring, q_ready, ready, free, num_pairs, Lq, Lk, H, i_b, i_h, first_q,
    lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, num_rows, masses, Nk, scale_log2,
    CONSUMER: gl.constexpr, D: gl.constexpr, HAS_BIAS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    INT8: gl.constexpr = q_tiles.dtype == gl.int8
    BYTES: gl.constexpr = q_tiles.dtype.primitive_bitwidth // 8
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32 // BYTES])
    S_OPERAND: gl.constexpr = gl.DotOperandLayout(0, S, 4 // BYTES)

    first_q += CONSUMER * TILE
    i_bh = i_b.to(gl.int64) * H + i_h
    o_q = first_q + gl.arange(0, TILE, layout=gl.SliceLayout(1, S))
    o_k = gl.arange(0, TILE, layout=gl.SliceLayout(0, S))
    p_masses = masses + (i_bh * gl.cdiv(Lq, TILE) + first_q // TILE) * Nk
    # rows past Lq and rows without a key have no mass
    b_lse = gl.load(lse + i_bh * Lq + o_q, mask=o_q < Lq, other=float("inf"))
    b_scale = scale_log2
    p_scale = lse  # not read
    if INT8:
        row = i_bh * num_rows + o_q
        b_lse -= gl.load(q_shift + row, mask=o_q < Lq, other=0.0)
        b_scale = gl.load(q_scale + row, mask=o_q < Lq, other=0.0)
        p_scale = k_scale + i_bh * Nk
    b_lse = gl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2_E
    end = gl.where(first_q < Lq, Nk, 0)
    p_bias = lse  # not read
    p_flags = lse
    if HAS_BIAS:
        p_bias = key_bias + i_b.to(gl.int64) * Lk
        p_flags = bias_tiles + i_b.to(gl.int64) * Nk
    o_t = gl.arange(0, STRIP, layout=gl.SliceLayout(0, gl.SliceLayout(1, STRIP_LAYOUT)))
    b_strip = gl.zeros([4, 8, STRIP], gl.float32, STRIP_LAYOUT)

    mbarrier.wait(q_ready.index(CONSUMER), 0)
    # [64, D]
    b_q = q_tiles.index(CONSUMER).reshape([TILE, D]).load(S_OPERAND)
    wait_for(ready, 0, STAGES)
    b_s = start_scores(b_q, ring.index(0), D, S)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    scale0, scale1 = _load_scales(p_scale, 0, Nk, INT8)
    last = num_pairs - 1
    for n in range(0, last):
        b_factor0 = _factor(b_scale, scale0, INT8, HAS_BIAS)
        b_factor1 = _factor(b_scale, scale1, INT8, HAS_BIAS)
        scale0, scale1 = _load_scales(p_scale, n + 1, Nk, INT8)
        b_t = start_scores(b_q, ring.index(2 * (n % STAGES) + 1), D, S)
        b_strip = _put_tile(
            b_strip, o_t, 2 * n, b_s, b_lse, b_factor0, p_bias, p_flags, o_k, Lk, HAS_BIAS
        )  # fmt: skip
        # as in attention, the branch of a wait keeps the exponentials above the next line
        wait_for(ready, n + 1, STAGES)
        b_t = warpgroup_mma_wait(0, deps=(b_t,))
        mbarrier.arrive(free.index(n % STAGES))
        b_s = start_scores(b_q, ring.index(2 * ((n + 1) % STAGES)), D, S)
        b_strip = _put_tile(
            b_strip, o_t, 2 * n + 1, b_t, b_lse, b_factor1, p_bias, p_flags, o_k, Lk, HAS_BIAS
        )  # fmt: skip
        if (2 * n + 2) % STRIP == 0:
            b_mass = gl.sum(b_strip.reshape([32, STRIP]), 0)
            store_masses(p_masses, b_mass, 2 * n + 2 - STRIP, 0, end)
        wait_for(ready, n + 1, STAGES)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))

    # only the last pair can hold keys past Lk
    b_factor0 = _factor(b_scale, scale0, INT8, True)
    b_factor1 = _factor(b_scale, scale1, INT8, True)
    b_t = start_scores(b_q, ring.index(2 * (last % STAGES) + 1), D, S)
    b_strip = _put_last(
        b_strip, o_t, 2 * last, b_s, b_lse, b_factor0, p_bias, o_k, Lk, HAS_BIAS
    )  # fmt: skip
    b_t = warpgroup_mma_wait(0, deps=(b_t,))
    b_strip = _put_last(
        b_strip, o_t, 2 * last + 1, b_t, b_lse, b_factor1, p_bias, o_k, Lk, HAS_BIAS
    )  # fmt: skip
    b_mass = gl.sum(b_strip.reshape([32, STRIP]), 0)
    store_masses(p_masses, b_mass, 2 * last // STRIP * STRIP, 0, end)


@gluon.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        "lse", "key_bias", "bias_tiles", "q_scale", "q_shift", "k_scale", "masses",
    ],
)  # fmt: skip
def hopper_block_masses_kernel(
    q_desc, k_desc, lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, masses,
    H, Lq, Lk, Nq, Nk, num_rows,
    scale_log2,
    D: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    i_bh = pid // Nq
    i_b = i_bh // H
    i_h = i_bh % H
    first_q = pid % Nq * (CONSUMERS * TILE)
    num_pairs = gl.cdiv(Lk, 2 * TILE)

    dtype: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, TILE, D], q_desc.layout)
    ring = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, 1, TILE, D], k_desc.layout)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BAR)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)

    # the first takes what registers are left over: the producer, so that no consumer is short
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consume, (
                    q_tiles, ring, q_ready, ready, free, num_pairs, Lq, Lk, H, i_b, i_h, first_q,
                    lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, num_rows, masses, Nk,
                    scale_log2, 0, D, HAS_BIAS, STAGES,
                )),
                (_consume, (
                    q_tiles, ring, q_ready, ready, free, num_pairs, Lq, Lk, H, i_b, i_h, first_q,
                    lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, num_rows, masses, Nk,
                    scale_log2, 1, D, HAS_BIAS, STAGES,
                )),
                (_consume, (
                    q_tiles, ring, q_ready, ready, free, num_pairs, Lq, Lk, H, i_b, i_h, first_q,
                    lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, num_rows, masses, Nk,
                    scale_log2, 2, D, HAS_BIAS, STAGES,
                )),
                (_produce, (
                    q_desc, k_desc, q_tiles, ring, q_ready, ready, free, num_pairs, i_b, i_h,
                    first_q, CONSUMERS, STAGES,
                )),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    q_tiles, ring, q_ready, ready, free, num_pairs, Lq, Lk, H, i_b, i_h, first_q,
                    lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, num_rows, masses, Nk,
                    scale_log2, 0, D, HAS_BIAS, STAGES,
                )),
                (_consume, (
                    q_tiles, ring, q_ready, ready, free, num_pairs, Lq, Lk, H, i_b, i_h, first_q,
                    lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, num_rows, masses, Nk,
                    scale_log2, 1, D, HAS_BIAS, STAGES,
                )),
                (_consume, (
                    q_tiles, ring, q_ready, ready, free, num_pairs, Lq, Lk, H, i_b, i_h, first_q,
                    lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, num_rows, masses, Nk,
                    scale_log2, 2, D, HAS_BIAS, STAGES,
                )),
                (_consume, (
                    q_tiles, ring, q_ready, ready, free, num_pairs, Lq, Lk, H, i_b, i_h, first_q,
                    lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, num_rows, masses, Nk,
                    scale_log2, 3, D, HAS_BIAS, STAGES,
                )),
                (_produce, (
                    q_desc, k_desc, q_tiles, ring, q_ready, ready, free, num_pairs, i_b, i_h,
                    first_q, CONSUMERS, STAGES,
                )),
            ],
            [4, 4, 4, 1],
            [112, 112, 112, 24],
        )  # fmt: skip


def launch(q, k, lse, masses, Lk, *, scale, scales, tile, key_bias=None):
    """Fill masses [B, H, ceil(Lq / 64), ceil(Lk / 64)].

    Args:
        q, k: aligned [B, H, L, D], or int8 as in `quantise.Quantised`; `Lk` of the keys count.
        scales: its q_scale, q_shift and k_scale, or None three times.
    """
    B, H, Lq = lse.shape
    Nq = triton.cdiv(Lq, tile.tile_q)
    hopper_block_masses_kernel[(B * H * Nq,)](
        source(q), source(k), lse, key_bias, bias_tiles(key_bias), *scales, masses,
        H, Lq, Lk, Nq, masses.shape[-1], q.shape[2],
        scale * LOG2_E.value,
        D=q.shape[-1],
        HAS_BIAS=key_bias is not None,
        CONSUMERS=tile.tile_q // TILE.value,
        STAGES=tile.num_stages,
        num_warps=4,
    )  # fmt: skip
