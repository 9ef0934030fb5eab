"""Block masses for Hopper in Gluon: the tensor cores form the scores of one pair of key tiles
while a consumer warpgroup exponentiates and adds up those of the pair before.

Shapes and helpers as in hopper_attention; the ring carries keys only. Two consumers of 64 query
rows share the stream, so each yields one row of 64 x 64 blocks.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from .hopper_attention import (
    STRIP,
    TILE,
    _load_pair,
    _start_scores,
    _tma_load,
    load_bias,
    put_masses,
    source,
    store_masses,
)
from .tile_ops import LOG2_E

SIZES = ["H", "Lq", "Lk", "Nq", "Nk"]


@gluon.jit
def _produce(
    q_desc, k_desc, q_tiles, ring, q_ready, ready, free, num_pairs, i_b, i_h, first_q,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for i in gl.static_range(CONSUMERS):
        bar = q_ready.index(i)
        mbarrier.expect(bar, q_desc.block_type.nbytes)
        _tma_load(q_desc, [i_b, i_h, first_q + i * TILE, 0], bar, q_tiles.index(i))
    for n in range(num_pairs):
        first = 2 * n * TILE
        _load_pair(k_desc, ring, ready, free, n, i_b, i_h, first, first + TILE, STAGES)


@gluon.jit
def _put_pair(
    b_strip, o_t, t, b_s0, b_s1, b_lse, scale_log2, p_bias, o_k, Lk,
    HAS_BIAS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Exponentiate the scores of tiles t and t + 1 and note their row sums in the strip."""
    if HAS_BIAS:
        b_s0 = gl.fma(b_s0, scale_log2, load_bias(p_bias, t * TILE, o_k, Lk)[None, :])
        b_s1 = gl.fma(b_s1, scale_log2, load_bias(p_bias, (t + 1) * TILE, o_k, Lk)[None, :])
        scale_log2 = 1.0
    b_p0 = gl.exp2(gl.fma(b_s0, scale_log2, -b_lse[:, None]))
    b_p1 = gl.exp2(gl.fma(b_s1, scale_log2, -b_lse[:, None]))
    b_sum0 = gl.convert_layout(gl.sum(b_p0, 1), ROWS)
    b_sum1 = gl.convert_layout(gl.sum(b_p1, 1), ROWS)
    return put_masses(b_strip, o_t, t, b_sum0, b_sum1)


@gluon.jit
def _finish_scores(b_s0, b_s1, ready, free, n, num_pairs, STAGES: gl.constexpr):
    """Scores of pair n, once they are there; its keys may go."""
    # as in attention, the branch of a wait keeps the exponentials above the next line
    mbarrier.wait(ready.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=n + 1 < num_pairs)
    b_s0, b_s1 = warpgroup_mma_wait(0, deps=(b_s0, b_s1))
    mbarrier.arrive(free.index(n % STAGES))
    return b_s0, b_s1


@gluon.jit
def _consume(
    q_tiles, ring, q_ready, ready, free, num_pairs, Lq, Lk, H, i_b, i_h, first_q,
    lse, key_bias, masses, Nk, scale_log2,
    CONSUMER: gl.constexpr, D: gl.constexpr, HAS_BIAS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    S_OPERAND: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    STRIP_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STRIP, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, STRIP_LAYOUT)

    first_q += CONSUMER * TILE
    i_bh = i_b.to(gl.int64) * H + i_h
    o_q = first_q + gl.arange(0, TILE, layout=gl.SliceLayout(1, S))
    p_masses = masses + (i_bh * gl.cdiv(Lq, TILE) + first_q // TILE) * Nk
    # rows past Lq and rows without a key have no mass
    b_lse = gl.load(lse + i_bh * Lq + o_q, mask=o_q < Lq, other=float("inf"))
    b_lse = gl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2_E
    end = gl.where(first_q < Lq, Nk, 0)
    o_k = gl.arange(0, TILE, layout=gl.SliceLayout(0, S))
    p_bias = lse  # not read
    if HAS_BIAS:
        p_bias = key_bias + i_b.to(gl.int64) * Lk
    # [64, STRIP]
    o_t = gl.arange(0, STRIP, layout=gl.SliceLayout(0, STRIP_LAYOUT))
    b_strip = gl.zeros([TILE, STRIP], gl.float32, STRIP_LAYOUT)

    mbarrier.wait(q_ready.index(CONSUMER), 0)
    # [64, D]
    b_q = q_tiles.index(CONSUMER).reshape([TILE, D]).load(S_OPERAND)
    mbarrier.wait(ready.index(0), 0)
    b_s0, b_s1 = _start_scores(b_q, ring, 0, D, STAGES, S)
    b_s0, b_s1 = _finish_scores(b_s0, b_s1, ready, free, 0, num_pairs, STAGES)

    # two pairs a turn, so that scores change names instead of registers
    paired = (num_pairs - 1) // 2 * 2
    for n in range(0, paired, 2):
        b_t0, b_t1 = _start_scores(b_q, ring, n + 1, D, STAGES, S)
        b_strip = _put_pair(
            b_strip, o_t, 2 * n, b_s0, b_s1, b_lse, scale_log2, p_bias, o_k, Lk, HAS_BIAS, ROWS
        )  # fmt: skip
        b_t0, b_t1 = _finish_scores(b_t0, b_t1, ready, free, n + 1, num_pairs, STAGES)
        b_s0, b_s1 = _start_scores(b_q, ring, n + 2, D, STAGES, S)
        b_strip = _put_pair(
            b_strip, o_t, 2 * n + 2, b_t0, b_t1, b_lse, scale_log2, p_bias, o_k, Lk,
            HAS_BIAS, ROWS,
        )  # fmt: skip
        if (2 * n + 4) % STRIP == 0:
            store_masses(p_masses, b_strip, o_t, 2 * n + 4 - STRIP, end)
        b_s0, b_s1 = _finish_scores(b_s0, b_s1, ready, free, n + 2, num_pairs, STAGES)
    # at most one turn
    for n in range(paired, num_pairs - 1):
        b_t0, b_t1 = _start_scores(b_q, ring, n + 1, D, STAGES, S)
        b_strip = _put_pair(
            b_strip, o_t, 2 * n, b_s0, b_s1, b_lse, scale_log2, p_bias, o_k, Lk, HAS_BIAS, ROWS
        )  # fmt: skip
        b_s0, b_s1 = _finish_scores(b_t0, b_t1, ready, free, n + 1, num_pairs, STAGES)

    # only the last pair can hold keys past Lk
    last = 2 * (num_pairs - 1)
    b_s0 = gl.where((last * TILE + o_k < Lk)[None, :], b_s0, float("-inf"))
    b_s1 = gl.where((last * TILE + TILE + o_k < Lk)[None, :], b_s1, float("-inf"))
    b_strip = _put_pair(
        b_strip, o_t, last, b_s0, b_s1, b_lse, scale_log2, p_bias, o_k, Lk, HAS_BIAS, ROWS
    )  # fmt: skip
    store_masses(p_masses, b_strip, o_t, last // STRIP * STRIP, end)


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["lse", "key_bias", "masses"])
def hopper_block_masses_kernel(
    q_desc, k_desc, lse, key_bias, masses,
    H, Lq, Lk, Nq, Nk,
    scale_log2,
    D: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    i_bh = pid // Nq
    i_b = i_bh // H
    i_h = i_bh % H
    first_q = pid % Nq * (2 * TILE)
    num_pairs = gl.cdiv(Nk, 2)

    dtype: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, TILE, D], q_desc.layout)
    ring = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, 1, TILE, D], k_desc.layout)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)

    gl.warp_specialize(
        [
            (_consume, (
                q_tiles, ring, q_ready, ready, free, num_pairs, Lq, Lk, H, i_b, i_h, first_q,
                lse, key_bias, masses, Nk, scale_log2, 0, D, HAS_BIAS, STAGES,
            )),
            (_consume, (
                q_tiles, ring, q_ready, ready, free, num_pairs, Lq, Lk, H, i_b, i_h, first_q,
                lse, key_bias, masses, Nk, scale_log2, 1, D, HAS_BIAS, STAGES,
            )),
            (_produce, (
                q_desc, k_desc, q_tiles, ring, q_ready, ready, free, num_pairs, i_b, i_h,
                first_q, 2, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch(q, k, lse, masses, *, scale, tile, key_bias=None):
    """Fill masses [B, H, ceil(Lq / 64), ceil(Lk / 64)]; q and k aligned [B, H, L, D]."""
    B, H, Lq, D = q.shape
    Nq = triton.cdiv(Lq, 2 * TILE.value)
    hopper_block_masses_kernel[(B * H * Nq,)](
        source(q), source(k), lse, key_bias, masses,
        H, Lq, k.shape[2], Nq, masses.shape[-1],
        float(scale) * LOG2_E.value,
        D=D,
        HAS_BIAS=key_bias is not None,
        STAGES=tile.num_stages,
        num_warps=4,
    )  # fmt: skip
