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
from .softmax import LOG2_E, load_rows, mask_scores, matmul, raw_scores, store_rows, weights

# a row whose LSE fell by more than this (in log2) must not swamp its block row
MAX_DRIFT = tl.constexpr(16.0)

SIZES = [
    "stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl",
    "stride_vb", "stride_vh", "stride_vl", "stride_ob", "stride_oh",
    "H", "Lq", "Lk", "Nq", "Nk", "num_pooled",
]  # fmt: skip


@triton.jit
def _attend_pair(
    b_acc, b_max, b_sum, b_q, k, v, key_bias, bits, i_b, i_h, k0, k1,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, L, scale_log2,
    D: tl.constexpr, TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BITS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles that start at k0 and k1.

    The pair shares one maximum and one rescale of the accumulator. A tile that starts at L or past
    it counts for nothing, if the other one holds a key.

    Returns:
        b_acc, b_max, b_sum, and the row sums of both tiles relative to the new b_max.
    """
    # [TILE_K, D]
    b_k0 = load_rows(k, i_b, i_h, k0, stride_kb, stride_kh, stride_kl, L, TILE_K, D, RAGGED)
    b_k1 = load_rows(k, i_b, i_h, k1, stride_kb, stride_kh, stride_kl, L, TILE_K, D, RAGGED)
    # [BLOCK_Q, TILE_K]
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
    b_acc = b_acc * b_rescale[:, None]

    b_v0 = load_rows(v, i_b, i_h, k0, stride_vb, stride_vh, stride_vl, L, TILE_K, D, RAGGED)
    b_acc = matmul(b_p0.to(b_v0.dtype), b_v0, b_acc)
    b_v1 = load_rows(v, i_b, i_h, k1, stride_vb, stride_vh, stride_vl, L, TILE_K, D, RAGGED)
    b_acc = matmul(b_p1.to(b_v1.dtype), b_v1, b_acc)
    return b_acc, b_new, b_sum, b_sum0, b_sum1


@triton.jit
def _store_masses(
    p_masses, k0, Nk, b_max, b_previous, b_sum0, b_sum1, TILE_K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Masses of the key blocks that a pair of tiles makes up, the first of which starts at k0."""
    b_share = tl.exp2(tl.minimum(b_max - b_previous, MAX_DRIFT))
    i_k = k0 // BLOCK_K
    if BLOCK_K == TILE_K:
        # both columns at once: one reduction across warps instead of two
        b_mass = tl.sum(tl.join(b_sum0 * b_share, b_sum1 * b_share), 0)
        o_k = i_k + tl.arange(0, 2)
        tl.store(p_masses + o_k, b_mass, mask=o_k < Nk)
    else:
        tl.store(p_masses + i_k, tl.sum((b_sum0 + b_sum1) * b_share, 0))


@triton.jit
def _tile_first(p_list, t, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, LISTED: tl.constexpr):
    """First key of the t-th tile, of all or of a list of key blocks."""
    first = t * TILE_K
    if LISTED:
        PARTS: tl.constexpr = BLOCK_K // TILE_K
        first = tl.load(p_list + t // PARTS) * BLOCK_K + (t % PARTS) * TILE_K
    return first


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
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    LISTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASSES: tl.constexpr,
    HAS_POOLED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_bh, i_q = pid // Nq, pid % Nq
    i_b, i_h = i_bh // H, i_bh % H
    row = i_bh.to(tl.int64) * Nq + i_q
    first_q = i_q * BLOCK_Q
    o_q = first_q + tl.arange(0, BLOCK_Q)
    if HAS_BIAS:
        key_bias += i_b.to(tl.int64) * Lk
    p_list = kv_indices
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
    if HAS_MASSES:
        p_masses += row * Nk
        b_previous = tl.load(
            previous_lse + i_bh.to(tl.int64) * Lq + o_q, mask=o_q < Lq, other=float("inf")
        )
        # a row that had no key then, or lies past Lq, has no share
        b_previous = tl.where(b_previous == float("-inf"), float("inf"), b_previous) * LOG2_E

    # [BLOCK_Q, D]
    b_q = load_rows(
        q, i_b, i_h, first_q, stride_qb, stride_qh, stride_ql, Lq, BLOCK_Q, D, RAGGED=True
    )
    b_acc = tl.zeros([BLOCK_Q, D], dtype=tl.float32)
    b_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    for t in tl.range(0, num_whole // 2 * 2, 2):
        k0 = _tile_first(p_list, t, BLOCK_K, TILE_K, LISTED)
        k1 = _tile_first(p_list, t + 1, BLOCK_K, TILE_K, LISTED)
        b_acc, b_max, b_sum, b_sum0, b_sum1 = _attend_pair(
            b_acc, b_max, b_sum, b_q, k, v, key_bias, bits, i_b, i_h, k0, k1,
            stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, Lk, scale_log2,
            D, TILE_K, HAS_BIAS, False, RAGGED=False,
        )  # fmt: skip
        if HAS_MASSES:
            _store_masses(p_masses, k0, Nk, b_max, b_previous, b_sum0, b_sum1, TILE_K, BLOCK_K)
    # an odd tile, and those of a block that runs past Lk
    for t in tl.range(num_whole // 2 * 2, num_tiles, 2, num_stages=1):
        k0 = _tile_first(p_list, t, BLOCK_K, TILE_K, LISTED)
        k1 = Lk
        if t + 1 < num_tiles:
            k1 = _tile_first(p_list, t + 1, BLOCK_K, TILE_K, LISTED)
        b_acc, b_max, b_sum, b_sum0, b_sum1 = _attend_pair(
            b_acc, b_max, b_sum, b_q, k, v, key_bias, bits, i_b, i_h, k0, k1,
            stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, Lk, scale_log2,
            D, TILE_K, HAS_BIAS, False, RAGGED=True,
        )  # fmt: skip
        if HAS_MASSES:
            _store_masses(p_masses, k0, Nk, b_max, b_previous, b_sum0, b_sum1, TILE_K, BLOCK_K)
    if HAS_POOLED:
        p_bits = bits + row * tl.cdiv(num_pooled, 8)
        p_sizes = log_sizes + i_b.to(tl.int64) * num_pooled
        # strides of contiguous means, in units of 8 elements
        stride_h = num_pooled.to(tl.int64) * (D // 8)
        for t in tl.range(0, tl.cdiv(num_pooled, TILE_K), 2):
            k0 = t * TILE_K
            b_acc, b_max, b_sum, _, _ = _attend_pair(
                b_acc, b_max, b_sum, b_q, k_mean, v_mean, p_sizes, p_bits, i_b, i_h, k0, k0 + TILE_K,
                H * stride_h, stride_h, D // 8, H * stride_h, stride_h, D // 8, num_pooled,
                scale_log2, D, TILE_K, True, True, RAGGED=True,
            )  # fmt: skip

    if HAS_ORDER:
        order += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    store_rows(out, lse, b_acc, b_max, b_sum, i_b, i_h, H, Lq, o_q, order, D, HAS_ORDER)


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
            BLOCK_Q=tile.tile_q,
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
    q, k, v, *, scale, key_bias=None, mask=None, pooled=None, order=None, tile=None
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
    block_q, block_k = (64, 64) if mask is None else (mask.block_q, mask.block_k)
    if x.out.numel():
        _launch(x, scale, tile or tiles.attention(tiles.card_of(q.device), block_q), block_k)
    return x.out, x.lse


def attention_with_masses(
    q, k, v, *, scale, previous_lse, block_q, block_k, key_bias=None, tile=None
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
    tile = tile or tiles.attention(tiles.card_of(q.device), block_q)
    yields = tile.tile_q, min(block_k, 2 * tile.tile_k)
    masses = empty_masses(q, k, *yields)
    if x.out.numel():
        _launch(x, scale, tile, yields[1], previous_lse, masses)
    masses = to_granularity(masses, q.shape[2], yields, (block_q, block_k), renormalise=True)
    return x.out, x.lse, masses
