"""Quantised attention for Hopper in Gluon, sparse or dense: INT8 scores, FP8 values.

The shape of it is that of `attention`: a producer warp streams pairs of 64-key tiles, each consumer
warpgroup owns 64 query rows, and the last pair, the only one to mask, goes first.
What differs:
- Keys and values have a ring each: scores of turn n + 1 are formed before the values of turn n.
- The tensor cores want both operands contiguous along the keys, so values lie transposed.
- The weights reach them from registers, where eight-bit operands lie in another order than the
  scores: `quantise.key_order` permutes the values to match, and no lane has to trade.
- Eight-bit weights are packed while the tensor cores still read those of the turn before, so they
  change registers once more after that (`in_order`).
- Tiles without a bias have a loop of their own, which ends at the first listed tile with one. Looking
  for a bias and rescaling in every turn took 11 to 14 % longer where there was one.
The tensor cores add up FP8 products in about 14 bits; a float32 sum for every pair of tiles was no
more accurate (relative error 0.0520, against 0.0522, on 23,800 random keys) and took 23 % longer.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from .. import tiles
from ..triton import launch
from ..triton.operands import operands_of
from ..triton.quantise import quantise
from ..triton.softmax import LN_2
from .pipeline import (
    TILE,
    aggregate,
    bias_flags,
    load_words,
    log2_block,
    make_queries,
    make_ring,
    make_work,
    mask_words,
    source,
    store_output,
    uneven_flags,
)
from .quantised_ops import (
    WEIGHT_SHIFT,
    biased_scores,
    first_biased,
    halves,
    in_order,
    lane_max,
    lane_sum,
    largest,
    load_bias,
    of_pair,
    operand,
    scores_with_bias,
    start_pair,
    start_values,
    take_turn,
    tile_pair,
    weights,
)

# a maximum that any score exceeds
LOWEST = gl.constexpr(-1e30)
# renamed after Triton 3.6
_memory = gl.shared_memory_descriptor
_reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret

SIZES = ["H", "Lq", "Lk", "Nq", "num_rows", "num_pooled", "stride_ob", "stride_oh"]


@aggregate
class Tensors:
    """What a consumer reads and writes beside the tiles; pointers that a call lacks are None."""

    q_scale: gl.tensor
    q_shift: gl.tensor
    k_scale: gl.tensor
    v_scale: gl.tensor
    v_mean: gl.tensor
    key_bias: gl.tensor | gl.constexpr
    bias_flags: gl.tensor | gl.constexpr
    pooled_k_scale: gl.tensor | gl.constexpr
    log_sizes: gl.tensor | gl.constexpr
    uneven_flags: gl.tensor | gl.constexpr
    words: gl.tensor | gl.constexpr
    order: gl.tensor | gl.constexpr
    out: gl.tensor
    lse: gl.tensor
    H: gl.tensor
    Lq: gl.tensor
    Lk: gl.tensor
    Nq: gl.tensor
    num_rows: gl.tensor
    num_pooled: gl.tensor
    stride_ob: gl.tensor
    stride_oh: gl.tensor


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, pooled_k_desc, pooled_v_desc, queries, k_ring, v_ring, work,
    D: gl.constexpr,
):  # fmt: skip
    queries.load(q_desc, work)
    # a missing tile is read past the end: zeros
    v0, v1 = tile_pair(work, work.num_pairs - 1)
    k_ring.load(k_desc, 0, work, v0 * TILE, v1 * TILE)
    for n in range(1, work.num_pairs):
        k0, k1 = tile_pair(work, n - 1)
        k_ring.load(k_desc, n, work, k0 * TILE, k1 * TILE)
        v_ring.load(v_desc, n - 1, work, v0 * D, v1 * D)
        v0 = k0
        v1 = k1
    n = work.num_pairs
    if pooled_k_desc is None:
        v_ring.load(v_desc, n - 1, work, v0 * D, v1 * D)
    else:
        k_ring.load(pooled_k_desc, n, work, 0, TILE)
        v_ring.load(v_desc, n - 1, work, v0 * D, v1 * D)
        for i in range(1, work.num_pooled_pairs):
            first = 2 * i * TILE
            k_ring.load(pooled_k_desc, n + i, work, first, first + TILE)
            first = 2 * (i - 1) * D
            v_ring.load(pooled_v_desc, n + i - 1, work, first, first + D)
        first = 2 * (work.num_pooled_pairs - 1) * D
        v_ring.load(pooled_v_desc, n + work.num_pooled_pairs - 1, work, first, first + D)


@gluon.jit
def _consume(queries, k_ring, v_ring, work, x, CONSUMER: gl.constexpr, D: gl.constexpr):
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
    STAGES: gl.constexpr = k_ring.STAGES
    HAS_BIAS: gl.constexpr = x.key_bias is not None
    HAS_POOLED: gl.constexpr = x.log_sizes is not None

    first_q = work.first_q + CONSUMER * TILE
    i_bh = work.i_bh.to(gl.int64)
    num_pairs = work.num_pairs
    Nk = work.Lk // TILE
    Lk = x.Lk
    o_row = gl.arange(0, TILE, layout=ROWS)
    # the padding of the queries has rows too; scores * b_scale * k_scale are in units of log2
    q_row = i_bh * x.num_rows + first_q
    b_scale = gl.load(x.q_scale + q_row + o_row)
    p_scale = x.k_scale + i_bh * Nk
    PAIR: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=D, element_bitwidth=8, rank=2)
    k_pairs = _reinterpret(k_ring.tiles, k_ring.tiles.dtype, [STAGES, 2 * TILE, D], PAIR)
    b_acc = gl.zeros([TILE, D], gl.float32, OUT)
    num_plain = num_pairs
    turns = num_pairs
    if HAS_POOLED:
        turns += work.num_pooled_pairs
    if HAS_BIAS:
        p_bias = x.key_bias + work.i_b.to(gl.int64) * Lk
        p_flags = x.bias_flags + work.i_b.to(gl.int64) * Nk
        num_plain = gl.minimum(num_pairs, first_biased(work, p_flags) // 2 + 1)

    # the last pair, the only one to mask
    tile_a, tile_b = tile_pair(work, num_pairs - 1)
    scale_a, scale_b = of_pair(p_scale, tile_a, tile_b, Nk, 0.0)
    q_tile = queries.wait(CONSUMER, D)
    k_ring.wait(0)
    b_first = start_pair(q_tile, k_pairs, 0, SCORES, STAGES)
    b_first = warpgroup_mma_wait(0, deps=(b_first,))
    k_ring.release(0)
    b_s_a, b_s_b = halves(b_first, S)
    o_k = gl.arange(0, TILE, layout=S_COLS)
    b_x0 = b_s_a.to(gl.float32)
    b_x1 = b_s_b.to(gl.float32)
    b_factor_a = b_scale * scale_a
    b_factor_b = b_scale * scale_b
    if HAS_BIAS:
        b_x0 = biased_scores(b_x0, b_factor_a, load_bias(p_bias, tile_a, Lk), S)
        b_x1 = biased_scores(b_x1, b_factor_b, load_bias(p_bias, tile_b, Lk), S)
        b_factor_a = gl.full([TILE], 1.0, gl.float32, ROWS)
        b_factor_b = b_factor_a
    b_m0 = (tile_a * TILE + o_k < Lk)[None, :]
    b_m1 = (tile_b * TILE + o_k < Lk)[None, :]
    b_top_a = gl.max(lane_max(gl.where(b_m0, b_x0, float("-inf")), LANES), 1)
    b_top_b = gl.max(lane_max(gl.where(b_m1, b_x1, float("-inf")), LANES), 1)
    # -inf times a scale of 0 would be NaN
    b_top_a = gl.where(b_top_a == float("-inf"), b_top_a, b_top_a * b_factor_a)
    b_top_b = gl.where(b_top_b == float("-inf"), b_top_b, b_top_b * b_factor_b)
    b_max = gl.maximum(b_top_a, b_top_b)
    if HAS_BIAS or HAS_POOLED:
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
    tile0, tile1 = tile_pair(work, 0)
    scale0, scale1 = of_pair(p_scale, tile0, tile1, Nk, 0.0)
    tile0, tile1 = tile_pair(work, 1)
    k_ring.wait(1, turns > 1)
    # scores past the last turn are formed too, of whatever lies there, and not used
    b_s = start_pair(q_tile, k_pairs, 1, SCORES, STAGES)
    v_ring.wait(0)
    b_new = start_values(in_order(b_p0), in_order(b_p1), b_acc, v_ring, 0, D)
    b_s = warpgroup_mma_wait(2, deps=(b_s,))
    k_ring.release(1)
    for n in range(1, num_plain):
        b_factor0 = b_scale * scale0
        b_factor1 = b_scale * scale1
        scale0, scale1 = of_pair(p_scale, tile0, tile1, Nk, 0.0)
        tile0, tile1 = tile_pair(work, n + 1)

        b_s0, b_s1 = halves(b_s, S)
        b_x0 = b_s0.to(gl.float32)
        b_x1 = b_s1.to(gl.float32)
        b_top = largest(b_s0, b_s1, b_factor0, b_factor1, LANES)
        b_new, b_max, b_sum, b_s = take_turn(
            b_new, b_max, b_sum, b_x0, b_x1, b_factor0, b_factor1, b_top, 0.0, (),
            q_tile, k_pairs, k_ring, v_ring, n, turns, D, LANES, False,
        )  # fmt: skip

    if HAS_BIAS:
        # tiles that may have a bias; that of a missing tile hides it
        tile0, tile1 = tile_pair(work, num_plain - 1)
        scale0, scale1 = of_pair(p_scale, tile0, tile1, Nk, 0.0)
        flag0, flag1 = of_pair(p_flags, tile0, tile1, Nk, 1)
        next0, next1 = tile_pair(work, num_plain)
        for n in range(num_plain, num_pairs):
            b_factor0 = b_scale * scale0
            b_factor1 = b_scale * scale1
            here0 = tile0
            here1 = tile1
            biased = flag0 | flag1
            tile0 = next0
            tile1 = next1
            scale0, scale1 = of_pair(p_scale, tile0, tile1, Nk, 0.0)
            flag0, flag1 = of_pair(p_flags, tile0, tile1, Nk, 1)
            next0, next1 = tile_pair(work, n + 1)
            b_x0, b_x1, b_factor0, b_factor1, b_top = scores_with_bias(
                b_s, b_factor0, b_factor1, biased, p_bias, here0, here1, Lk, S, LANES
            )  # fmt: skip
            b_new, b_max, b_sum, b_s = take_turn(
                b_new, b_max, b_sum, b_x0, b_x1, b_factor0, b_factor1, b_top, 0.0, (),
                q_tile, k_pairs, k_ring, v_ring, n, turns, D, LANES, False,
            )  # fmt: skip

    if HAS_POOLED:
        Np = gl.cdiv(x.num_pooled, TILE)
        p_scale = x.pooled_k_scale + i_bh * Np
        p_words = x.words + (i_bh * x.Nq + work.i_q) * (2 * Np)
        p_sizes = x.log_sizes + work.i_b.to(gl.int64) * x.num_pooled
        if HAS_BIAS:
            p_uneven = x.uneven_flags + work.i_b.to(gl.int64) * Np
        scale0, scale1 = of_pair(p_scale, 0, 1, Np, 0.0)
        for i in range(work.num_pooled_pairs):
            b_factor0 = b_scale * scale0
            b_factor1 = b_scale * scale1
            scale0, scale1 = of_pair(p_scale, 2 * i + 2, 2 * i + 3, Np, 0.0)
            uneven = i == work.num_pooled_pairs - 1
            if HAS_BIAS:
                flag0, flag1 = of_pair(p_uneven, 2 * i, 2 * i + 1, Np, 1)
                uneven = (flag0 | flag1) != 0
            words = load_words(p_words, i, 2 * Np)
            b_x0, b_x1, b_factor0, b_factor1, b_top = scores_with_bias(
                b_s, b_factor0, b_factor1, uneven, p_sizes, 2 * i, 2 * i + 1, x.num_pooled, S, LANES
            )  # fmt: skip
            b_new, b_max, b_sum, b_s = take_turn(
                b_new, b_max, b_sum, b_x0, b_x1, b_factor0, b_factor1, b_top,
                gl.where(uneven, 0.0, log2_block(work.BLOCK_K)), words,
                q_tile, k_pairs, k_ring, v_ring, num_pairs + i, turns, D, LANES, True,
            )  # fmt: skip

    b_acc = warpgroup_mma_wait(0, deps=(b_new,))
    b_sum = gl.sum(b_sum, 1)
    o_q = first_q + o_row
    b_lse = (b_max - WEIGHT_SHIFT + gl.log2(b_sum)) * LN_2
    b_lse += gl.load(x.q_shift + q_row + o_row)
    gl.store(x.lse + i_bh * x.Lq + o_q, b_lse, mask=o_q < x.Lq)
    b_norm = 1.0 / gl.where(b_sum == 0.0, 1.0, b_sum)
    b_norm = gl.convert_layout(b_norm, OUT_ROWS, assert_trivial=True)
    # a row without a key is zero
    b_any = gl.where(b_sum == 0.0, 0.0, 1.0)
    b_any = gl.convert_layout(b_any, OUT_ROWS, assert_trivial=True)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    b_v_scale = gl.load(x.v_scale + i_bh * D + o_d)
    b_v_mean = gl.load(x.v_mean + i_bh * D + o_d)
    b_acc = b_acc * b_norm[:, None] * b_v_scale[None, :] + b_any[:, None] * b_v_mean[None, :]
    store_output(x, work, first_q, b_acc, D)


@gluon.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        "q_scale", "q_shift", "k_scale", "v_scale", "v_mean", "key_bias", "bias_flags",
        "kv_indices", "kv_num_blocks", "words", "pooled_k_scale", "log_sizes", "uneven_flags",
        "order", "lse",
    ],
)  # fmt: skip
def hopper_quantised_attention_kernel(
    q_desc, k_desc, v_desc, pooled_k_desc, pooled_v_desc,
    q_scale, q_shift, k_scale, v_scale, v_mean, key_bias, bias_flags,
    kv_indices, kv_num_blocks, words, pooled_k_scale, log_sizes, uneven_flags, order, out, lse,
    H, Lq, Lk, Nq, num_rows, num_pooled, stride_ob, stride_oh,
    D: gl.constexpr,
    BLOCK_K: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    # keys are padded to whole tiles
    work = make_work(
        Nq, H, gl.cdiv(Lk, TILE) * TILE, kv_indices, kv_num_blocks, num_pooled, CONSUMERS * TILE,
        BLOCK_K,
    )  # fmt: skip
    queries = make_queries(q_desc, D, CONSUMERS)
    k_ring = make_ring(k_desc, TILE, D, CONSUMERS, STAGES)
    v_ring = make_ring(v_desc, D, TILE, CONSUMERS, STAGES)
    x = Tensors(
        q_scale, q_shift, k_scale, v_scale, v_mean, key_bias, bias_flags, pooled_k_scale, log_sizes,
        uneven_flags, words, order, out, lse, H, Lq, Lk, Nq, num_rows, num_pooled,
        stride_ob, stride_oh,
    )  # fmt: skip
    # the tuples are written out: assigned to a name first, their constants would become tensors
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (queries, k_ring, v_ring, work, x, 0, D)),
                (_consume, (queries, k_ring, v_ring, work, x, 1, D)),
                (_produce, (
                    q_desc, k_desc, v_desc, pooled_k_desc, pooled_v_desc, queries, k_ring, v_ring,
                    work, D,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (queries, k_ring, v_ring, work, x, 0, D)),
                (_produce, (
                    q_desc, k_desc, v_desc, pooled_k_desc, pooled_v_desc, queries, k_ring, v_ring,
                    work, D,
                )),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip


def quantised_attention(
    q, k, v, *, scale, key_bias=None, mask=None, pooled=None, order=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `triton.quantised_attention.quantised_attention`."""
    x = operands_of(q, k, v, key_bias=key_bias, mask=mask, pooled=pooled, order=order)
    B, H, Lq, Lk, D = x.sizes
    if x.out.numel() == 0:
        return x.out, x.lse
    if Lk == 0:
        return x.out.zero_(), x.lse.fill_(float("-inf"))
    tile = tiles.hopper_quantised_attention(128 if mask is None else mask.block_q)
    Nq = triton.cdiv(Lq, tile.tile_q)
    block_k = TILE.value if mask is None else mask.block_k
    with launch.on_device(q):
        y = quantise(
            x.q, x.k, x.v, scale=float(scale), values=torch.float8_e4m3fn, key_bias=x.key_bias,
            pooled=x.pooled,
        )  # fmt: skip
        hopper_quantised_attention_kernel[(B * H * Nq,)](
            source(y.q), source(y.k), source(y.v, D), source(y.pooled_k), source(y.pooled_v, D),
            y.q_scale, y.q_shift, y.k_scale, y.v_scale, y.v_mean,
            x.key_bias, bias_flags(x.key_bias), x.kv_indices, x.kv_num_blocks,
            mask_words(x),
            y.pooled_k_scale, x.pooled_tensors[2], uneven_flags(x, block_k), x.order,
            x.out, x.lse,
            H, Lq, Lk, Nq, y.q.shape[2], x.num_pooled, *x.order_strides,
            D=D,
            BLOCK_K=block_k,
            **tile.options,
        )  # fmt: skip
    return x.out, x.lse
