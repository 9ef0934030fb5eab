"""Dense attention that keeps its LSE and can yield block masses in the same pass.

A tile's row sum is known relative to the running maximum m. With the LSE of the previous step at
hand, `rowsum * exp(m - previous_lse)` is that row's share of the block's mass: one exponential per
row and block instead of a second pass over the keys. The previous LSE is a little off, so every
block row is renormalised to its number of query rows.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from . import launch as inputs
from .block_masses import empty_masses, finished
from .softmax import LOG2_E, attend_pair, load_rows, store_rows

SIZES = [
    "stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl",
    "stride_vb", "stride_vh", "stride_vl", "H", "Lq", "Lk", "Nk",
]  # fmt: skip

# a row whose LSE fell by more than this (in log2) must not swamp its block row
MAX_DRIFT = tl.constexpr(16.0)


@triton.jit
def _store_masses(
    p_masses, i_k, Nq, Nk, i_q, b_share, b_sum0, b_sum1,
    TILE_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Masses of the key blocks that a pair of tiles makes up, starting with block i_k."""
    ROWS: tl.constexpr = TILE_Q // BLOCK_Q
    o_row = tl.arange(0, ROWS)
    if BLOCK_K == TILE_K:
        # both columns at once: one reduction across warps instead of two
        b_both = tl.join(b_sum0 * b_share, b_sum1 * b_share)
        b_mass = tl.sum(tl.reshape(b_both, [ROWS, BLOCK_Q, 2]), 1)
        o_col = i_k + tl.arange(0, 2)
        p_out = p_masses + o_row.to(tl.int64)[:, None] * Nk + o_col[None, :]
        tl.store(p_out, b_mass, mask=(i_q + o_row < Nq)[:, None] & (o_col < Nk)[None, :])
    else:
        b_mass = tl.sum(tl.reshape((b_sum0 + b_sum1) * b_share, [ROWS, BLOCK_Q]), 1)
        tl.store(p_masses + o_row.to(tl.int64) * Nk + i_k, b_mass, mask=i_q + o_row < Nq)


@triton.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=["lse", "key_bias", "previous_lse", "masses"],
)
def _dense_attention_kernel(
    q, k, v, out, lse, key_bias, previous_lse, masses,
    stride_qb, stride_qh, stride_ql,
    stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl,
    H, Lq, Lk, Nk,
    scale_log2,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASSES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    num_q_tiles = tl.cdiv(Lq, TILE_Q)
    pid = tl.program_id(0)
    i_bh, i_tile = pid // num_q_tiles, pid % num_q_tiles
    i_b, i_h = i_bh // H, i_bh % H
    first_q = i_tile * TILE_Q
    o_q = first_q + tl.arange(0, TILE_Q)
    if HAS_BIAS:
        key_bias += i_b.to(tl.int64) * Lk
    Nq = tl.cdiv(Lq, BLOCK_Q)
    i_q = first_q // BLOCK_Q
    if HAS_MASSES:
        p_masses = masses + (i_bh.to(tl.int64) * Nq + i_q) * Nk
        b_previous = tl.load(
            previous_lse + i_bh.to(tl.int64) * Lq + o_q, mask=o_q < Lq, other=float("inf")
        )
        # a row that had no key then, or lies past Lq, has no share
        b_previous = tl.where(b_previous == float("-inf"), float("inf"), b_previous) * LOG2_E

    # [TILE_Q, D]
    b_q = load_rows(
        q, i_b, i_h, first_q, stride_qb, stride_qh, stride_ql, Lq, TILE_Q, D, TMA, RAGGED=True
    )
    b_acc = tl.zeros([TILE_Q, D], dtype=tl.float32)
    b_max = tl.full([TILE_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([TILE_Q], dtype=tl.float32)

    whole = Lk // (2 * TILE_K) * (2 * TILE_K)
    for k0 in tl.range(0, whole, 2 * TILE_K):
        b_acc, b_max, b_sum, b_sum0, b_sum1 = attend_pair(
            b_q, b_acc, b_max, b_sum,
            k, v, i_b, i_h, k0, k0 + TILE_K,
            stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
            Lk, key_bias, scale_log2,
            D, TILE_K, HAS_BIAS, TMA, RAGGED=False,
        )  # fmt: skip
        if HAS_MASSES:
            b_share = tl.exp2(tl.minimum(b_max - b_previous, MAX_DRIFT))
            _store_masses(
                p_masses, k0 // BLOCK_K, Nq, Nk, i_q, b_share, b_sum0, b_sum1,
                TILE_Q, BLOCK_Q, BLOCK_K, TILE_K,
            )  # fmt: skip

    # at most one turn
    for k0 in tl.range(whole, Lk, 2 * TILE_K, num_stages=1):
        b_acc, b_max, b_sum, b_sum0, b_sum1 = attend_pair(
            b_q, b_acc, b_max, b_sum,
            k, v, i_b, i_h, k0, k0 + TILE_K,
            stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
            Lk, key_bias, scale_log2,
            D, TILE_K, HAS_BIAS, TMA, RAGGED=True,
        )  # fmt: skip
        if HAS_MASSES:
            b_share = tl.exp2(tl.minimum(b_max - b_previous, MAX_DRIFT))
            _store_masses(
                p_masses, k0 // BLOCK_K, Nq, Nk, i_q, b_share, b_sum0, b_sum1,
                TILE_Q, BLOCK_Q, BLOCK_K, TILE_K,
            )  # fmt: skip

    store_rows(out, lse, b_acc, b_sum, b_max, i_b, i_h, H, Lq, o_q, D)


def dense_attention(
    q, k, v, *, scale, key_bias=None, previous_lse=None, block_q=64, block_k=64, tile=None
):
    """Attention over every key, with LSE, and with block masses if an earlier LSE is given.

    Args:
        q: [B, H, Lq, D] float16 or bfloat16; k, v: [B, H, Lk, D].
        scale: positive factor of the scores.
        key_bias: [B, Lk] float32 added to the scaled scores, or None.
        previous_lse: [B, H, Lq] float32 from a step whose scores were much the same, or None.
        block_q, block_k: granularity of the masses.
        tile: a `tiles.Tile` in place of the table's, for benchmarks.

    Returns:
        out [B, H, Lq, D] viewed on [B, Lq, H, D]; lse [B, H, Lq] float32; masses
        [B, H, Nq, Nk] float32 whose rows sum to their number of query rows, or None.
    """
    inputs.refuse(why_not(q, k, v, block_q, block_k))
    B, H, Lq, D = q.shape
    Lk = k.shape[2]
    q, k, v = inputs.aligned(q), inputs.aligned(k), inputs.aligned(v)
    key_bias = inputs.checked_bias(key_bias, B, Lk)
    previous_lse = inputs.checked_lse(previous_lse, q)

    out = inputs.empty_output(q)
    lse = torch.empty((B, H, Lq), device=q.device, dtype=torch.float32)
    tile = tile or tiles.choose("dense", q, block_q, block_k)
    masses = None
    if previous_lse is not None:
        masses = empty_masses(q, k, block_q, block_k, tile)
    if out.numel() == 0:
        return out, lse, masses
    if tile.hopper:
        from ..hopper import attention as hopper_attention

        with inputs.on_device(q):
            hopper_attention.launch(
                q, k, v, out, lse, scale=scale, tile=tile,
                key_bias=key_bias, previous_lse=previous_lse, masses=masses,
            )  # fmt: skip
        return out, lse, finished(masses, Lq, block_q, block_k, tile, renormalise=True)
    with inputs.on_device(q):
        _dense_attention_kernel[(B * H * triton.cdiv(Lq, tile.tile_q),)](
            inputs.source(q, tile.tile_q, tile.tma),
            inputs.source(k, tile.tile_k, tile.tma),
            inputs.source(v, tile.tile_k, tile.tma),
            out, lse, key_bias, previous_lse, masses,
            *inputs.row_strides(q), *inputs.row_strides(k), *inputs.row_strides(v),
            H, Lq, Lk, 0 if masses is None else masses.shape[-1],
            float(scale) * LOG2_E.value,
            D=D,
            BLOCK_Q=block_q,
            BLOCK_K=tile.mass_block(block_q, block_k)[1],
            TILE_Q=tile.tile_q,
            TILE_K=tile.tile_k,
            HAS_BIAS=key_bias is not None,
            HAS_MASSES=masses is not None,
            TMA=tile.tma,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse, finished(masses, Lq, block_q, block_k, tile, renormalise=True)


def why_not(q, k, v, block_q: int = 64, block_k: int = 64) -> str | None:
    """Reason why this kernel cannot serve the call, or None."""
    return inputs.why_not_tensors(q, k, v) or inputs.why_not_blocks(block_q, block_k)
