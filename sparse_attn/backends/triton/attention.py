"""Block-sparse attention: every query block attends to its own list of key blocks.

One program owns `TILE_Q` query rows of one head and walks the list of their query block, two key
tiles at a time: the pair shares one maximum, one rescale of the accumulator and one row sum.
Scores and weights never reach memory.

With a pooled tail (Sol-Attn's, arXiv 2607.24027) the mean key and value of every block stand
behind the tokens as pseudo keys, weighted by a key bias; each row of blocks lists all of them,
and those whose block it lists too are masked.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from . import launch as inputs
from .dense_attention import dense_attention
from .softmax import LOG2_E, attend_pair, load_rows, store_rows
from .unpack_mask import listed

SIZES = [
    "stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl",
    "stride_vb", "stride_vh", "stride_vl", "stride_ob", "stride_oh", "H", "Lq", "Lk", "Nq",
    "list_stride", "first_pseudo", "num_listed",
]  # fmt: skip


@triton.jit
def _tile_first(p_list, t, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr):
    """First key of the t-th tile of a list of key blocks."""
    PARTS: tl.constexpr = BLOCK_K // TILE_K
    return tl.load(p_list + t // PARTS) * BLOCK_K + (t % PARTS) * TILE_K


@triton.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        "kv_indices", "kv_num_blocks", "lse", "key_bias", "tail", "order",
    ],
)  # fmt: skip
def _sparse_attention_kernel(
    q, k, v, out, lse, key_bias,
    kv_indices, kv_num_blocks, tail, order,
    stride_qb, stride_qh, stride_ql,
    stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_ob, stride_oh,
    H, Lq, Lk, Nq, list_stride, first_pseudo, num_listed,
    scale_log2,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    tiles_per_head = Nq * (BLOCK_Q // TILE_Q)
    pid = tl.program_id(0)
    i_bh, i_tile = pid // tiles_per_head, pid % tiles_per_head
    i_b, i_h = i_bh // H, i_bh % H
    first_q = i_tile * TILE_Q
    if HAS_BIAS:
        key_bias += i_b.to(tl.int64) * Lk

    row = i_bh.to(tl.int64) * Nq + i_tile // (BLOCK_Q // TILE_Q)
    p_list = kv_indices + row * list_stride
    num_blocks = tl.load(kv_num_blocks + row)
    p_listed = lse  # not read
    if HAS_TAIL:
        p_listed = tail + row * tl.cdiv(num_listed, 8)
    # the list ascends, so only its last block can run past Lk
    last = tl.load(p_list + num_blocks - 1, mask=num_blocks > 0, other=-1)
    num_tiles = num_blocks * (BLOCK_K // TILE_K)
    num_whole = num_tiles - tl.where((last + 1) * BLOCK_K > Lk, BLOCK_K // TILE_K, 0)

    # [TILE_Q, D]
    b_q = load_rows(
        q, i_b, i_h, first_q, stride_qb, stride_qh, stride_ql, Lq, TILE_Q, D, TMA, RAGGED=True
    )
    b_acc = tl.zeros([TILE_Q, D], dtype=tl.float32)
    b_max = tl.full([TILE_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([TILE_Q], dtype=tl.float32)

    for t in tl.range(0, num_whole // 2 * 2, 2):
        k0 = _tile_first(p_list, t, BLOCK_K, TILE_K)
        k1 = _tile_first(p_list, t + 1, BLOCK_K, TILE_K)
        b_acc, b_max, b_sum, _, _ = attend_pair(
            b_q, b_acc, b_max, b_sum,
            k, v, i_b, i_h, k0, k1,
            stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
            Lk, key_bias, scale_log2,
            D, TILE_K, HAS_BIAS, TMA, False, p_listed, first_pseudo, num_listed, HAS_TAIL,
        )  # fmt: skip

    # at most one turn: the odd tile and the ragged one
    for t in tl.range(num_whole // 2 * 2, num_tiles, 2, num_stages=1):
        k0 = _tile_first(p_list, t, BLOCK_K, TILE_K)
        k1 = Lk
        if t + 1 < num_tiles:
            k1 = _tile_first(p_list, t + 1, BLOCK_K, TILE_K)
        b_acc, b_max, b_sum, _, _ = attend_pair(
            b_q, b_acc, b_max, b_sum,
            k, v, i_b, i_h, k0, k1,
            stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
            Lk, key_bias, scale_log2,
            D, TILE_K, HAS_BIAS, TMA, True, p_listed, first_pseudo, num_listed, HAS_TAIL,
        )  # fmt: skip

    if HAS_ORDER:
        order += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    o_q = first_q + tl.arange(0, TILE_Q)
    store_rows(out, lse, b_acc, b_sum, b_max, i_b, i_h, H, Lq, o_q, D, order, HAS_ORDER)


def attention(q, k, v, *, scale, key_bias=None, mask=None, pooled=None, order=None):
    """Attention over all keys, or over the blocks that a mask keeps and the means of the others.

    Args:
        q: [B, H, Lq, D] float16 or bfloat16; k, v: [B, H, Lk, D].
        scale: positive factor of the scores.
        key_bias: [B, Lk] float32 added to the scaled scores, or None.
        mask: a `BlockMask` of q's and k's blocks; None is dense.
        pooled: `Pooled` of k and v, or None.
        order: [B, H, Lq] int32, the token at every place of q; `out` is in the order of the tokens.

    Returns:
        out [B, H, Lq, D] viewed on [B, Lq, H, D], and lse [B, H, Lq] float32 in the order of q.
        A row without a key is zero, its lse -inf.
    """
    if mask is None:
        return dense_attention(q, k, v, scale=scale, key_bias=key_bias)[:2]
    return sparse_attention(
        q, scale=scale, block_q=mask.block_q, block_k=mask.block_k, order=order,
        **listed(k, v, key_bias, mask, pooled),
    )  # fmt: skip


def attention_with_masses(q, k, v, *, scale, previous_lse, block_q, block_k, key_bias=None):
    """Attention over all keys, and block masses by an earlier step's LSE.

    Args:
        previous_lse: [B, H, Lq] float32. The others are those of `attention`.

    Returns:
        out, lse, and masses [B, H, Nq, Nk] float32 whose rows sum to their number of query rows.
    """
    return dense_attention(
        q, k, v, scale=scale, key_bias=key_bias, previous_lse=previous_lse, block_q=block_q,
        block_k=block_k,
    )  # fmt: skip


def sparse_attention(
    q, k, v, kv_indices, kv_num_blocks, *, block_q, block_k, scale, key_bias=None,
    tail=None, order=None, tile=None,
):  # fmt: skip
    """Attention of each query block over its listed key blocks.

    Args:
        q: [B, H, Lq, D] float16 or bfloat16; any strides, copied only if D is not contiguous.
        k, v: [B, H, Lk, D].
        kv_indices: [B, H, Nq, K] int32, key-block numbers, ascending, packed left.
        kv_num_blocks: [B, H, Nq] int32, how many of the K count; 0 is allowed.
        scale: positive factor of the scores.
        key_bias: [B, Lk] float32 added to the scaled scores, or None.
        tail: [B, H, Nq, ceil(N / 8)] uint8, the lists as bits, where k and v are N blocks of 64
            tokens and then a mean of each, padded to blocks of 64 with a bias of -inf, as
            `arrange` writes them; the lists hold every block of means. None without means.
        order: [B, H, Lq] int32, the token at every place of q, any strides of batch and heads;
            `out` is in the order of the tokens.
        tile: a `tiles.Tile` in place of the table's, for benchmarks.

    Returns:
        out [B, H, Lq, D] viewed on [B, Lq, H, D], and lse [B, H, Lq] float32 in the order of q.
        A row without a key is zero, its lse -inf.
    """
    inputs.refuse(why_not(q, k, v, block_q, block_k))
    B, H, Lq, D = q.shape
    Lk = k.shape[2]
    Nq = triton.cdiv(Lq, block_q)
    if kv_num_blocks.shape != (B, H, Nq) or kv_indices.shape[:3] != (B, H, Nq):
        raise ValueError(
            f"`kv_num_blocks` must be [{B}, {H}, {Nq}] for {Lq} tokens in blocks of {block_q}, "
            f"got {list(kv_num_blocks.shape)}; `kv_indices` is {list(kv_indices.shape)}."
        )
    q, k, v = inputs.aligned(q), inputs.aligned(k), inputs.aligned(v)
    key_bias = inputs.checked_bias(key_bias, B, Lk)
    num_listed, tail = inputs.checked_tail(tail, Lk, kv_num_blocks.shape, block_k, key_bias)
    order_strides = 0, 0
    if order is not None:
        order = inputs.checked_order(order, q)
        order_strides = order.stride()[:2]
    kv_indices = kv_indices.to(torch.int32).contiguous()
    kv_num_blocks = kv_num_blocks.to(torch.int32).contiguous()
    tile = tile or tiles.choose("sparse", q, block_q, block_k)

    out = inputs.empty_output(q)
    lse = torch.empty((B, H, Lq), device=q.device, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if tile.hopper:
        from ..hopper import attention as hopper_attention

        with inputs.on_device(q):
            hopper_attention.launch(
                q, k, v, out, lse, scale=scale, tile=tile, block_k=block_k,
                kv_indices=kv_indices, kv_num_blocks=kv_num_blocks, key_bias=key_bias,
                tail=tail, num_listed=num_listed, order=order,
            )  # fmt: skip
        return out, lse
    grid = (B * H * Nq * (block_q // tile.tile_q),)
    with inputs.on_device(q):
        _sparse_attention_kernel[grid](
            inputs.source(q, tile.tile_q, tile.tma),
            inputs.source(k, tile.tile_k, tile.tma),
            inputs.source(v, tile.tile_k, tile.tma),
            out, lse, key_bias,
            kv_indices, kv_num_blocks, tail, order,
            *inputs.row_strides(q), *inputs.row_strides(k), *inputs.row_strides(v),
            *order_strides, H, Lq, Lk, Nq, kv_indices.shape[-1], num_listed * block_k, num_listed,
            float(scale) * LOG2_E.value,
            D=D,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            TILE_Q=tile.tile_q,
            TILE_K=tile.tile_k,
            HAS_BIAS=key_bias is not None,
            HAS_TAIL=tail is not None,
            HAS_ORDER=order is not None,
            TMA=tile.tma,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse


def why_not(q, k, v, block_q: int, block_k: int) -> str | None:
    """Reason why this kernel cannot serve the call, or None."""
    return inputs.why_not_tensors(q, k, v) or inputs.why_not_blocks(block_q, block_k)
