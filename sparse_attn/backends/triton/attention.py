"""Dense attention, or sparse attention over the key blocks that each query block lists.

One program owns a block of query rows of one head and walks the keys, two tiles at a time: the pair
shares one maximum, one rescale of the accumulator and one row sum. Scores and weights never reach
memory.

With a pooled tail (Sol-Attn's, arXiv 2607.24027) the mean key and value of every key block, weighted by
the block's number of keys, stand for those that are not listed. They have a launch of their own, whose
output and LSE the next one begins with: in one kernel both loops would have too few registers.

Dense attention can yield block masses in the same pass. A tile's row sum is known relative to the
running maximum m: with the LSE of an earlier step at hand, `rowsum * exp(m - previous_lse)` is that
row's share of the block's mass, one exponential per row and block instead of a second pass over the
keys. The earlier LSE is a little off, so every row of blocks is scaled to its number of query rows.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from . import launch
from .mass_granularity import empty_masses, to_granularity
from .operands import Operands, operands_of
from .softmax import (
    LOG2_E,
    MAX_MASS,
    bias_scores,
    hide_past,
    load_tile,
    matmul,
    neighbours,
    output_rows,
    raw_scores,
    store_lse,
    store_tile,
    weights,
)

# a row whose LSE fell by more than this (in log2) must not swamp its block row
MAX_DRIFT = tl.constexpr(16.0)
# rows and keys of a block whose mass is found on the way
MASS_BLOCK = 64

SIZES = [
    "stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl",
    "stride_vb", "stride_vh", "stride_vl", "stride_ob", "stride_oh",
    "H", "Lq", "Lk", "Nq", "Nk",
]  # fmt: skip


@triton.jit
def _attend_pair(
    b_acc0, b_acc1, b_max, b_sum, b_q, k, v, key_bias, bits, i_b, i_h, k0,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, L, scale_log2,
    D: tl.constexpr, TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BITS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Online softmax over two tiles of keys from k0 on, at an EDGE some of them past L.

    The pair shares one maximum and one rescale of the accumulators.

    Returns:
        b_acc0, b_acc1, b_max, b_sum, and the row sums of the pair relative to the new b_max.
    """
    COLS: tl.constexpr = b_acc0.shape[1]
    k1 = k0 + TILE_K
    # 0, but the compiler cannot know: it would keep the rows' offsets in registers, which then spill
    zero = k0 >> 30
    stride_kl += zero
    stride_vl += zero
    o_k0 = tl.arange(0, TILE_K)
    o_k1 = o_k0
    if EDGE:
        # past the end the last key again, finite wherever it counts
        o_k0 = tl.minimum(o_k0, L - 1 - k0)
        o_k1 = tl.minimum(o_k1, L - 1 - k1)
    # [TILE_K, D]
    b_k0 = load_tile(k, i_b, i_h, k0, o_k0, 0, stride_kb, stride_kh, stride_kl, L, D, False)
    b_k1 = load_tile(k, i_b, i_h, k1, o_k1, 0, stride_kb, stride_kh, stride_kl, L, D, False)
    # [TILE_Q, TILE_K]
    b_s0 = raw_scores(b_q, b_k0)
    b_s1 = raw_scores(b_q, b_k1)
    if HAS_BIAS:
        b_s0 = bias_scores(b_s0, scale_log2, key_bias, bits, k0, L, TILE_K, HAS_BITS, EDGE)
        b_s1 = bias_scores(b_s1, scale_log2, key_bias, bits, k1, L, TILE_K, HAS_BITS, EDGE)
        b_new = tl.maximum(b_max, tl.max(tl.maximum(b_s0, b_s1), 1))
        # a row may have met only keys at -inf so far
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
    else:
        if EDGE:
            b_s0 = hide_past(b_s0, k0, L, TILE_K)
            b_s1 = hide_past(b_s1, k1, L, TILE_K)
        b_new = tl.maximum(b_max, tl.max(tl.maximum(b_s0, b_s1), 1) * scale_log2)
        b_pivot = b_new
    b_p0 = weights(b_s0, b_pivot, scale_log2, HAS_BIAS)
    b_p1 = weights(b_s1, b_pivot, scale_log2, HAS_BIAS)
    b_rescale = tl.exp2(b_max - b_pivot)
    b_both = tl.sum(b_p0 + b_p1, 1)
    b_sum = b_sum * b_rescale + b_both

    b_p0, b_p1 = b_p0.to(v.dtype.element_ty), b_p1.to(v.dtype.element_ty)
    # [TILE_K, COLS]
    b_v0 = load_tile(v, i_b, i_h, k0, o_k0, 0, stride_vb, stride_vh, stride_vl, L, COLS, False)
    b_acc0 = matmul(b_p0, b_v0, b_acc0 * b_rescale[:, None])
    b_v1 = load_tile(v, i_b, i_h, k1, o_k1, 0, stride_vb, stride_vh, stride_vl, L, COLS, False)
    b_acc0 = matmul(b_p1, b_v1, b_acc0)
    if D > COLS:
        b_v0 = load_tile(
            v, i_b, i_h, k0, o_k0, COLS, stride_vb, stride_vh, stride_vl, L, COLS, False
        )
        b_acc1 = matmul(b_p0, b_v0, b_acc1 * b_rescale[:, None])
        b_v1 = load_tile(
            v, i_b, i_h, k1, o_k1, COLS, stride_vb, stride_vh, stride_vl, L, COLS, False
        )
        b_acc1 = matmul(b_p1, b_v1, b_acc1)
    return b_acc0, b_acc1, b_new, b_sum, b_both


@triton.jit
def _store_shares(
    b_both, b_max, b_previous, b_before, p_masses, k0, i_mass, num_masses, Nk, end,
    TILE_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add to the masses of the block that holds k0 once this turn's keys complete it.

    Each of four warps adds what its rows have, at most two to one mass, which was zero: none waits
    for another, and a + b is b + a.

    Returns:
        The rows' shares so far, which the next turn takes as b_before.
    """
    b_shares = b_both * tl.exp2(tl.minimum(b_max - b_previous, MAX_DRIFT))
    if 2 * TILE_K < BLOCK_K:
        b_shares += tl.where(k0 % BLOCK_K == 0, 0.0, b_before)
    # the interpreter counts loops in Python's integers
    past = tl.full([], k0, tl.int32) + 2 * TILE_K
    # none before the block is complete
    num_masses = tl.where((past % BLOCK_K == 0) | (past >= end), num_masses, 0)
    ROWS: tl.constexpr = b_both.shape[0] // 4
    b_masses = tl.reshape(b_shares, [ROWS // 16, 4, 16])
    b_masses = tl.sum(tl.reshape(tl.permute(b_masses, [1, 0, 2]), [4, ROWS]), 1)
    b_masses = tl.where(b_masses > MAX_MASS, MAX_MASS, b_masses)
    o_mass = tl.arange(0, 4) * ROWS // BLOCK_K
    tl.atomic_add(
        p_masses + k0 // BLOCK_K + o_mass.to(tl.int64) * Nk, b_masses,
        mask=i_mass + o_mass < num_masses, sem="relaxed",
    )  # fmt: skip
    return b_shares


@triton.jit
def _first_key(
    p_list, t, num_blocks, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, LISTED: tl.constexpr
):  # fmt: skip
    """First key of tile t of all or of a list of key blocks."""
    if LISTED:
        PARTS: tl.constexpr = BLOCK_K // TILE_K
        i = t // PARTS
        i_k = tl.load(p_list + i, mask=i < num_blocks, other=0)
        return i_k * BLOCK_K + t % PARTS * TILE_K
    return t * TILE_K


@triton.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        "lse", "key_bias", "previous_lse", "masses", "kv_indices",
        "kv_num_blocks", "bits", "order",
    ],
)  # fmt: skip
def _attention_kernel(
    q, k, v, key_bias, kv_indices, kv_num_blocks, bits, order, previous_lse, out, lse, masses,
    stride_qb, stride_qh, stride_ql,
    stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_ob, stride_oh,
    H, Lq, Lk, Nq, Nk,
    scale_log2,
    D: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    LISTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_MASSES: tl.constexpr,
    CONTINUES: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):  # fmt: skip
    # no wider than the lowest tile is high, or the warps would not own whole rows of scores
    COLS: tl.constexpr = 64
    pid = tl.program_id(0)
    i_bh, i_q = pid // Nq, pid % Nq
    i_b, i_h = i_bh // H, i_bh % H
    row = i_bh.to(tl.int64) * Nq + i_q
    o_tile = tl.arange(0, TILE_Q)
    if HAS_MASSES:
        o_tile = neighbours(TILE_Q)
    o_q = i_q * TILE_Q + o_tile
    if HAS_BIAS:
        key_bias += i_b.to(tl.int64) * Lk
    p_list = kv_indices
    num_blocks = 0
    num_whole = Lk // BLOCK_K
    # keys of a block that runs past Lk
    first_edge = num_whole * BLOCK_K
    past_edge = Lk
    if LISTED:
        p_list += row * Nk
        num_blocks = tl.load(kv_num_blocks + row)
        # the list ascends
        last = tl.load(p_list + num_blocks - 1, mask=num_blocks > 0, other=-1)
        past_edge = tl.where(last == num_whole, Lk, first_edge)
        num_whole = num_blocks - tl.where(last == num_whole, 1, 0)
    p_masses = masses
    b_previous = None
    # the blocks of masses are as high as wide
    i_mass = i_q * (TILE_Q // BLOCK_K)
    num_masses = tl.cdiv(Lq, BLOCK_K)
    if HAS_MASSES:
        p_masses += (i_bh.to(tl.int64) * num_masses + i_mass) * Nk
        b_previous = tl.load(
            previous_lse + i_bh.to(tl.int64) * Lq + o_q, mask=o_q < Lq, other=float("inf")
        )
        # a row that had no key then, or lies past Lq, has no share
        b_previous = tl.where(b_previous == float("-inf"), float("inf"), b_previous) * LOG2_E

    # [TILE_Q, D]
    b_q = load_tile(
        q, i_b, i_h, i_q * TILE_Q, o_tile, 0, stride_qb, stride_qh, stride_ql, Lq, D, RAGGED=True
    )
    b_acc0 = tl.zeros([TILE_Q, COLS], dtype=tl.float32)
    b_acc1 = tl.zeros([TILE_Q, COLS], dtype=tl.float32)
    b_max = tl.full([TILE_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([TILE_Q], dtype=tl.float32)
    if HAS_BITS:
        bits += row * tl.cdiv(Lk, 8)
    if HAS_ORDER:
        order += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    if CONTINUES:
        b_max = tl.load(lse + i_bh.to(tl.int64) * Lq + o_q, mask=o_q < Lq, other=0.0) * LOG2_E
        b_sum += 1.0
        m_q = (o_q < Lq)[:, None]
        p_out = output_rows(out, i_b, i_h, H, Lq, o_q, 0, order, D, COLS, HAS_ORDER)
        b_acc0 = tl.load(p_out, mask=m_q, other=0.0).to(tl.float32)
        if D > COLS:
            b_acc1 = tl.load(p_out + COLS, mask=m_q, other=0.0).to(tl.float32)
    b_before = b_sum
    # first what is masked, by smaller tiles: the loop that matters gets all registers
    EDGE_K: tl.constexpr = 16
    for k0 in tl.range(first_edge, past_edge, 2 * EDGE_K, num_stages=1):
        b_acc0, b_acc1, b_max, b_sum, b_both = _attend_pair(
            b_acc0, b_acc1, b_max, b_sum, b_q, k, v, key_bias, bits, i_b, i_h, k0,
            stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, Lk, scale_log2,
            D, EDGE_K, HAS_BIAS, HAS_BITS, EDGE=True,
        )  # fmt: skip
        if HAS_MASSES:
            b_before = _store_shares(
                b_both, b_max, b_previous, b_before, p_masses, k0, i_mass, num_masses, Nk,
                past_edge, EDGE_K, BLOCK_K,
            )  # fmt: skip
    # known a turn ahead, or no load of keys could run ahead of the turn that uses them
    following = _first_key(p_list, 0, num_blocks, BLOCK_K, TILE_K, LISTED)
    for t in tl.range(0, num_whole * (BLOCK_K // TILE_K), 2):
        k0 = following
        following = _first_key(p_list, t + 2, num_blocks, BLOCK_K, TILE_K, LISTED)
        b_acc0, b_acc1, b_max, b_sum, b_both = _attend_pair(
            b_acc0, b_acc1, b_max, b_sum, b_q, k, v, key_bias, bits, i_b, i_h, k0,
            stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, Lk, scale_log2,
            D, TILE_K, HAS_BIAS, HAS_BITS, EDGE=False,
        )  # fmt: skip
        if HAS_MASSES:
            b_before = _store_shares(
                b_both, b_max, b_previous, b_before, p_masses, k0, i_mass, num_masses, Nk,
                Lk, TILE_K, BLOCK_K,
            )  # fmt: skip

    # a row without a key has sum 0: its output is zero
    b_share = 1 / tl.where(b_sum == 0.0, 1.0, b_sum)
    store_tile(out, b_acc0 * b_share[:, None], i_b, i_h, H, Lq, o_q, 0, order, D, COLS, HAS_ORDER)
    if D > COLS:
        store_tile(
            out, b_acc1 * b_share[:, None], i_b, i_h, H, Lq, o_q, COLS, order, D, COLS, HAS_ORDER
        )
    store_lse(lse, b_max, b_sum, i_b, i_h, H, Lq, o_q)


def _launch(
    x: Operands, scale, tile: tiles.Tile, block_k: int, *, tail=False, continues=False,
    previous_lse=None, masses=None,
):  # fmt: skip
    """Run the kernel.

    Args:
        block_k: of the mask or of the masses.
        tail: over the means of the blocks that the mask leaves out.
        continues: from what `x.out` and `x.lse` hold already.
    """
    B, H, Lq, _, D = x.sizes
    k, v, key_bias, mask = x.k, x.v, x.key_bias, x.mask
    if tail:
        (k, v, key_bias), mask = x.pooled_tensors, None
    Lk, Nq = k.shape[2], triton.cdiv(Lq, tile.tile_q)
    with launch.on_device(x.q):
        _attention_kernel[(B * H * Nq,)](
            x.q, k, v, key_bias, mask and x.kv_indices, mask and x.kv_num_blocks,
            x.bits if tail else None, x.order, previous_lse, x.out, x.lse, masses,
            *launch.row_strides(x.q), *launch.row_strides(k), *launch.row_strides(v),
            *x.order_strides, H, Lq, Lk, Nq, triton.cdiv(Lk, block_k),
            float(scale) * LOG2_E.value,
            D=D,
            TILE_Q=tile.tile_q,
            BLOCK_K=block_k,
            TILE_K=tile.tile_k,
            LISTED=mask is not None,
            HAS_BIAS=key_bias is not None,
            HAS_BITS=tail,
            HAS_MASSES=masses is not None,
            CONTINUES=continues,
            HAS_ORDER=x.order is not None,
            **tile.options,
        )  # fmt: skip


def attention(
    q, k, v, *, scale, key_bias=None, mask=None, pooled=None, order=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys, or over the blocks that a mask keeps and the means of the others.

    Args:
        q: [B, H, Lq, D] float16 or bfloat16; any strides, copied only if D is not contiguous.
        k, v: [B, H, Lk, D].
        scale: positive factor of the scores.
        key_bias: [B, Lk] float32 added to the scaled scores, or None.
        mask: a `BlockMask` of q's and k's blocks; None is dense.
        pooled: a `Pooled` of k and v, one key for every block that a row does not keep, or None.
        order: [B, H, Lq] int32, the token at every place of q, any strides of batch and heads;
            `out` is in the order of the tokens.
        tile: a `tiles.Tile` in place of the table's, for benchmarks.

    Returns:
        out [B, H, Lq, D] viewed on [B, Lq, H, D], and lse [B, H, Lq] float32 in the order of q.
        A row without a key is zero, its lse -inf.
    """
    x = operands_of(q, k, v, key_bias=key_bias, mask=mask, pooled=pooled, order=order)
    # without lists the larger one is faster
    block_q, block_k = (128, 64) if mask is None else (mask.block_q, mask.block_k)
    if x.out.numel():
        card, D = tiles.card_of(q.device), q.shape[3]
        if pooled is not None:
            tile = tiles.attention(card, block_q, D, tail=True)
            _launch(x, scale, tile, MASS_BLOCK, tail=True)
        tile = tiles.attention(card, block_q, D)
        _launch(x, scale, tile, block_k, continues=pooled is not None)
    return x.out, x.lse


def attention_with_masses(
    q, k, v, *, scale, previous_lse, block_q, block_k, key_bias=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over all keys, and block masses by an earlier step's LSE.

    Args:
        previous_lse: [B, H, Lq] float32 from a step whose scores were much the same.
        block_q, block_k: granularity of the masses. The others are those of `attention`.

    Returns:
        out, lse, and masses [B, H, Nq, Nk] float32 whose rows sum to their number of query rows.
    """
    x = operands_of(q, k, v, key_bias=key_bias)
    previous_lse = launch.checked(previous_lse, "previous_lse", q.shape[:3])
    tile = tiles.attention(tiles.card_of(q.device), 128, q.shape[3])
    found = (MASS_BLOCK, MASS_BLOCK)
    masses = empty_masses(q, k, *found).zero_()
    if x.out.numel():
        _launch(x, scale, tile, MASS_BLOCK, previous_lse=previous_lse, masses=masses)
    masses = to_granularity(masses, q.shape[2], found, (block_q, block_k), renormalise=True)
    return x.out, x.lse, masses
