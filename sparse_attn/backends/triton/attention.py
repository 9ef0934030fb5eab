"""Dense attention, or sparse attention over the key blocks that each query block lists.

One program owns a block of query rows of one head and walks the keys, two tiles at a time: the pair
shares one maximum, one rescale of the accumulator and one row sum. Scores and weights never reach
memory.

With a pooled tail (Sol-Attn's, arXiv 2607.24027) the mean key and value of every key block follow,
weighted by the block's number of keys; those of listed blocks are masked.

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
    gather_masses,
    load_tile,
    mask_scores,
    matmul,
    neighbours,
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
    "H", "Lq", "Lk", "Nq", "Nk", "num_pooled",
]  # fmt: skip


@triton.jit
def _attend_pair(
    b_acc0, b_acc1, b_max, b_sum, b_q, k, v, key_bias, bits, i_b, i_h, k0, k1,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, L, scale_log2,
    D: tl.constexpr, TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BITS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles that start at k0 and k1.

    The pair shares one maximum and one rescale of the accumulators. A tile that starts at L or past
    it counts for nothing, if the other one holds a key.

    Returns:
        b_acc0, b_acc1, b_max, b_sum, and the row sums of both tiles relative to the new b_max.
    """
    COLS: tl.constexpr = b_acc0.shape[1]
    o_k = tl.arange(0, TILE_K)
    # [TILE_K, D]
    b_k0 = load_tile(k, i_b, i_h, k0, o_k, 0, stride_kb, stride_kh, stride_kl, L, D, RAGGED)
    b_k1 = load_tile(k, i_b, i_h, k1, o_k, 0, stride_kb, stride_kh, stride_kl, L, D, RAGGED)
    # [TILE_Q, TILE_K]
    b_s0 = raw_scores(b_q, b_k0)
    b_s1 = raw_scores(b_q, b_k1)
    b_s0 = mask_scores(
        b_s0, scale_log2, key_bias, bits, k0, L, TILE_K, HAS_BIAS, HAS_BITS, RAGGED
    )  # fmt: skip
    b_s1 = mask_scores(
        b_s1, scale_log2, key_bias, bits, k1, L, TILE_K, HAS_BIAS, HAS_BITS, RAGGED
    )  # fmt: skip

    b_top = tl.max(tl.maximum(b_s0, b_s1), 1)
    if HAS_BIAS:
        b_new = tl.maximum(b_max, b_top)
        # a row may have met only keys at -inf so far
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
    else:
        b_new = tl.maximum(b_max, b_top * scale_log2)
        b_pivot = b_new
    b_p0 = weights(b_s0, b_pivot, scale_log2, HAS_BIAS)
    b_p1 = weights(b_s1, b_pivot, scale_log2, HAS_BIAS)
    b_rescale = tl.exp2(b_max - b_pivot)
    b_sum0 = tl.sum(b_p0, 1)
    b_sum1 = tl.sum(b_p1, 1)
    b_sum = b_sum * b_rescale + (b_sum0 + b_sum1)

    b_p0, b_p1 = b_p0.to(v.dtype.element_ty), b_p1.to(v.dtype.element_ty)
    # [TILE_K, COLS]
    b_v0 = load_tile(v, i_b, i_h, k0, o_k, 0, stride_vb, stride_vh, stride_vl, L, COLS, RAGGED)
    b_acc0 = matmul(b_p0, b_v0, b_acc0 * b_rescale[:, None])
    b_v1 = load_tile(v, i_b, i_h, k1, o_k, 0, stride_vb, stride_vh, stride_vl, L, COLS, RAGGED)
    b_acc0 = matmul(b_p1, b_v1, b_acc0)
    if D > COLS:
        b_v0 = load_tile(
            v, i_b, i_h, k0, o_k, COLS, stride_vb, stride_vh, stride_vl, L, COLS, RAGGED
        )  # fmt: skip
        b_acc1 = matmul(b_p0, b_v0, b_acc1 * b_rescale[:, None])
        b_v1 = load_tile(
            v, i_b, i_h, k1, o_k, COLS, stride_vb, stride_vh, stride_vl, L, COLS, RAGGED
        )  # fmt: skip
        b_acc1 = matmul(b_p1, b_v1, b_acc1)
    return b_acc0, b_acc1, b_new, b_sum, b_sum0, b_sum1


@triton.jit
def _pair(
    p_list, t, num_blocks, past, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, LISTED: tl.constexpr
):  # fmt: skip
    """First keys of tiles t and t + 1, t even, of all or of a list of key blocks; `past` its end."""
    k0 = t * TILE_K
    k1 = k0 + TILE_K
    if LISTED:
        PARTS: tl.constexpr = BLOCK_K // TILE_K
        i = t // PARTS
        k0 = tl.load(p_list + i, mask=i < num_blocks, other=past) * BLOCK_K + t % PARTS * TILE_K
        k1 = k0 + TILE_K
        if PARTS == 1:
            k1 = tl.load(p_list + i + 1, mask=i + 1 < num_blocks, other=past) * BLOCK_K
    return k0, k1


@triton.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        "k_mean", "v_mean", "log_sizes", "lse", "key_bias", "previous_lse", "masses", "kv_indices",
        "kv_num_blocks", "bits", "order",
    ],
)  # fmt: skip
def _attention_kernel(
    q, k, v, key_bias, k_mean, v_mean, log_sizes, kv_indices, kv_num_blocks, bits, order,
    previous_lse, out, lse, masses,
    stride_qb, stride_qh, stride_ql,
    stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_ob, stride_oh,
    H, Lq, Lk, Nq, Nk, num_pooled,
    scale_log2,
    D: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    LISTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASSES: tl.constexpr,
    HAS_POOLED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):  # fmt: skip
    # no wider than high, or the warps would not own whole rows of scores
    COLS: tl.constexpr = D if D < TILE_Q else TILE_Q
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
    num_tiles = tl.cdiv(Lk, TILE_K)
    num_whole = Lk // TILE_K
    if LISTED:
        PARTS: tl.constexpr = BLOCK_K // TILE_K
        p_list += row * Nk
        num_blocks = tl.load(kv_num_blocks + row)
        # the list ascends, so only its last block can run past Lk
        last = tl.load(p_list + num_blocks - 1, mask=num_blocks > 0, other=-1)
        num_tiles = num_blocks * PARTS
        num_whole = num_tiles - tl.where((last + 1) * BLOCK_K > Lk, PARTS, 0)
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
    HELD: tl.constexpr = 32
    b_held = tl.zeros([TILE_Q // 32, HELD], dtype=tl.float32)
    past = Lk // BLOCK_K + 1
    # known a turn ahead, or no load of keys could run ahead of the turn that uses them
    next0, next1 = _pair(p_list, 0, num_blocks, past, BLOCK_K, TILE_K, LISTED)
    for t in tl.range(0, num_whole // 2 * 2, 2):
        k0, k1 = next0, next1
        next0, next1 = _pair(p_list, t + 2, num_blocks, past, BLOCK_K, TILE_K, LISTED)
        b_acc0, b_acc1, b_max, b_sum, b_sum0, b_sum1 = _attend_pair(
            b_acc0, b_acc1, b_max, b_sum, b_q, k, v, key_bias, bits, i_b, i_h, k0, k1,
            stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, Lk, scale_log2,
            D, TILE_K, HAS_BIAS, False, RAGGED=False,
        )  # fmt: skip
        if HAS_MASSES:
            b_shares = (b_sum0 + b_sum1) * tl.exp2(tl.minimum(b_max - b_previous, MAX_DRIFT))
            end = (t + 2) * TILE_K
            b_held = gather_masses(
                b_held, b_shares, p_masses, t * TILE_K // BLOCK_K,
                (end % (HELD * BLOCK_K) == 0) | (t + 2 >= num_tiles), i_mass, num_masses, Nk,
                TILE_Q, BLOCK_K, HELD,
            )  # fmt: skip
    # an odd tile, and those of a block that runs past Lk
    for t in tl.range(num_whole // 2 * 2, num_tiles, 2, num_stages=1):
        k0, k1 = _pair(p_list, t, num_blocks, past, BLOCK_K, TILE_K, LISTED)
        b_acc0, b_acc1, b_max, b_sum, b_sum0, b_sum1 = _attend_pair(
            b_acc0, b_acc1, b_max, b_sum, b_q, k, v, key_bias, bits, i_b, i_h, k0, k1,
            stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, Lk, scale_log2,
            D, TILE_K, HAS_BIAS, False, RAGGED=True,
        )  # fmt: skip
        if HAS_MASSES:
            b_shares = (b_sum0 + b_sum1) * tl.exp2(tl.minimum(b_max - b_previous, MAX_DRIFT))
            end = (t + 2) * TILE_K
            b_held = gather_masses(
                b_held, b_shares, p_masses, t * TILE_K // BLOCK_K,
                (end % (HELD * BLOCK_K) == 0) | (t + 2 >= num_tiles), i_mass, num_masses, Nk,
                TILE_Q, BLOCK_K, HELD,
            )  # fmt: skip
    if HAS_POOLED:
        p_bits = bits + row * tl.cdiv(num_pooled, 8)
        p_sizes = log_sizes + i_b.to(tl.int64) * num_pooled
        # strides of contiguous means, in units of 8 elements
        stride_h = num_pooled.to(tl.int64) * (D // 8)
        for k0 in tl.range(0, num_pooled, 2 * TILE_K):
            b_acc0, b_acc1, b_max, b_sum, _, _ = _attend_pair(
                b_acc0, b_acc1, b_max, b_sum, b_q, k_mean, v_mean, p_sizes, p_bits, i_b, i_h,
                k0, k0 + TILE_K,
                H * stride_h, stride_h, D // 8, H * stride_h, stride_h, D // 8, num_pooled,
                scale_log2, D, TILE_K, True, True, RAGGED=True,
            )  # fmt: skip

    if HAS_ORDER:
        order += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    # a row without a key has sum 0: its output is zero
    b_share = 1 / tl.where(b_sum == 0.0, 1.0, b_sum)
    store_tile(out, b_acc0 * b_share[:, None], i_b, i_h, H, Lq, o_q, 0, order, D, COLS, HAS_ORDER)
    if D > COLS:
        store_tile(
            out, b_acc1 * b_share[:, None], i_b, i_h, H, Lq, o_q, COLS, order, D, COLS, HAS_ORDER
        )
    store_lse(lse, b_max, b_sum, i_b, i_h, H, Lq, o_q)


def _launch(x: Operands, scale, tile: tiles.Tile, block_k: int, previous_lse=None, masses=None):
    """Run the kernel; `block_k` is that of the mask or of the masses."""
    B, H, Lq, Lk, D = x.sizes
    Nq = triton.cdiv(Lq, tile.tile_q)
    with launch.on_device(x.q):
        _attention_kernel[(B * H * Nq,)](
            x.q, x.k, x.v, x.key_bias, *x.pooled_tensors, x.kv_indices, x.kv_num_blocks, x.bits,
            x.order, previous_lse, x.out, x.lse, masses,
            *launch.row_strides(x.q), *launch.row_strides(x.k), *launch.row_strides(x.v),
            *x.order_strides, H, Lq, Lk, Nq, triton.cdiv(Lk, block_k), x.num_pooled,
            float(scale) * LOG2_E.value,
            D=D,
            TILE_Q=tile.tile_q,
            BLOCK_K=block_k,
            TILE_K=tile.tile_k,
            LISTED=x.mask is not None,
            HAS_BIAS=x.key_bias is not None,
            HAS_MASSES=masses is not None,
            HAS_POOLED=x.pooled is not None,
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
        _launch(x, scale, tiles.attention(tiles.card_of(q.device), block_q, q.shape[3]), block_k)
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
    # a bias takes registers, which spill with 128 rows
    rows = 128 if key_bias is None else 64
    tile = tiles.attention(tiles.card_of(q.device), rows, q.shape[3])
    found = (MASS_BLOCK, MASS_BLOCK)
    masses = empty_masses(q, k, *found).zero_()
    if x.out.numel():
        _launch(x, scale, tile, MASS_BLOCK, previous_lse, masses)
    masses = to_granularity(masses, q.shape[2], found, (block_q, block_k), renormalise=True)
    return x.out, x.lse, masses
