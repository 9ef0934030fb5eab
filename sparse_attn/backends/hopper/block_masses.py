"""Block masses for Hopper in Gluon: consumer warpgroups of 64 query rows share one stream of keys.

While the tensor cores form the scores of one tile, a consumer exponentiates and adds up those of the
tile before. The ring carries pairs of key tiles, in order. Queries and keys may be INT8, as
`quantise_qk` leaves them.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from .. import tiles
from ..triton import launch
from ..triton.block_masses import MassOperands
from ..triton.mass_granularity import empty_masses, measured_rows, to_granularity
from ..triton.softmax import LOG2_E
from .pipeline import (
    MAX_MASS,
    STRIP,
    TILE,
    add_bias,
    aggregate,
    bias_flags,
    make_queries,
    make_ring,
    make_work,
    source,
    start_scores,
    store_masses,
)

# [warp, row, tile] as the threads of a warpgroup hold the rows of a score tile
STRIP_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 1, 2], [1, 8, 4], [4, 1, 1], [2, 1, 0]))
SIZES = ["H", "Lq", "Lk", "Nq", "num_rows"]


@aggregate
class Tensors:
    """What a consumer reads and writes beside the tiles; pointers that a call lacks are None."""

    lse: gl.tensor
    key_bias: gl.tensor | gl.constexpr
    bias_flags: gl.tensor | gl.constexpr
    q_scale: gl.tensor | gl.constexpr
    q_shift: gl.tensor | gl.constexpr
    k_scale: gl.tensor | gl.constexpr
    masses: gl.tensor
    Lq: gl.tensor
    num_rows: gl.tensor
    scale_log2: gl.tensor


@gluon.jit
def _produce(q_desc, k_desc, queries, ring, work):
    queries.load(q_desc, work)
    for n in range(work.num_pairs):
        first = 2 * n * TILE
        ring.load(k_desc, n, work, first, first + TILE)


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
def _store(p_masses, b_strip, first, end, num_small, Nk, BLOCK_Q: gl.constexpr):
    """Store the sums of a strip of tiles, of all rows or of each warp's sixteen."""
    if BLOCK_Q == TILE:
        store_masses(p_masses, gl.sum(b_strip.reshape([32, STRIP]), 0), first, 0, end)
    else:
        b_mass = gl.sum(b_strip, 1)
        b_mass = gl.where(b_mass > MAX_MASS, MAX_MASS, b_mass)
        o_q = gl.arange(0, 4, layout=gl.SliceLayout(1, b_mass.type.layout))
        o_t = first + gl.arange(0, STRIP, layout=gl.SliceLayout(0, b_mass.type.layout))
        p_out = p_masses + o_q[:, None] * Nk + o_t[None, :]
        gl.store(p_out, b_mass, mask=(o_q < num_small)[:, None] & (o_t < end)[None, :])


@gluon.jit
def _consume(
    queries, ring, work, x, CONSUMER: gl.constexpr, D: gl.constexpr, BLOCK_Q: gl.constexpr
):  # fmt: skip
    INT8: gl.constexpr = x.q_scale is not None
    HAS_BIAS: gl.constexpr = x.key_bias is not None
    BYTES: gl.constexpr = queries.tiles.dtype.primitive_bitwidth // 8
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32 // BYTES])
    S_OPERAND: gl.constexpr = gl.DotOperandLayout(0, S, 4 // BYTES)

    first_q = work.first_q + CONSUMER * TILE
    i_bh = work.i_bh.to(gl.int64)
    Lk = work.Lk
    Nk = gl.cdiv(Lk, TILE)
    o_q = first_q + gl.arange(0, TILE, layout=gl.SliceLayout(1, S))
    o_k = gl.arange(0, TILE, layout=gl.SliceLayout(0, S))
    num_q = gl.cdiv(x.Lq, BLOCK_Q)
    p_masses = x.masses + (i_bh * num_q + first_q // BLOCK_Q) * Nk
    num_small = num_q - first_q // BLOCK_Q
    # rows past Lq and rows without a key have no mass
    b_lse = gl.load(x.lse + i_bh * x.Lq + o_q, mask=o_q < x.Lq, other=float("inf"))
    b_scale = x.scale_log2
    p_scale = x.lse  # not read
    if INT8:
        row = i_bh * x.num_rows + o_q
        b_lse -= gl.load(x.q_shift + row, mask=o_q < x.Lq, other=0.0)
        b_scale = gl.load(x.q_scale + row, mask=o_q < x.Lq, other=0.0)
        p_scale = x.k_scale + i_bh * Nk
    b_lse = gl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2_E
    end = gl.where(first_q < x.Lq, Nk, 0)
    p_bias = x.lse  # not read
    p_flags = x.lse
    if HAS_BIAS:
        p_bias = x.key_bias + work.i_b.to(gl.int64) * Lk
        p_flags = x.bias_flags + work.i_b.to(gl.int64) * Nk
    o_t = gl.arange(0, STRIP, layout=gl.SliceLayout(0, gl.SliceLayout(1, STRIP_LAYOUT)))
    b_strip = gl.zeros([4, 8, STRIP], gl.float32, STRIP_LAYOUT)

    # [64, D]
    b_q = queries.wait(CONSUMER, D).load(S_OPERAND)
    ring.wait(0)
    b_s = start_scores(b_q, ring.tile(0, 0, TILE, D), S)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    scale0, scale1 = _load_scales(p_scale, 0, Nk, INT8)
    last = work.num_pairs - 1
    for n in range(0, last):
        b_factor0 = _factor(b_scale, scale0, INT8, HAS_BIAS)
        b_factor1 = _factor(b_scale, scale1, INT8, HAS_BIAS)
        scale0, scale1 = _load_scales(p_scale, n + 1, Nk, INT8)
        b_t = start_scores(b_q, ring.tile(n, 1, TILE, D), S)
        b_strip = _put_tile(
            b_strip, o_t, 2 * n, b_s, b_lse, b_factor0, p_bias, p_flags, o_k, Lk, HAS_BIAS
        )  # fmt: skip
        # as in attention, the branch of a wait keeps the exponentials above the next line
        ring.wait(n + 1)
        b_t = warpgroup_mma_wait(0, deps=(b_t,))
        ring.release(n)
        b_s = start_scores(b_q, ring.tile(n + 1, 0, TILE, D), S)
        b_strip = _put_tile(
            b_strip, o_t, 2 * n + 1, b_t, b_lse, b_factor1, p_bias, p_flags, o_k, Lk, HAS_BIAS
        )  # fmt: skip
        if (2 * n + 2) % STRIP == 0:
            _store(p_masses, b_strip, 2 * n + 2 - STRIP, end, num_small, Nk, BLOCK_Q)
        ring.wait(n + 1)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))

    # only the last pair can hold keys past Lk
    b_factor0 = _factor(b_scale, scale0, INT8, True)
    b_factor1 = _factor(b_scale, scale1, INT8, True)
    b_t = start_scores(b_q, ring.tile(last, 1, TILE, D), S)
    b_strip = _put_last(
        b_strip, o_t, 2 * last, b_s, b_lse, b_factor0, p_bias, o_k, Lk, HAS_BIAS
    )  # fmt: skip
    b_t = warpgroup_mma_wait(0, deps=(b_t,))
    b_strip = _put_last(
        b_strip, o_t, 2 * last + 1, b_t, b_lse, b_factor1, p_bias, o_k, Lk, HAS_BIAS
    )  # fmt: skip
    _store(p_masses, b_strip, 2 * last // STRIP * STRIP, end, num_small, Nk, BLOCK_Q)


@gluon.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        "lse", "key_bias", "bias_flags", "q_scale", "q_shift", "k_scale", "masses",
    ],
)  # fmt: skip
def hopper_block_masses_kernel(
    q_desc, k_desc, lse, key_bias, bias_flags, q_scale, q_shift, k_scale, masses,
    H, Lq, Lk, Nq, num_rows,
    scale_log2,
    D: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    work = make_work(Nq, H, Lk, None, None, 0, CONSUMERS * TILE, TILE)
    queries = make_queries(q_desc, D, CONSUMERS)
    ring = make_ring(k_desc, TILE, D, CONSUMERS, STAGES)
    x = Tensors(
        lse, key_bias, bias_flags, q_scale, q_shift, k_scale, masses, Lq, num_rows, scale_log2
    )  # fmt: skip
    # the first takes what registers are left over: the producer, so that no consumer is short
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consume, (queries, ring, work, x, 0, D, BLOCK_Q)),
                (_consume, (queries, ring, work, x, 1, D, BLOCK_Q)),
                (_consume, (queries, ring, work, x, 2, D, BLOCK_Q)),
                (_produce, (q_desc, k_desc, queries, ring, work)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (queries, ring, work, x, 0, D, BLOCK_Q)),
                (_consume, (queries, ring, work, x, 1, D, BLOCK_Q)),
                (_consume, (queries, ring, work, x, 2, D, BLOCK_Q)),
                (_consume, (queries, ring, work, x, 3, D, BLOCK_Q)),
                (_produce, (q_desc, k_desc, queries, ring, work)),
            ],
            [4, 4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


def block_masses(
    q, k, lse, *, block_q, block_k, scale, key_bias=None, renormalise=True, int8=False
) -> torch.Tensor:
    """As `triton.block_masses.block_masses`."""
    found, wanted = (measured_rows(block_q), TILE.value), (block_q, block_k)
    masses = empty_masses(q, k, *found)
    tile = tiles.hopper_block_masses(int8, key_bias is not None)
    if masses.numel():
        with launch.on_device(q):
            x = MassOperands.of(q, k, lse, scale, key_bias, int8)
            B, H, Lq, Lk, D = x.sizes
            Nq = triton.cdiv(Lq, tile.tile_q)
            hopper_block_masses_kernel[(B * H * Nq,)](
                source(x.q), source(x.k), x.lse, x.key_bias, bias_flags(x.key_bias),
                x.q_scale, x.q_shift, x.k_scale, masses,
                H, Lq, Lk, Nq, x.q.shape[2],
                x.scale * LOG2_E.value,
                D=D,
                BLOCK_Q=found[0],
                **tile.options,
            )  # fmt: skip
    return to_granularity(masses, q.shape[2], found, wanted, renormalise)
