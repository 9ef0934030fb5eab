"""Pieces of `quantised_attention`: products of eight-bit tiles, their scores and weights, a turn."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from ..triton.softmax import LOG2_E
from .pipeline import TILE, is_listed

# log2(448): the largest weight of a row becomes the largest number of FP8 (e4m3)
WEIGHT_SHIFT = gl.constexpr(8.807354922057604)
PACK = gl.constexpr("""{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {high, low};
}""")
# numbers of the accumulator that a lane rescales or leaves at once, two of either row by turns
RESCALED = gl.constexpr(32)
RESCALE = gl.constexpr(
    """{
.reg .pred any;
setp.neu.f32 any, $64, 0f3F800000;
setp.neu.or.f32 any, $66, 0f3F800000, any;
vote.sync.any.pred any, any, 0xffffffff;
@!any bra.uni done;
"""
    + "".join(f"mul.f32 ${i}, ${i}, ${66 if i & 2 else 64};\n" for i in range(32))
    + "done:\n}"
)
RESCALE_OPERANDS = gl.constexpr(",".join(["=f"] * 32 + [str(i) for i in range(32)] + ["f"] * 32))


@gluon.jit
def start_pair(q_tile, k_pairs, turn, SCORES: gl.constexpr, STAGES: gl.constexpr):
    """Start the products with both tiles of this turn: [64, 128]."""
    b_k = k_pairs.index(turn % STAGES).permute((1, 0))
    b_zero = gl.zeros([TILE, 2 * TILE], gl.int32, SCORES)
    return warpgroup_mma(q_tile, b_k, b_zero, use_acc=False, is_async=True)


@gluon.jit
def halves(b_x, S: gl.constexpr):
    """[64, 128] as the [64, 64] of either tile."""
    b_x0, b_x1 = gl.split(b_x.reshape([TILE, 2, TILE]).permute((0, 2, 1)))
    return (
        gl.convert_layout(b_x0, S, assert_trivial=True),
        gl.convert_layout(b_x1, S, assert_trivial=True),
    )


@gluon.jit
def lane_max(b_s, LANES: gl.constexpr):
    """[64, 4]: the largest of what each lane holds of a row."""
    b_m = gl.max(gl.max(b_s.reshape([TILE, TILE // 8, 4, 2]), 3), 1)
    return gl.convert_layout(b_m, LANES, assert_trivial=True)


@gluon.jit
def largest(b_s0, b_s1, b_factor0, b_factor1, LANES: gl.constexpr):
    """[64, 4]: the largest scaled score that each lane holds of a row."""
    b_top0 = lane_max(b_s0, LANES).to(gl.float32) * b_factor0[:, None]
    b_top1 = lane_max(b_s1, LANES).to(gl.float32) * b_factor1[:, None]
    return gl.maximum(b_top0, b_top1)


@gluon.jit
def lane_sum(b_e, LANES: gl.constexpr):
    """[64, 4]: the sum of what each lane holds of a row."""
    b_m = gl.sum(gl.sum(b_e.reshape([TILE, TILE // 8, 4, 2]), 3), 1)
    return gl.convert_layout(b_m, LANES, assert_trivial=True)


@gluon.jit
def first_biased(work, p_flags):
    """Place in the list of the first tile of which some key has a bias."""
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    CHUNK: gl.constexpr = 512
    o_t = gl.arange(0, CHUNK, layout=FLAT)
    b_first = gl.full([CHUNK], 2**30, gl.int32, FLAT)
    for t in range(0, work.num_tiles, CHUNK):
        b_t = t + o_t
        b_key = work.tile_first(b_t)
        m_t = (b_t < work.num_tiles) & (b_key < work.Lk)
        b_flag = gl.load(p_flags + b_key // TILE, mask=m_t, other=0)
        b_first = gl.where(b_flag, gl.minimum(b_first, b_t), b_first)
    return gl.min(b_first, 0)


@gluon.jit
def tile_pair(work, n):
    """Numbers of both tiles of the n-th pair; past the last tile for one past the end."""
    first0, first1 = work.pair(n)
    return first0 // TILE, first1 // TILE


@gluon.jit
def of_pair(p_tiles, tile0, tile1, num_tiles, other):
    """What is known of both tiles, and `other` of those past the last tile."""
    of0 = gl.load(p_tiles + tile0, mask=tile0 < num_tiles, other=other)
    return of0, gl.load(p_tiles + tile1, mask=tile1 < num_tiles, other=other)


@gluon.jit
def load_bias(p_bias, tile, Lk):
    """[TILE] bias of a tile in units of log2, each lane one key; -inf past the end."""
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_k = tile * TILE + gl.arange(0, TILE, layout=FLAT)
    return gl.load(p_bias + o_k, mask=o_k < Lk, other=float("-inf")) * LOG2_E


@gluon.jit
def biased_scores(b_x, b_factor, b_bias, S: gl.constexpr):
    """Scaled scores with their bias."""
    b_factor = gl.convert_layout(b_factor, gl.SliceLayout(1, S), assert_trivial=True)
    b_bias = gl.convert_layout(b_bias, gl.SliceLayout(0, S))
    return gl.fma(b_x, b_factor[:, None], b_bias[None, :])


@gluon.jit
def weights(b_x, b_factor, b_shift, S: gl.constexpr):
    """exp2 of the scaled scores relative to the pivot."""
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    b_factor = gl.convert_layout(b_factor, ROWS, assert_trivial=True)
    b_shift = gl.convert_layout(b_shift, ROWS, assert_trivial=True)
    return gl.exp2(gl.fma(b_x, b_factor[:, None], b_shift[:, None]))


@gluon.jit
def operand(b_e, OPERAND: gl.constexpr):
    """Weights as FP8 in the registers the tensor cores read them from: no lane trades any."""
    b_e = b_e.reshape([TILE, TILE // 16, 2, 4, 2])
    # the order of quantise.key_order
    b_e = b_e.permute((0, 1, 3, 2, 4)).reshape([TILE, TILE])
    b_e = gl.convert_layout(b_e, OPERAND, assert_trivial=True)
    # four to a register at once; volatile: the compiler must not sink the pack to its use
    return gl.inline_asm_elementwise(
        PACK, "=r,f,f,f,f", [b_e], dtype=gl.float8e4nv, is_pure=False, pack=4
    )


@gluon.jit
def in_order(b_p):
    """The weights of `operand`, halves swapped back, in registers of their own.

    The tensor cores still read the registers of the turn before while `operand` fills the next.
    """
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $1, 0x1032;", "=r,r", [b_p], dtype=gl.float8e4nv, is_pure=False, pack=4
    )


@gluon.jit
def start_values(b_p0, b_p1, b_acc, v_ring, turn, D: gl.constexpr):
    """Start b_acc + P V with the values of this turn, which lie transposed."""
    v0 = v_ring.tile(turn, 0, D, TILE).permute((1, 0))
    v1 = v_ring.tile(turn, 1, D, TILE).permute((1, 0))
    b_acc = warpgroup_mma(b_p0, v0, b_acc, is_async=True)
    return warpgroup_mma(b_p1, v1, b_acc, is_async=True)


@gluon.jit
def rescaled(b_acc, b_rescale):
    """b_acc times b_rescale of the rows, left alone where a warp has nothing but 1 to multiply by."""
    return gl.inline_asm_elementwise(
        RESCALE, RESCALE_OPERANDS, [b_acc, b_rescale[:, None]], dtype=gl.float32,
        is_pure=False, pack=RESCALED,
    )  # fmt: skip


@gluon.jit
def scores_with_bias(
    b_s, b_factor0, b_factor1, biased, p_bias, tile0, tile1, L, S: gl.constexpr, LANES: gl.constexpr
):  # fmt: skip
    """Scores of both tiles, what scales them, and the largest scaled one of each lane, [64, 4].

    Where they are `biased`, scores come back scaled.
    """
    b_s0, b_s1 = halves(b_s, S)
    b_x0 = b_s0.to(gl.float32)
    b_x1 = b_s1.to(gl.float32)
    if biased:
        b_x0 = biased_scores(b_x0, b_factor0, load_bias(p_bias, tile0, L), S)
        b_x1 = biased_scores(b_x1, b_factor1, load_bias(p_bias, tile1, L), S)
        b_factor0 = gl.full([TILE], 1.0, gl.float32, gl.SliceLayout(1, LANES))
        b_factor1 = b_factor0
        b_top = gl.maximum(lane_max(b_x0, LANES), lane_max(b_x1, LANES))
    else:
        b_top = largest(b_s0, b_s1, b_factor0, b_factor1, LANES)
    return b_x0, b_x1, b_factor0, b_factor1, b_top


@gluon.jit
def take_turn(
    b_new, b_max, b_sum, b_x0, b_x1, b_factor0, b_factor1, b_top, weight, words,
    q_tile, k_pairs, k_ring, v_ring, n, turns, D: gl.constexpr, LANES: gl.constexpr,
    POOLED: gl.constexpr,
):  # fmt: skip
    """Turn n: exponentiate its scores b_x, start its P V, and form the scores of turn n + 1.

    b_top, [64, 4], is the largest score of each lane, b_new the P V that was started last. Keys of a
    POOLED turn count `weight` more, and those of listed blocks, by the bits in `words`, not at all.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 4)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)

    # meanwhile the tensor cores form P V of the turn before
    b_top = gl.max(b_top, 1)
    if POOLED:
        # means of listed blocks count here: with its weight, such a mean lies below the log of what
        # its block has added already
        b_top += weight
    b_top = gl.maximum(b_max, b_top)
    b_shift = WEIGHT_SHIFT - b_top
    if POOLED:
        b_shift = (WEIGHT_SHIFT + weight) - b_top
    b_e0 = weights(b_x0, b_factor0, b_shift, S)
    b_e1 = weights(b_x1, b_factor1, b_shift, S)
    if POOLED:
        o_k = gl.arange(0, TILE, layout=gl.SliceLayout(0, S))
        b_e0 = gl.where(is_listed(words[0], words[1], o_k)[None, :], 0.0, b_e0)
        b_e1 = gl.where(is_listed(words[2], words[3], o_k)[None, :], 0.0, b_e1)
    b_rescale = gl.exp2(b_max - b_top)
    b_sum = b_sum * b_rescale[:, None] + lane_sum(b_e0 + b_e1, LANES)
    b_w0 = operand(b_e0, OPERAND)
    b_w1 = operand(b_e1, OPERAND)

    # this wait's branch keeps the exponentials above the wait for P V, where they cost nothing
    k_ring.wait(n + 1, n + 1 < turns)
    b_acc = warpgroup_mma_wait(0, deps=(b_new,))
    b_s = start_pair(q_tile, k_pairs, n + 1, SCORES, k_ring.STAGES)
    v_ring.release(n - 1)
    b_acc = rescaled(b_acc, gl.convert_layout(b_rescale, OUT_ROWS, assert_trivial=True))
    v_ring.wait(n)
    b_new = start_values(in_order(b_w0), in_order(b_w1), b_acc, v_ring, n, D)
    b_s = warpgroup_mma_wait(2, deps=(b_s,))
    k_ring.release(n + 1)
    return b_new, b_top, b_sum, b_s
