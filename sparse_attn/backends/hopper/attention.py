"""Attention for Hopper in Gluon, sparse or dense: one page of the FlashAttention-3 recipe.

A producer warp streams pairs of 64-token tiles through one ring of shared memory with TMA,
gathered from the block list or in order: keys of pair n + 1, then values of pair n. A consumer
warpgroup owns 64 query rows and keeps them in registers; while the tensor cores form P V of one
pair, it exponentiates the scores of the next. With 128-row query blocks two consumers share the
stream; with 64-row ones a program has one, and two programs share a multiprocessor.

The last pair goes first: it alone can be ragged or odd, so only the first turn masks. The means
of a pooled tail come last, in order, with the list of a row as bits to mask them.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..triton.softmax import LN_2, LOG2_E
from .pipeline import (
    LOG2_TILE,
    STRIP,
    TILE,
    add_bias,
    bias_tiles,
    has_bias,
    is_listed,
    load_pair,
    load_queries,
    source,
    start_scores,
    store_masses,
    tail_words,
    tile_first,
    wait_for,
)

# a row whose LSE fell by more than this (in log2) must not swamp its block row
MAX_DRIFT = gl.constexpr(16.0)

SIZES = [
    "H", "Lq", "Lk", "Nq", "Nk", "list_stride", "stride_ob", "stride_oh", "first_pseudo",
    "num_words",
]  # fmt: skip


@gluon.jit
def _pair_first(
    p_list, n, num_tiles, num_pairs, first_pseudo, Lk,
    BLOCK_K: gl.constexpr, LISTED: gl.constexpr, HAS_TAIL: gl.constexpr,
):  # fmt: skip
    """First keys of both tiles of the n-th pair after the first turn's, n from 1."""
    k0 = tile_first(p_list, 2 * n - 2, num_tiles, Lk, BLOCK_K, LISTED)
    k1 = tile_first(p_list, 2 * n - 1, num_tiles, Lk, BLOCK_K, LISTED)
    if HAS_TAIL:
        k0 = gl.where(n < num_pairs, k0, first_pseudo + (n - num_pairs) * (2 * TILE))
        k1 = gl.where(n < num_pairs, k1, k0 + TILE)
    return k0, k1


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_tiles, ring, q_ready, ready, free,
    p_list, num_tiles, num_pairs, all_pairs, first_pseudo, Lk, i_b, i_h, first_q,
    BLOCK_K: gl.constexpr, LISTED: gl.constexpr, HAS_TAIL: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    load_queries(q_desc, q_tiles, q_ready, i_b, i_h, first_q, CONSUMERS)
    last = 2 * (num_pairs - 1)
    v0 = tile_first(p_list, last, num_tiles, Lk, BLOCK_K, LISTED)
    v1 = tile_first(p_list, last + 1, num_tiles, Lk, BLOCK_K, LISTED)
    load_pair(k_desc, ring, ready, free, 0, i_b, i_h, v0, v1, STAGES)
    for n in range(1, all_pairs):
        k0, k1 = _pair_first(
            p_list, n, num_tiles, num_pairs, first_pseudo, Lk, BLOCK_K, LISTED, HAS_TAIL
        )  # fmt: skip
        load_pair(k_desc, ring, ready, free, 2 * n - 1, i_b, i_h, k0, k1, STAGES)
        load_pair(v_desc, ring, ready, free, 2 * n, i_b, i_h, v0, v1, STAGES)
        v0 = k0
        v1 = k1
    load_pair(v_desc, ring, ready, free, 2 * all_pairs - 1, i_b, i_h, v0, v1, STAGES)


@gluon.jit
def _start_pair(b_q, ring, turn, D: gl.constexpr, STAGES: gl.constexpr, S: gl.constexpr):
    """Start both products with the keys of this turn."""
    b_s0 = start_scores(b_q, ring.index(2 * (turn % STAGES)), D, S)
    b_s1 = start_scores(b_q, ring.index(2 * (turn % STAGES) + 1), D, S)
    return b_s0, b_s1


@gluon.jit
def _start_values(b_p0, b_p1, b_acc, ring, turn, D: gl.constexpr, STAGES: gl.constexpr):
    """Start b_acc + P V with the values of this turn."""
    v0 = ring.index(2 * (turn % STAGES)).reshape([TILE, D])
    v1 = ring.index(2 * (turn % STAGES) + 1).reshape([TILE, D])
    b_acc = warpgroup_mma(b_p0, v0, b_acc, is_async=True)
    return warpgroup_mma(b_p1, v1, b_acc, is_async=True)


@gluon.jit
def _put_pair(b_strip, o_t, t, b_share0, b_share1):
    """Note what the rows give to tiles t and t + 1 in two columns of the strip."""
    # all 64 rows: with pairs of them added first, as in hopper_block_masses, a dense call took 331
    # and 337 ms instead of 298 and 290 (24 heads x 119040 x 128, H200, Triton 3.6, 2026-11-24)
    ROWS: gl.constexpr = gl.SliceLayout(1, b_strip.type.layout)
    b_share0 = gl.convert_layout(b_share0, ROWS)
    b_share1 = gl.convert_layout(b_share1, ROWS)
    b_strip = gl.where((o_t == t % STRIP)[None, :], b_share0[:, None], b_strip)
    return gl.where((o_t == t % STRIP + 1)[None, :], b_share1[:, None], b_strip)


@gluon.jit
def _consume(
    q_tiles, ring, q_ready, ready, free,
    p_list, num_tiles, num_pairs, all_pairs, Lq, Lk, H, i_b, i_h, first_q,
    out, lse, key_bias, bias_tiles, previous_lse, masses, Nk,
    p_listed, num_words, first_pseudo, order, scale_log2,
    CONSUMER: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr,
    LISTED: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_MASSES: gl.constexpr,
    HAS_TAIL: gl.constexpr, HAS_ORDER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    S_OPERAND: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    OUT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    S_COLS: gl.constexpr = gl.SliceLayout(0, S)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    dtype: gl.constexpr = out.dtype.element_ty

    first_q += CONSUMER * TILE
    i_bh = i_b.to(gl.int64) * H + i_h
    o_q = first_q + gl.arange(0, TILE, layout=S_ROWS)
    if HAS_MASSES:
        STRIP_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STRIP, 16])
        o_t = gl.arange(0, STRIP, layout=gl.SliceLayout(0, STRIP_LAYOUT))
        b_strip = gl.zeros([TILE, STRIP], gl.float32, STRIP_LAYOUT)
        in_range = first_q < Lq
        p_masses = masses + (i_bh * gl.cdiv(Lq, TILE) + first_q // TILE) * Nk
        # rows that lie past Lq, or had no key then, have no share
        b_previous = gl.load(previous_lse + i_bh * Lq + o_q, mask=o_q < Lq, other=float("inf"))
        b_previous = gl.where(b_previous == float("-inf"), float("inf"), b_previous) * LOG2_E

    mbarrier.wait(q_ready.index(CONSUMER), 0)
    # [64, D]
    b_q = q_tiles.index(CONSUMER).reshape([TILE, D]).load(S_OPERAND)
    b_acc = gl.zeros([TILE, D], gl.float32, OUT)

    # the last pair, the only one to mask
    last = 2 * (num_pairs - 1)
    wait_for(ready, 0, STAGES)
    b_s0, b_s1 = _start_pair(b_q, ring, 0, D, STAGES, S)
    b_s0, b_s1 = warpgroup_mma_wait(0, deps=(b_s0, b_s1))
    mbarrier.arrive(free.index(0))
    o_k = gl.arange(0, TILE, layout=S_COLS)
    k0 = tile_first(p_list, last, num_tiles, Lk, BLOCK_K, LISTED)
    k1 = tile_first(p_list, last + 1, num_tiles, Lk, BLOCK_K, LISTED)
    if HAS_BIAS:
        p_bias = key_bias + i_b.to(gl.int64) * Lk
        p_flags = bias_tiles + i_b.to(gl.int64) * gl.cdiv(Lk, TILE)
        b_s0 = add_bias(b_s0, p_bias, k0, o_k, Lk, scale_log2)
        b_s1 = add_bias(b_s1, p_bias, k1, o_k, Lk, scale_log2)
    else:
        b_s0 = gl.where((k0 + o_k < Lk)[None, :], b_s0, float("-inf"))
        b_s1 = gl.where((k1 + o_k < Lk)[None, :], b_s1, float("-inf"))
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
    wait_for(ready, 1, STAGES)
    for n in range(1, all_pairs):
        b_s0, b_s1 = _start_pair(b_q, ring, 2 * n - 1, D, STAGES, S)
        wait_for(ready, 2 * n, STAGES)
        b_acc = _start_values(b_p0, b_p1, b_acc, ring, 2 * n, D, STAGES)
        if HAS_BIAS:
            k0, k1 = _pair_first(
                p_list, n, num_tiles, num_pairs, first_pseudo, Lk, BLOCK_K, LISTED, HAS_TAIL
            )  # fmt: skip
            biased = has_bias(p_flags, k0, k1, Lk)
        if HAS_TAIL:
            i_word = 4 * (n - num_pairs)
            pseudo = n >= num_pairs
            word0 = gl.load(p_listed + i_word, mask=pseudo, other=0)
            word1 = gl.load(p_listed + i_word + 1, mask=pseudo, other=0)
            m_word = pseudo & (i_word + 2 < num_words)
            word2 = gl.load(p_listed + i_word + 2, mask=m_word, other=0)
            word3 = gl.load(p_listed + i_word + 3, mask=m_word, other=0)
        b_s0, b_s1 = warpgroup_mma_wait(2, deps=(b_s0, b_s1))
        mbarrier.arrive(free.index((2 * n - 1) % STAGES))

        if HAS_TAIL:  # noqa: SIM102  one is known to the compiler
            if pseudo:
                b_s0 = gl.where(is_listed(word0, word1, o_k)[None, :], float("-inf"), b_s0)
                b_s1 = gl.where(is_listed(word2, word3, o_k)[None, :], float("-inf"), b_s1)
        if HAS_BIAS:  # noqa: SIM102  as above
            if biased:
                b_s0 = add_bias(b_s0, p_bias, k0, o_k, Lk, scale_log2)
                b_s1 = add_bias(b_s1, p_bias, k1, o_k, Lk, scale_log2)
        b_top = gl.max(gl.maximum(b_s0, b_s1), 1) * scale_log2
        if HAS_TAIL:
            weight = gl.where(pseudo & (biased == 0), LOG2_TILE, 0.0)
            b_top += weight
        b_new = gl.maximum(b_max, b_top)
        b_pivot = b_new
        if HAS_BIAS:
            # a row may have met only keys at -inf so far
            b_pivot = gl.where(b_new == float("-inf"), 0.0, b_new)
        b_shift = b_pivot
        if HAS_TAIL:
            b_shift = b_pivot - weight
        b_e0 = gl.exp2(gl.fma(b_s0, scale_log2, -b_shift[:, None]))
        b_e1 = gl.exp2(gl.fma(b_s1, scale_log2, -b_shift[:, None]))
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

        # this wait's branch keeps the exponentials above the wait for P V, where they cost
        # nothing; its turn is the next pair's keys, or the last values
        wait_for(ready, 2 * n + 1, STAGES)
        b_acc, b_p0, b_p1 = warpgroup_mma_wait(0, deps=(b_acc, b_p0, b_p1))
        mbarrier.arrive(free.index((2 * n) % STAGES))
        b_acc = b_acc * gl.convert_layout(b_rescale, OUT_ROWS)[:, None]
        b_p0 = gl.convert_layout(b_e0.to(dtype), OUT_OPERAND)
        b_p1 = gl.convert_layout(b_e1.to(dtype), OUT_OPERAND)

    if HAS_MASSES:
        end = gl.where(in_range, last, 0)
        store_masses(p_masses, gl.sum(b_strip, 0), last // STRIP * STRIP, 0, end)
    b_acc = _start_values(b_p0, b_p1, b_acc, ring, 2 * all_pairs - 1, D, STAGES)
    b_acc = warpgroup_mma_wait(0, deps=(b_acc,))

    gl.store(lse + i_bh * Lq + o_q, (b_max + gl.log2(b_sum)) * LN_2, mask=o_q < Lq)
    b_norm = 1.0 / gl.where(b_sum == 0.0, 1.0, b_sum)
    b_acc = b_acc * gl.convert_layout(b_norm, OUT_ROWS)[:, None]
    o_row = first_q + gl.arange(0, TILE, layout=OUT_ROWS)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    o_to = o_row
    if HAS_ORDER:
        o_to = gl.load(order + o_row, mask=o_row < Lq, other=0)
    row = (i_b.to(gl.int64) * Lq + o_to) * H + i_h
    p_out = out + row[:, None] * D + o_d[None, :]
    gl.store(p_out, b_acc.to(dtype), mask=(o_row < Lq)[:, None])


@gluon.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        "lse", "key_bias", "bias_tiles", "previous_lse", "masses", "kv_indices", "kv_num_blocks",
        "tail", "order",
    ],
)  # fmt: skip
def hopper_attention_kernel(
    q_desc, k_desc, v_desc, out, lse, key_bias, bias_tiles, previous_lse, masses,
    kv_indices, kv_num_blocks, tail, order,
    H, Lq, Lk, Nq, Nk, list_stride, stride_ob, stride_oh, first_pseudo, num_words,
    scale_log2,
    D: gl.constexpr,
    BLOCK_K: gl.constexpr,
    LISTED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_MASSES: gl.constexpr,
    HAS_TAIL: gl.constexpr,
    HAS_ORDER: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    i_bh = pid // Nq
    i_q = pid % Nq
    i_b = i_bh // H
    i_h = i_bh % H
    first_q = i_q * (CONSUMERS * TILE)
    if LISTED:
        row = i_bh.to(gl.int64) * Nq + i_q
        p_list = kv_indices + row * list_stride
        num_blocks = gl.load(kv_num_blocks + row)
        if HAS_TAIL:
            # the means, which end every list, are read without it
            num_blocks -= num_words // 2
        num_tiles = num_blocks * (BLOCK_K // TILE)
    else:
        p_list = lse  # not read
        num_tiles = gl.cdiv(Lk, TILE)
    p_listed = lse  # not read
    if HAS_ORDER:
        order += i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
    if HAS_TAIL:
        p_listed = tail + (i_bh.to(gl.int64) * Nq + i_q) * num_words
    # an empty list becomes one pair of tiles past the end
    num_pairs = gl.maximum(gl.cdiv(num_tiles, 2), 1)
    all_pairs = num_pairs
    if HAS_TAIL:
        all_pairs += gl.cdiv(num_words, 4)

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

    # the tuples are written out: assigned to a name first, their constants would become tensors
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    q_tiles, ring, q_ready, ready, free,
                    p_list, num_tiles, num_pairs, all_pairs, Lq, Lk, H, i_b, i_h, first_q,
                    out, lse, key_bias, bias_tiles, previous_lse, masses, Nk,
                    p_listed, num_words, first_pseudo, order, scale_log2,
                    0, D, BLOCK_K, LISTED, HAS_BIAS, HAS_MASSES, HAS_TAIL, HAS_ORDER, STAGES,
                )),
                (_consume, (
                    q_tiles, ring, q_ready, ready, free,
                    p_list, num_tiles, num_pairs, all_pairs, Lq, Lk, H, i_b, i_h, first_q,
                    out, lse, key_bias, bias_tiles, previous_lse, masses, Nk,
                    p_listed, num_words, first_pseudo, order, scale_log2,
                    1, D, BLOCK_K, LISTED, HAS_BIAS, HAS_MASSES, HAS_TAIL, HAS_ORDER, STAGES,
                )),
                (_produce, (
                    q_desc, k_desc, v_desc, q_tiles, ring, q_ready, ready, free,
                    p_list, num_tiles, num_pairs, all_pairs, first_pseudo, Lk, i_b, i_h, first_q,
                    BLOCK_K, LISTED, HAS_TAIL, CONSUMERS, STAGES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    q_tiles, ring, q_ready, ready, free,
                    p_list, num_tiles, num_pairs, all_pairs, Lq, Lk, H, i_b, i_h, first_q,
                    out, lse, key_bias, bias_tiles, previous_lse, masses, Nk,
                    p_listed, num_words, first_pseudo, order, scale_log2,
                    0, D, BLOCK_K, LISTED, HAS_BIAS, HAS_MASSES, HAS_TAIL, HAS_ORDER, STAGES,
                )),
                (_produce, (
                    q_desc, k_desc, v_desc, q_tiles, ring, q_ready, ready, free,
                    p_list, num_tiles, num_pairs, all_pairs, first_pseudo, Lk, i_b, i_h, first_q,
                    BLOCK_K, LISTED, HAS_TAIL, CONSUMERS, STAGES,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip


def launch(
    q, k, v, out, lse, *, scale, tile, block_k=64,
    kv_indices=None, kv_num_blocks=None, key_bias=None, previous_lse=None, masses=None,
    tail=None, num_listed=0, order=None,
):  # fmt: skip
    """Run the kernel: over listed key blocks if there are lists, else over every key.

    Args:
        q, k, v: aligned [B, H, L, D]; out, lse: as `sparse_attention` returns them.
        tile: 64 or 128 query rows a program, which is also the block size of the lists.
        masses: [B, H, ceil(Lq / 64), ceil(Lk / 64)] float32 to fill, with `previous_lse`.
        tail, order: as `sparse_attention` takes them; the first `num_listed` blocks are tokens.
    """
    B, H, Lq, D = q.shape
    Lk = k.shape[2]
    Nq = triton.cdiv(Lq, tile.tile_q)
    listed = kv_indices is not None
    first_pseudo = num_listed * TILE.value
    num_words = 0
    if tail is not None:
        tail = tail_words(tail)
        num_words = tail.shape[-1]
    hopper_attention_kernel[(B * H * Nq,)](
        source(q), source(k), source(v), out, lse,
        key_bias, bias_tiles(key_bias, Lk - first_pseudo if num_words else 0), previous_lse, masses,
        kv_indices, kv_num_blocks, tail, order,
        H, Lq, Lk, Nq, triton.cdiv(Lk, TILE.value), kv_indices.shape[-1] if listed else 0,
        *(order.stride()[:2] if order is not None else (0, 0)), first_pseudo, num_words,
        float(scale) * LOG2_E.value,
        D=D,
        BLOCK_K=block_k,
        LISTED=listed,
        HAS_BIAS=key_bias is not None,
        HAS_MASSES=masses is not None,
        HAS_TAIL=tail is not None,
        HAS_ORDER=order is not None,
        CONSUMERS=tile.tile_q // TILE.value,
        STAGES=tile.num_stages,
        num_warps=4,
        # two programs share a multiprocessor when one has a single consumer
        maxnreg=128 if tile.tile_q == TILE.value else None,
    )  # fmt: skip
