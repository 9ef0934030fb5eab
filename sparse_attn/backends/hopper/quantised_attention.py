"""Low-precision attention for Hopper in Gluon, sparse or dense: INT8 or FP8 scores, FP8 values.

The shape of it is `hopper_attention.py`'s: a producer warp streams pairs of 64-key tiles, each
consumer warpgroup owns 64 query rows, and the last pair, the only one to mask, goes first.
What differs:
- The tensor cores want both operands contiguous along the keys, so values lie transposed.
- The weights reach them from registers, where eight-bit operands lie in another order than the
  scores: `quantise.key_order` permutes the values to match, and no lane has to trade.
- Eight-bit weights are packed while the tensor cores still read those of the turn before, so they
  change registers once more after that (`in_order`).
- Tiles without a bias have a loop of their own, which ends at the first listed tile with one; the
  means of a pooled tail come after it. Looking for a bias and rescaling in every turn took 11 to
  14 % longer where there was one.
The tensor cores add up FP8 products in about 14 bits; a float32 sum for every pair of tiles was no
more accurate (relative error 0.0520, against 0.0522, on 23,800 random keys) and took 23 % longer.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from ..triton.softmax import LN_2
from .pipeline import (
    LOG2_TILE,
    TILE,
    bias_tiles,
    is_listed,
    load_pair,
    load_queries,
    source,
    tail_words,
    tile_first,
    wait_for,
)
from .quantised_ops import (
    biased_scores,
    first_biased,
    halves,
    in_order,
    is_biased,
    lane_max,
    lane_sum,
    largest,
    load_bias,
    load_words,
    operand,
    rescaled,
    start_pair,
    start_values,
    weights,
)

# log2(448): the largest weight of a row becomes the largest number of FP8 (e4m3)
WEIGHT_SHIFT = gl.constexpr(8.807354922057604)
# a maximum that any score exceeds
LOWEST = gl.constexpr(-1e30)
# renamed after Triton 3.6
_memory = gl.shared_memory_descriptor
_reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret

SIZES = [
    "stride_ob", "stride_oh", "H", "Lq", "Lk", "Nq", "Nk", "num_rows", "list_stride", "num_listed",
]  # fmt: skip


@gluon.jit
def _tiles(p_list, turn, num_tiles, Nk, BLOCK_K: gl.constexpr, LISTED: gl.constexpr):
    """Numbers of the two tiles of a turn, at least Nk for one past the list."""
    tile0 = tile_first(p_list, 2 * turn, num_tiles, Nk * TILE, BLOCK_K, LISTED) // TILE
    tile1 = tile_first(p_list, 2 * turn + 1, num_tiles, Nk * TILE, BLOCK_K, LISTED) // TILE
    return tile0, tile1


@gluon.jit
def _turn_tiles(
    p_list, n, num_tiles, num_pairs, num_listed, Nk,
    BLOCK_K: gl.constexpr, LISTED: gl.constexpr, HAS_TAIL: gl.constexpr,
):  # fmt: skip
    """Numbers of the two tiles of turn n, n from 1: of the list, then of means."""
    tile0, tile1 = _tiles(p_list, n - 1, num_tiles, Nk, BLOCK_K, LISTED)
    if HAS_TAIL:
        mean = num_listed + 2 * (n - num_pairs)
        tile0 = gl.where(n < num_pairs, tile0, mean)
        tile1 = gl.where(n < num_pairs, tile1, mean + 1)
    return tile0, tile1


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_tiles, k_ring, v_ring, q_ready, k_ready, k_free, v_ready, v_free,
    p_list, num_tiles, num_pairs, all_pairs, num_listed, i_b, i_h, first_q, Nk,
    D: gl.constexpr, BLOCK_K: gl.constexpr, LISTED: gl.constexpr, HAS_TAIL: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    load_queries(q_desc, q_tiles, q_ready, i_b, i_h, first_q, CONSUMERS)
    # a missing tile is read past the end: zeros
    v0, v1 = _tiles(p_list, num_pairs - 1, num_tiles, Nk, BLOCK_K, LISTED)
    load_pair(k_desc, k_ring, k_ready, k_free, 0, i_b, i_h, v0 * TILE, v1 * TILE, STAGES)
    for n in range(1, all_pairs):
        k0, k1 = _turn_tiles(
            p_list, n, num_tiles, num_pairs, num_listed, Nk, BLOCK_K, LISTED, HAS_TAIL
        )  # fmt: skip
        load_pair(k_desc, k_ring, k_ready, k_free, n, i_b, i_h, k0 * TILE, k1 * TILE, STAGES)
        load_pair(v_desc, v_ring, v_ready, v_free, n - 1, i_b, i_h, v0 * D, v1 * D, STAGES)
        v0 = k0
        v1 = k1
    load_pair(v_desc, v_ring, v_ready, v_free, all_pairs - 1, i_b, i_h, v0 * D, v1 * D, STAGES)


@gluon.jit
def _turn(
    q_tile, k_pairs, v_ring, k_ready, k_free, v_ready, v_free, n, all_pairs,
    b_x0, b_x1, b_factor0, b_factor1, b_top, b_max, b_sum, b_new, means, weight, words,
    D: gl.constexpr, LANES: gl.constexpr, HAS_MEANS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Turn n: exponentiate its scores b_x, start its P V, and form the scores of turn n + 1.

    b_top, [64, 4], is the largest score of each lane, b_new the P V that was started last. `means`
    says whether the keys are means, which count `weight` more.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 4)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)

    # meanwhile the tensor cores form P V of the turn before
    b_top = gl.max(b_top, 1)
    if HAS_MEANS:
        # means of listed blocks count here: with its weight, such a mean lies below the log of what
        # its block has added already
        b_top += weight
    b_top = gl.maximum(b_max, b_top)
    b_shift = WEIGHT_SHIFT - b_top
    if HAS_MEANS:
        b_shift = (WEIGHT_SHIFT + weight) - b_top
    b_e0 = weights(b_x0, b_factor0, b_shift, S)
    b_e1 = weights(b_x1, b_factor1, b_shift, S)
    if HAS_MEANS:  # noqa: SIM102  one is known to the compiler
        if means:
            o_k = gl.arange(0, TILE, layout=gl.SliceLayout(0, S))
            b_e0 = gl.where(is_listed(words[0], words[1], o_k)[None, :], 0.0, b_e0)
            b_e1 = gl.where(is_listed(words[2], words[3], o_k)[None, :], 0.0, b_e1)
    b_rescale = gl.exp2(b_max - b_top)
    b_sum = b_sum * b_rescale[:, None] + lane_sum(b_e0 + b_e1, LANES)
    b_w0 = operand(b_e0, OPERAND)
    b_w1 = operand(b_e1, OPERAND)

    # this wait's branch keeps the exponentials above the wait for P V, where they cost nothing
    wait_for(k_ready, n + 1, STAGES, n + 1 < all_pairs)
    b_acc = warpgroup_mma_wait(0, deps=(b_new,))
    b_s = start_pair(q_tile, k_pairs, n + 1, SCORES, STAGES)
    mbarrier.arrive(v_free.index((n - 1) % STAGES))
    b_acc = rescaled(b_acc, gl.convert_layout(b_rescale, OUT_ROWS, assert_trivial=True))
    wait_for(v_ready, n, STAGES)
    b_new = start_values(in_order(b_w0), in_order(b_w1), b_acc, v_ring, n, D, STAGES)
    b_s = warpgroup_mma_wait(2, deps=(b_s,))
    mbarrier.arrive(k_free.index((n + 1) % STAGES))
    return b_s, b_new, b_top, b_sum


@gluon.jit
def _consume(
    q_tiles, k_ring, v_ring, q_ready, k_ready, k_free, v_ready, v_free,
    p_list, num_tiles, num_pairs, all_pairs, Lq, Lk, H, i_b, i_h, first_q, num_rows, Nk,
    out, lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, v_scale, v_mean,
    p_words, num_listed, p_order,
    CONSUMER: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, LISTED: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_TAIL: gl.constexpr, HAS_ORDER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 4)
    S_COLS: gl.constexpr = gl.SliceLayout(0, S)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    # [64, 4]: a row's four lanes
    LANES: gl.constexpr = gl.DistributedLinearLayout(
        [(8, 0)], [(0, 1), (0, 2), (1, 0), (2, 0), (4, 0)], [(16, 0), (32, 0)], [], [64, 4]
    )
    ROWS: gl.constexpr = gl.SliceLayout(1, LANES)
    dtype: gl.constexpr = out.dtype.element_ty

    first_q += CONSUMER * TILE
    i_bh = i_b.to(gl.int64) * H + i_h
    o_row = gl.arange(0, TILE, layout=ROWS)
    # the padding of the queries has rows too; scores * b_scale * k_scale are in units of log2
    q_row = i_bh * num_rows + first_q
    b_scale = gl.load(q_scale + q_row + o_row)
    p_scale = k_scale + i_bh * Nk
    q_tile = q_tiles.index(CONSUMER).reshape([TILE, D])
    PAIR: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=D, element_bitwidth=8, rank=2)
    k_pairs = _reinterpret(k_ring, k_ring.dtype, [STAGES, 2 * TILE, D], PAIR)
    b_acc = gl.zeros([TILE, D], gl.float32, OUT)
    num_plain = num_pairs
    if HAS_BIAS:
        p_bias = key_bias + i_b.to(gl.int64) * Lk
        p_flags = bias_tiles + i_b.to(gl.int64) * Nk
        biased_tile = first_biased(p_list, p_flags, num_tiles, Nk, BLOCK_K, LISTED)
        num_plain = gl.minimum(num_pairs, biased_tile // 2 + 1)

    # the last pair, the only one to mask
    tile_a, tile_b = _tiles(p_list, num_pairs - 1, num_tiles, Nk, BLOCK_K, LISTED)
    scale_a = gl.load(p_scale + tile_a, mask=tile_a < Nk, other=0.0)
    scale_b = gl.load(p_scale + tile_b, mask=tile_b < Nk, other=0.0)
    mbarrier.wait(q_ready.index(CONSUMER), 0)
    wait_for(k_ready, 0, STAGES)
    b_first = start_pair(q_tile, k_pairs, 0, SCORES, STAGES)
    b_first = warpgroup_mma_wait(0, deps=(b_first,))
    mbarrier.arrive(k_free.index(0))
    b_s_a, b_s_b = halves(b_first, S)
    o_k = gl.arange(0, TILE, layout=S_COLS)
    b_x0 = b_s_a.to(gl.float32)
    b_x1 = b_s_b.to(gl.float32)
    b_factor_a = b_scale * scale_a
    b_factor_b = b_scale * scale_b
    if HAS_BIAS:
        b_one = gl.full([TILE], 1.0, gl.float32, ROWS)
        b_x0 = biased_scores(b_x0, b_factor_a, load_bias(p_bias, tile_a, Lk), S)
        b_x1 = biased_scores(b_x1, b_factor_b, load_bias(p_bias, tile_b, Lk), S)
        b_factor_a = b_one
        b_factor_b = b_one
    b_m0 = (tile_a * TILE + o_k < Lk)[None, :]
    b_m1 = (tile_b * TILE + o_k < Lk)[None, :]
    b_top_a = gl.max(lane_max(gl.where(b_m0, b_x0, float("-inf")), LANES), 1)
    b_top_b = gl.max(lane_max(gl.where(b_m1, b_x1, float("-inf")), LANES), 1)
    # -inf times a scale of 0 would be NaN
    b_top_a = gl.where(b_top_a == float("-inf"), b_top_a, b_top_a * b_factor_a)
    b_top_b = gl.where(b_top_b == float("-inf"), b_top_b, b_top_b * b_factor_b)
    b_max = gl.maximum(b_top_a, b_top_b)
    if HAS_BIAS:
        # finite, though a row may have met only keys at -inf so far
        b_max = gl.maximum(b_max, LOWEST)
        b_shift_a = WEIGHT_SHIFT - b_max
    else:
        # an empty list leaves -inf
        b_shift_a = WEIGHT_SHIFT - gl.where(b_max == float("-inf"), 0.0, b_max)
    b_e_a = gl.where(b_m0, weights(b_x0, b_factor_a, b_shift_a, S), 0.0)
    b_e_b = gl.where(b_m1, weights(b_x1, b_factor_b, b_shift_a, S), 0.0)
    b_sum = lane_sum(b_e_a + b_e_b, LANES)
    b_p0 = operand(b_e_a, OPERAND)
    b_p1 = operand(b_e_b, OPERAND)

    # a tile's scale hangs on its number: both are loaded ahead, one turn and two
    tile0, tile1 = _tiles(p_list, 0, num_tiles, Nk, BLOCK_K, LISTED)
    scale0 = gl.load(p_scale + tile0, mask=tile0 < Nk, other=0.0)
    scale1 = gl.load(p_scale + tile1, mask=tile1 < Nk, other=0.0)
    tile0, tile1 = _tiles(p_list, 1, num_tiles, Nk, BLOCK_K, LISTED)
    wait_for(k_ready, 1, STAGES, all_pairs > 1)
    # scores past the last turn are formed too, of whatever lies there, and not used
    b_s = start_pair(q_tile, k_pairs, 1, SCORES, STAGES)
    wait_for(v_ready, 0, STAGES)
    b_new = start_values(in_order(b_p0), in_order(b_p1), b_acc, v_ring, 0, D, STAGES)
    b_s = warpgroup_mma_wait(2, deps=(b_s,))
    mbarrier.arrive(k_free.index(1 % STAGES))
    for n in range(1, num_plain):
        b_factor0 = b_scale * scale0
        b_factor1 = b_scale * scale1
        scale0 = gl.load(p_scale + tile0, mask=tile0 < Nk, other=0.0)
        scale1 = gl.load(p_scale + tile1, mask=tile1 < Nk, other=0.0)
        tile0, tile1 = _tiles(p_list, n + 1, num_tiles, Nk, BLOCK_K, LISTED)

        b_s0, b_s1 = halves(b_s, S)
        b_x0 = b_s0.to(gl.float32)
        b_x1 = b_s1.to(gl.float32)
        b_top = largest(b_s0, b_s1, b_factor0, b_factor1, LANES)
        b_s, b_new, b_max, b_sum = _turn(
            q_tile, k_pairs, v_ring, k_ready, k_free, v_ready, v_free, n, all_pairs,
            b_x0, b_x1, b_factor0, b_factor1, b_top, b_max, b_sum, b_new, False, 0.0, (),
            D, LANES, False, STAGES,
        )  # fmt: skip

    if HAS_BIAS:
        # tiles that may have a bias, and means
        tile0, tile1 = _turn_tiles(
            p_list, num_plain, num_tiles, num_pairs, num_listed, Nk, BLOCK_K, LISTED, HAS_TAIL
        )  # fmt: skip
        scale0 = gl.load(p_scale + tile0, mask=tile0 < Nk, other=0.0)
        scale1 = gl.load(p_scale + tile1, mask=tile1 < Nk, other=0.0)
        biased = is_biased(p_flags, tile0, tile1, Nk)
        next0, next1 = _turn_tiles(
            p_list, num_plain + 1, num_tiles, num_pairs, num_listed, Nk, BLOCK_K, LISTED, HAS_TAIL
        )  # fmt: skip
        for n in range(num_plain, all_pairs):
            b_factor0 = b_scale * scale0
            b_factor1 = b_scale * scale1
            here0 = tile0
            here1 = tile1
            here_biased = biased
            tile0 = next0
            tile1 = next1
            scale0 = gl.load(p_scale + tile0, mask=tile0 < Nk, other=0.0)
            scale1 = gl.load(p_scale + tile1, mask=tile1 < Nk, other=0.0)
            biased = is_biased(p_flags, tile0, tile1, Nk)
            next0, next1 = _turn_tiles(
                p_list, n + 2, num_tiles, num_pairs, num_listed, Nk, BLOCK_K, LISTED, HAS_TAIL
            )  # fmt: skip
            means = False
            weight = 0.0
            words = ()
            if HAS_TAIL:
                means = n >= num_pairs
                weight = gl.where(means & (here_biased == 0), LOG2_TILE, 0.0)
                words = load_words(p_words, n - num_pairs, here1 < Nk)
            b_s0, b_s1 = halves(b_s, S)
            b_x0 = b_s0.to(gl.float32)
            b_x1 = b_s1.to(gl.float32)
            if here_biased:
                b_x0 = biased_scores(b_x0, b_factor0, load_bias(p_bias, here0, Lk), S)
                b_x1 = biased_scores(b_x1, b_factor1, load_bias(p_bias, here1, Lk), S)
                b_factor0 = b_one
                b_factor1 = b_one
                b_top = gl.maximum(lane_max(b_x0, LANES), lane_max(b_x1, LANES))
            else:
                b_top = largest(b_s0, b_s1, b_factor0, b_factor1, LANES)
            b_s, b_new, b_max, b_sum = _turn(
                q_tile, k_pairs, v_ring, k_ready, k_free, v_ready, v_free, n, all_pairs,
                b_x0, b_x1, b_factor0, b_factor1, b_top, b_max, b_sum, b_new, means, weight, words,
                D, LANES, HAS_TAIL, STAGES,
            )  # fmt: skip

    b_acc = warpgroup_mma_wait(0, deps=(b_new,))
    b_sum = gl.sum(b_sum, 1)
    o_q = first_q + o_row
    b_lse = (b_max - WEIGHT_SHIFT + gl.log2(b_sum)) * LN_2
    b_lse += gl.load(q_shift + q_row + o_row)
    gl.store(lse + i_bh * Lq + o_q, b_lse, mask=o_q < Lq)
    b_norm = 1.0 / gl.where(b_sum == 0.0, 1.0, b_sum)
    b_norm = gl.convert_layout(b_norm, OUT_ROWS, assert_trivial=True)
    # a row without a key is zero
    b_any = gl.where(b_sum == 0.0, 0.0, 1.0)
    b_any = gl.convert_layout(b_any, OUT_ROWS, assert_trivial=True)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    b_v_scale = gl.load(v_scale + i_bh * D + o_d)
    b_v_mean = gl.load(v_mean + i_bh * D + o_d)
    b_acc = b_acc * b_norm[:, None] * b_v_scale[None, :] + b_any[:, None] * b_v_mean[None, :]
    o_row = first_q + gl.arange(0, TILE, layout=OUT_ROWS)
    o_to = o_row
    if HAS_ORDER:
        o_to = gl.load(p_order + o_row, mask=o_row < Lq, other=0)
    row = (i_b.to(gl.int64) * Lq + o_to) * H + i_h
    p_out = out + row[:, None] * D + o_d[None, :]
    gl.store(p_out, b_acc.to(dtype), mask=(o_row < Lq)[:, None])


@gluon.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        "lse", "key_bias", "bias_tiles", "q_scale", "q_shift", "k_scale", "v_scale", "v_mean",
        "kv_indices", "kv_num_blocks", "tail", "order",
    ],
)  # fmt: skip
def hopper_low_precision_kernel(
    q_desc, k_desc, v_desc, out, lse, key_bias, bias_tiles,
    q_scale, q_shift, k_scale, v_scale, v_mean, kv_indices, kv_num_blocks, tail, order,
    stride_ob, stride_oh, H, Lq, Lk, Nq, Nk, num_rows, list_stride, num_listed,
    D: gl.constexpr,
    BLOCK_K: gl.constexpr,
    LISTED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
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
    row = i_bh.to(gl.int64) * Nq + i_q
    if LISTED:
        p_list = kv_indices + row * list_stride
        num_blocks = gl.load(kv_num_blocks + row)
        if HAS_TAIL:
            # the means, which end every list, are read without it
            num_blocks -= gl.cdiv(num_listed, TILE)
        num_tiles = num_blocks * (BLOCK_K // TILE)
    else:
        p_list = lse  # not read
        num_tiles = Nk
    p_words = lse  # not read
    if HAS_TAIL:
        p_words = tail + row * (2 * gl.cdiv(num_listed, TILE))
    p_order = lse  # not read
    if HAS_ORDER:
        p_order = order + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
    # an empty list becomes one pair of missing tiles
    num_pairs = gl.maximum(gl.cdiv(num_tiles, 2), 1)
    all_pairs = num_pairs
    if HAS_TAIL:
        all_pairs += gl.cdiv(num_listed, 2 * TILE)

    dtype: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, TILE, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, 1, TILE, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [2 * STAGES, 1, 1, D, TILE], v_desc.layout)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BAR)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=CONSUMERS)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=CONSUMERS)

    # the tuples are written out: assigned to a name first, their constants would become tensors
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    q_tiles, k_ring, v_ring, q_ready, k_ready, k_free, v_ready, v_free,
                    p_list, num_tiles, num_pairs, all_pairs,
                    Lq, Lk, H, i_b, i_h, first_q, num_rows, Nk,
                    out, lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, v_scale, v_mean,
                    p_words, num_listed, p_order,
                    0, D, BLOCK_K, LISTED, HAS_BIAS, HAS_TAIL, HAS_ORDER, STAGES,
                )),
                (_consume, (
                    q_tiles, k_ring, v_ring, q_ready, k_ready, k_free, v_ready, v_free,
                    p_list, num_tiles, num_pairs, all_pairs,
                    Lq, Lk, H, i_b, i_h, first_q, num_rows, Nk,
                    out, lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, v_scale, v_mean,
                    p_words, num_listed, p_order,
                    1, D, BLOCK_K, LISTED, HAS_BIAS, HAS_TAIL, HAS_ORDER, STAGES,
                )),
                (_produce, (
                    q_desc, k_desc, v_desc, q_tiles, k_ring, v_ring,
                    q_ready, k_ready, k_free, v_ready, v_free,
                    p_list, num_tiles, num_pairs, all_pairs, num_listed, i_b, i_h, first_q, Nk,
                    D, BLOCK_K, LISTED, HAS_TAIL, CONSUMERS, STAGES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    q_tiles, k_ring, v_ring, q_ready, k_ready, k_free, v_ready, v_free,
                    p_list, num_tiles, num_pairs, all_pairs,
                    Lq, Lk, H, i_b, i_h, first_q, num_rows, Nk,
                    out, lse, key_bias, bias_tiles, q_scale, q_shift, k_scale, v_scale, v_mean,
                    p_words, num_listed, p_order,
                    0, D, BLOCK_K, LISTED, HAS_BIAS, HAS_TAIL, HAS_ORDER, STAGES,
                )),
                (_produce, (
                    q_desc, k_desc, v_desc, q_tiles, k_ring, v_ring,
                    q_ready, k_ready, k_free, v_ready, v_free,
                    p_list, num_tiles, num_pairs, all_pairs, num_listed, i_b, i_h, first_q, Nk,
                    D, BLOCK_K, LISTED, HAS_TAIL, CONSUMERS, STAGES,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip


def launch(
    x, out, lse, Lk, *, block_q, block_k=64, kv_indices=None, kv_num_blocks=None,
    key_bias=None, tail=None, num_listed=0, order=None, stages=None,
):  # fmt: skip
    """Run the kernel: over listed key blocks if there are lists, else over every key.

    Args:
        x: a `quantise.Quantised` with values in `key_order`; Lk: how many keys it has.
        block_q: 64 or 128 query rows a program, which is also the block size of the lists.
        tail: as `sparse_attention` takes it; the first `num_listed` blocks are tokens.
        order: [B, H, Lq] int32 with contiguous rows, or None.
    """
    B, H, Lq, D = out.shape
    Nq = triton.cdiv(Lq, block_q)
    listed = kv_indices is not None
    consumers = block_q // TILE.value
    if tail is not None:
        tail = tail_words(tail)
    hopper_low_precision_kernel[(B * H * Nq,)](
        source(x.q), source(x.k), source(x.v, D), out, lse,
        key_bias, bias_tiles(key_bias, Lk - num_listed * TILE.value if tail is not None else 0),
        x.q_scale, x.q_shift, x.k_scale, x.v_scale, x.v_mean,
        kv_indices, kv_num_blocks, tail, order,
        *((0, 0) if order is None else order.stride()[:2]),
        H, Lq, Lk, Nq, x.k_scale.shape[2], x.q.shape[2],
        kv_indices.shape[-1] if listed else 0, num_listed,
        D=D,
        BLOCK_K=block_k,
        LISTED=listed,
        HAS_BIAS=key_bias is not None,
        HAS_TAIL=tail is not None,
        HAS_ORDER=order is not None,
        CONSUMERS=consumers,
        STAGES=stages or (6 if consumers == 2 else 3),
        num_warps=4,
        # two programs share a multiprocessor when one has a single consumer
        maxnreg=128 if consumers == 1 else None,
    )  # fmt: skip
