"""Attention for Hopper in Gluon, sparse or dense: one page of the FlashAttention-3 recipe.

One ring of shared memory carries keys of pair n + 1, then values of pair n. A consumer warpgroup
keeps its 64 query rows in registers; while the tensor cores form P V of one pair, it exponentiates
the scores of the next. With 128-row query blocks two consumers share the stream; with 64-row ones a
program has one, and two programs share a multiprocessor.

The means of a pooled tail weigh as much as a whole block each, but for the last, whose block may be
short, and for tiles where some block has a bias; the row of the mask masks the means of the blocks that
it lists.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .. import tiles
from ..triton import launch
from ..triton.mass_granularity import empty_masses, to_granularity
from ..triton.operands import Operands, operands_of
from ..triton.softmax import LN_2, LOG2_E
from .pipeline import (
    STRIP,
    TILE,
    add_bias,
    aggregate,
    bias_flags,
    is_biased,
    is_listed,
    load_words,
    log2_block,
    make_queries,
    make_ring,
    make_work,
    mask_words,
    source,
    start_scores,
    store_masses,
    store_output,
    uneven_flags,
)

# a row whose LSE fell by more than this (in log2) must not swamp its block row
MAX_DRIFT = gl.constexpr(16.0)

SIZES = ["H", "Lq", "Lk", "Nq", "num_pooled", "stride_ob", "stride_oh"]


@aggregate
class Tensors:
    """What a consumer reads and writes beside the tiles; pointers that a call lacks are None."""

    key_bias: gl.tensor | gl.constexpr
    bias_flags: gl.tensor | gl.constexpr
    log_sizes: gl.tensor | gl.constexpr
    uneven_flags: gl.tensor | gl.constexpr
    words: gl.tensor | gl.constexpr
    order: gl.tensor | gl.constexpr
    previous_lse: gl.tensor | gl.constexpr
    out: gl.tensor
    lse: gl.tensor
    masses: gl.tensor | gl.constexpr
    H: gl.tensor
    Lq: gl.tensor
    Nq: gl.tensor
    num_pooled: gl.tensor
    stride_ob: gl.tensor
    stride_oh: gl.tensor
    scale_log2: gl.tensor


@gluon.jit
def _produce(q_desc, k_desc, v_desc, k_mean_desc, v_mean_desc, queries, ring, work):
    queries.load(q_desc, work)
    pairs = work.num_pairs
    v0, v1 = work.pair(pairs - 1)
    ring.load(k_desc, 0, work, v0, v1)
    for n in range(1, pairs):
        k0, k1 = work.pair(n - 1)
        ring.load(k_desc, 2 * n - 1, work, k0, k1)
        ring.load(v_desc, 2 * n, work, v0, v1)
        v0 = k0
        v1 = k1
    if k_mean_desc is None:
        ring.load(v_desc, 2 * pairs - 1, work, v0, v1)
    else:
        ring.load(k_mean_desc, 2 * pairs - 1, work, 0, TILE)
        ring.load(v_desc, 2 * pairs, work, v0, v1)
        for n in range(1, work.num_pooled_pairs):
            first = 2 * n * TILE
            ring.load(k_mean_desc, 2 * (pairs + n) - 1, work, first, first + TILE)
            first -= 2 * TILE
            ring.load(v_mean_desc, 2 * (pairs + n), work, first, first + TILE)
        last = pairs + work.num_pooled_pairs - 1
        first = 2 * (work.num_pooled_pairs - 1) * TILE
        ring.load(v_mean_desc, 2 * last + 1, work, first, first + TILE)


@gluon.jit
def _start_pair(b_q, ring, turn, D: gl.constexpr, S: gl.constexpr):
    """Start both products with the keys of this turn."""
    b_s0 = start_scores(b_q, ring.tile(turn, 0, TILE, D), S)
    b_s1 = start_scores(b_q, ring.tile(turn, 1, TILE, D), S)
    return b_s0, b_s1


@gluon.jit
def _start_values(b_p0, b_p1, b_acc, ring, turn, D: gl.constexpr):
    """Start b_acc + P V with the values of this turn."""
    b_acc = warpgroup_mma(b_p0, ring.tile(turn, 0, TILE, D), b_acc, is_async=True)
    return warpgroup_mma(b_p1, ring.tile(turn, 1, TILE, D), b_acc, is_async=True)


@gluon.jit
def _start_turn(b_p0, b_p1, b_acc, b_q, ring, n, D: gl.constexpr, S: gl.constexpr):
    """Start turn n: the scores of its keys, then P V of the turn before."""
    b_s0, b_s1 = _start_pair(b_q, ring, 2 * n - 1, D, S)
    ring.wait(2 * n)
    return b_s0, b_s1, _start_values(b_p0, b_p1, b_acc, ring, 2 * n, D)


@gluon.jit
def _wait_scores(b_s0, b_s1, ring, n):
    """The scores of turn n, while P V goes on."""
    b_s0, b_s1 = warpgroup_mma_wait(2, deps=(b_s0, b_s1))
    ring.release(2 * n - 1)
    return b_s0, b_s1


@gluon.jit
def _end_turn(b_p0, b_p1, b_acc, b_e0, b_e1, b_rescale, ring, n, OPERAND: gl.constexpr):
    """End turn n: P V of the turn before is rescaled, and its weights b_e become operands."""
    # this wait's branch keeps the exponentials above the wait for P V, where they cost nothing; its
    # turn is the next pair's keys, or the last values
    ring.wait(2 * n + 1)
    b_acc, b_p0, b_p1 = warpgroup_mma_wait(0, deps=(b_acc, b_p0, b_p1))
    ring.release(2 * n)
    b_acc = b_acc * gl.convert_layout(b_rescale, gl.SliceLayout(1, b_acc.type.layout))[:, None]
    b_p0 = gl.convert_layout(b_e0.to(b_p0.dtype), OPERAND)
    b_p1 = gl.convert_layout(b_e1.to(b_p1.dtype), OPERAND)
    return b_p0, b_p1, b_acc


@gluon.jit
def _packed(b_p):
    """The same weights, kept two to a register from one loop into the next.

    Without it Triton 3.6 takes them apart and together again in every turn. A tail at density 0.2
    took 66.5 ms, 74.1 without it, 70.0 with one loop for keys and means (128 rows, 24 heads x
    119,040 x 128, H200).
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [b_p], dtype=b_p.dtype, is_pure=True, pack=2
    )


@gluon.jit
def _put_pair(b_strip, o_t, t, b_share0, b_share1):
    """Note what the rows give to tiles t and t + 1 in two columns of the strip."""
    # all 64 rows: with pairs of them added first, as in hopper/block_masses, a dense call took 331
    # and 337 ms instead of 298 and 290 (24 heads x 119040 x 128, H200, Triton 3.6, 2026-11-24)
    ROWS: gl.constexpr = gl.SliceLayout(1, b_strip.type.layout)
    b_share0 = gl.convert_layout(b_share0, ROWS)
    b_share1 = gl.convert_layout(b_share1, ROWS)
    b_strip = gl.where((o_t == t % STRIP)[None, :], b_share0[:, None], b_strip)
    return gl.where((o_t == t % STRIP + 1)[None, :], b_share1[:, None], b_strip)


@gluon.jit
def _consume(queries, ring, work, x, CONSUMER: gl.constexpr, D: gl.constexpr):
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    S_OPERAND: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    OUT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    S_COLS: gl.constexpr = gl.SliceLayout(0, S)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    HAS_BIAS: gl.constexpr = x.key_bias is not None
    HAS_MASSES: gl.constexpr = x.masses is not None
    HAS_POOLED: gl.constexpr = x.log_sizes is not None
    dtype: gl.constexpr = x.out.dtype.element_ty

    first_q = work.first_q + CONSUMER * TILE
    i_bh = work.i_bh.to(gl.int64)
    scale_log2 = x.scale_log2
    o_q = first_q + gl.arange(0, TILE, layout=S_ROWS)
    if HAS_MASSES:
        STRIP_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STRIP, 16])
        o_t = gl.arange(0, STRIP, layout=gl.SliceLayout(0, STRIP_LAYOUT))
        b_strip = gl.zeros([TILE, STRIP], gl.float32, STRIP_LAYOUT)
        Nk = gl.cdiv(work.Lk, TILE)
        in_range = first_q < x.Lq
        p_masses = x.masses + (i_bh * gl.cdiv(x.Lq, TILE) + first_q // TILE) * Nk
        # rows that lie past Lq, or had no key then, have no share
        p_previous = x.previous_lse + i_bh * x.Lq + o_q
        b_previous = gl.load(p_previous, mask=o_q < x.Lq, other=float("inf"))
        b_previous = gl.where(b_previous == float("-inf"), float("inf"), b_previous) * LOG2_E

    # [64, D]
    b_q = queries.wait(CONSUMER, D).load(S_OPERAND)
    b_acc = gl.zeros([TILE, D], gl.float32, OUT)

    # the last pair, the only one to mask
    last = 2 * (work.num_pairs - 1)
    ring.wait(0)
    b_s0, b_s1 = _start_pair(b_q, ring, 0, D, S)
    b_s0, b_s1 = warpgroup_mma_wait(0, deps=(b_s0, b_s1))
    ring.release(0)
    o_k = gl.arange(0, TILE, layout=S_COLS)
    k0, k1 = work.pair(work.num_pairs - 1)
    if HAS_BIAS:
        p_bias = x.key_bias + work.i_b.to(gl.int64) * work.Lk
        p_flags = x.bias_flags + work.i_b.to(gl.int64) * gl.cdiv(work.Lk, TILE)
        b_s0 = add_bias(b_s0, p_bias, k0, o_k, work.Lk, scale_log2)
        b_s1 = add_bias(b_s1, p_bias, k1, o_k, work.Lk, scale_log2)
    else:
        b_s0 = gl.where((k0 + o_k < work.Lk)[None, :], b_s0, float("-inf"))
        b_s1 = gl.where((k1 + o_k < work.Lk)[None, :], b_s1, float("-inf"))
    b_max = gl.max(gl.maximum(b_s0, b_s1), 1) * scale_log2
    # an empty list leaves -inf
    b_pivot = gl.where(b_max == float("-inf"), 0.0, b_max)
    b_e0 = gl.exp2(gl.fma(b_s0, scale_log2, -b_pivot[:, None]))
    b_e1 = gl.exp2(gl.fma(b_s1, scale_log2, -b_pivot[:, None]))
    b_sum0 = gl.sum(b_e0, 1)
    b_sum1 = gl.sum(b_e1, 1)
    b_sum = b_sum0 + b_sum1
    if HAS_MASSES:
        b_share = gl.exp2(gl.minimum(b_max - b_previous, MAX_DRIFT))
        b_strip = _put_pair(b_strip, o_t, last, b_sum0 * b_share, b_sum1 * b_share)
        end = gl.where(in_range, Nk, 0)
        store_masses(p_masses, gl.sum(b_strip, 0), last // STRIP * STRIP, last, end)
    b_p0 = gl.convert_layout(b_e0.to(dtype), OUT_OPERAND)
    b_p1 = gl.convert_layout(b_e1.to(dtype), OUT_OPERAND)

    # turn 1 is keys again, or the values of an only pair
    ring.wait(1)
    for n in range(1, work.num_pairs):
        b_s0, b_s1, b_acc = _start_turn(b_p0, b_p1, b_acc, b_q, ring, n, D, S)
        if HAS_BIAS:
            k0, k1 = work.pair(n - 1)
            biased = is_biased(p_flags, k0, k1, work.Lk)
        b_s0, b_s1 = _wait_scores(b_s0, b_s1, ring, n)
        if HAS_BIAS:  # noqa: SIM102  one is known to the compiler
            if biased:
                b_s0 = add_bias(b_s0, p_bias, k0, o_k, work.Lk, scale_log2)
                b_s1 = add_bias(b_s1, p_bias, k1, o_k, work.Lk, scale_log2)
        b_new = gl.maximum(b_max, gl.max(gl.maximum(b_s0, b_s1), 1) * scale_log2)
        b_pivot = b_new
        if HAS_BIAS:
            # a row may have met only keys at -inf so far
            b_pivot = gl.where(b_new == float("-inf"), 0.0, b_new)
        b_e0 = gl.exp2(gl.fma(b_s0, scale_log2, -b_pivot[:, None]))
        b_e1 = gl.exp2(gl.fma(b_s1, scale_log2, -b_pivot[:, None]))
        b_rescale = gl.exp2(b_max - b_pivot)
        b_max = b_new
        if HAS_MASSES:
            b_sum0 = gl.sum(b_e0, 1)
            b_sum1 = gl.sum(b_e1, 1)
            b_sum = b_sum * b_rescale + (b_sum0 + b_sum1)
            b_share = gl.exp2(gl.minimum(b_max - b_previous, MAX_DRIFT))
            b_strip = _put_pair(b_strip, o_t, 2 * n - 2, b_sum0 * b_share, b_sum1 * b_share)
            if 2 * n % STRIP == 0:
                store_masses(p_masses, gl.sum(b_strip, 0), 2 * n - STRIP, 0, end)
        else:
            b_sum = b_sum * b_rescale + gl.sum(b_e0 + b_e1, 1)
        b_p0, b_p1, b_acc = _end_turn(
            b_p0, b_p1, b_acc, b_e0, b_e1, b_rescale, ring, n, OUT_OPERAND
        )  # fmt: skip

    turns = work.num_pairs
    if HAS_POOLED:
        b_p0 = _packed(b_p0)
        b_p1 = _packed(b_p1)
        num_words = 2 * gl.cdiv(x.num_pooled, TILE)
        p_words = x.words + (i_bh * x.Nq + work.i_q) * num_words
        p_sizes = x.log_sizes + work.i_b.to(gl.int64) * x.num_pooled
        if HAS_BIAS:
            p_uneven = x.uneven_flags + work.i_b.to(gl.int64) * gl.cdiv(x.num_pooled, TILE)
        last_size = work.Lk - (x.num_pooled - 1) * work.BLOCK_K
        shorter = (gl.log2(last_size.to(gl.float32)) - log2_block(work.BLOCK_K)) / scale_log2
        LOG2_BLOCK: gl.constexpr = log2_block(work.BLOCK_K)
        for i in range(work.num_pooled_pairs):
            n = turns + i
            k0 = 2 * i * TILE
            b_s0, b_s1, b_acc = _start_turn(b_p0, b_p1, b_acc, b_q, ring, n, D, S)
            weight = LOG2_BLOCK
            if HAS_BIAS:
                uneven = is_biased(p_uneven, k0, k0 + TILE, x.num_pooled)
                weight = gl.where(uneven == 0, LOG2_BLOCK, 0.0)
            word0, word1, word2, word3 = load_words(p_words, i, num_words)
            b_s0, b_s1 = _wait_scores(b_s0, b_s1, ring, n)
            b_s0 = gl.where(is_listed(word0, word1, o_k)[None, :], float("-inf"), b_s0)
            b_s1 = gl.where(is_listed(word2, word3, o_k)[None, :], float("-inf"), b_s1)
            if HAS_BIAS:
                if uneven:
                    b_s0 = add_bias(b_s0, p_sizes, k0, o_k, x.num_pooled, scale_log2)
                    b_s1 = add_bias(b_s1, p_sizes, k0 + TILE, o_k, x.num_pooled, scale_log2)
            elif i == work.num_pooled_pairs - 1:
                # the last block may be short
                last_mean = x.num_pooled - 1 - k0
                b_s0 = gl.where((o_k == last_mean)[None, :], b_s0 + shorter, b_s0)
                b_s1 = gl.where((o_k + TILE == last_mean)[None, :], b_s1 + shorter, b_s1)
            b_top = gl.max(gl.maximum(b_s0, b_s1), 1) * scale_log2 + weight
            b_new = gl.maximum(b_max, b_top)
            # a row may have met only keys at -inf so far
            b_pivot = gl.where(b_new == float("-inf"), 0.0, b_new)
            b_shift = b_pivot - weight
            b_e0 = gl.exp2(gl.fma(b_s0, scale_log2, -b_shift[:, None]))
            b_e1 = gl.exp2(gl.fma(b_s1, scale_log2, -b_shift[:, None]))
            b_rescale = gl.exp2(b_max - b_pivot)
            b_max = b_new
            b_sum = b_sum * b_rescale + gl.sum(b_e0 + b_e1, 1)
            b_p0, b_p1, b_acc = _end_turn(
                b_p0, b_p1, b_acc, b_e0, b_e1, b_rescale, ring, n, OUT_OPERAND
            )  # fmt: skip
        turns += work.num_pooled_pairs

    if HAS_MASSES:
        end = gl.where(in_range, last, 0)
        store_masses(p_masses, gl.sum(b_strip, 0), last // STRIP * STRIP, 0, end)
    b_acc = _start_values(b_p0, b_p1, b_acc, ring, 2 * turns - 1, D)
    b_acc = warpgroup_mma_wait(0, deps=(b_acc,))

    p_lse = x.lse + i_bh * x.Lq + o_q
    gl.store(p_lse, (b_max + gl.log2(b_sum)) * LN_2, mask=o_q < x.Lq)
    b_norm = 1.0 / gl.where(b_sum == 0.0, 1.0, b_sum)
    b_acc = b_acc * gl.convert_layout(b_norm, OUT_ROWS)[:, None]
    store_output(x, work, first_q, b_acc, D)


@gluon.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        "key_bias", "bias_flags", "kv_indices", "kv_num_blocks", "words", "log_sizes",
        "uneven_flags", "order", "previous_lse", "lse", "masses",
    ],
)  # fmt: skip
def hopper_attention_kernel(
    q_desc, k_desc, v_desc, k_mean_desc, v_mean_desc, key_bias, bias_flags,
    kv_indices, kv_num_blocks, words, log_sizes, uneven_flags, order, previous_lse,
    out, lse, masses,
    H, Lq, Lk, Nq, num_pooled, stride_ob, stride_oh, scale_log2,
    D: gl.constexpr,
    BLOCK_K: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    work = make_work(
        Nq, H, Lk, kv_indices, kv_num_blocks, num_pooled, CONSUMERS * TILE, BLOCK_K
    )  # fmt: skip
    queries = make_queries(q_desc, D, CONSUMERS)
    ring = make_ring(k_desc, TILE, D, CONSUMERS, STAGES)
    x = Tensors(
        key_bias, bias_flags, log_sizes, uneven_flags, words, order, previous_lse, out, lse,
        masses, H, Lq, Nq, num_pooled, stride_ob, stride_oh, scale_log2,
    )  # fmt: skip
    # the tuples are written out: assigned to a name first, their constants would become tensors
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (queries, ring, work, x, 0, D)),
                (_consume, (queries, ring, work, x, 1, D)),
                (_produce, (q_desc, k_desc, v_desc, k_mean_desc, v_mean_desc, queries, ring, work)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (queries, ring, work, x, 0, D)),
                (_produce, (q_desc, k_desc, v_desc, k_mean_desc, v_mean_desc, queries, ring, work)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip


def _launch(x: Operands, scale, tile: tiles.HopperTile, previous_lse=None, masses=None):
    """Run the kernel."""
    B, H, Lq, Lk, D = x.sizes
    Nq = triton.cdiv(Lq, tile.tile_q)
    k_mean, v_mean, log_sizes = x.pooled_tensors
    block_k = TILE.value if x.mask is None else x.mask.block_k
    with launch.on_device(x.q):
        hopper_attention_kernel[(B * H * Nq,)](
            source(x.q), source(x.k), source(x.v), source(k_mean), source(v_mean),
            x.key_bias, bias_flags(x.key_bias), x.kv_indices, x.kv_num_blocks,
            mask_words(x),
            log_sizes, uneven_flags(x, block_k), x.order, previous_lse, x.out, x.lse, masses,
            H, Lq, Lk, Nq, x.num_pooled, *x.order_strides, float(scale) * LOG2_E.value,
            D=D,
            BLOCK_K=block_k,
            **tile.options,
        )  # fmt: skip


def attention(
    q, k, v, *, scale, key_bias=None, mask=None, pooled=None, order=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `triton.attention.attention`."""
    x = operands_of(q, k, v, key_bias=key_bias, mask=mask, pooled=pooled, order=order)
    if x.out.numel():
        block_q = 128 if mask is None else mask.block_q
        _launch(x, scale, tiles.hopper_attention(block_q))
    return x.out, x.lse


def attention_with_masses(
    q, k, v, *, scale, previous_lse, block_q, block_k, key_bias=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `triton.attention.attention_with_masses`."""
    x = operands_of(q, k, v, key_bias=key_bias)
    previous_lse = launch.checked(previous_lse, "previous_lse", q.shape[:3])
    masses = empty_masses(q, k, TILE.value, TILE.value)
    if x.out.numel():
        _launch(x, scale, tiles.hopper_attention(128), previous_lse, masses)
    found, wanted = (TILE.value, TILE.value), (block_q, block_k)
    return x.out, x.lse, to_granularity(masses, q.shape[2], found, wanted, renormalise=True)
