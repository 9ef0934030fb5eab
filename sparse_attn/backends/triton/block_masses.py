"""Block masses from queries, keys and a cached LSE: the QK^T half of attention, nothing else.

One program owns `TILE_Q` query rows of one head and walks all keys. Of each tile it keeps the sum
of exp(score - lse) per block; no value is read, no score reaches memory. The scores may be of INT8
queries and keys, quantised as for attention: a mass then errs by 0.03 to 5 % of itself, as the data
have it, and the choice of blocks holds the recall (tests/bench/bench_low_precision.py).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import tiles
from . import launch
from .mass_granularity import empty_masses, measured_rows, to_granularity
from .quantise import TILE, quantise_qk
from .softmax import (
    LOG2_E,
    MAGIC,
    MAGIC_BITS,
    bias_scores,
    hide_past,
    int8_matmul,
    int8_scores,
    load_rows,
    load_tile,
    neighbours,
    raw_scores,
    store_masses,
    weights,
)

SIZES = [
    "stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl",
    "H", "Lq", "Lk", "Nk", "num_rows",
]  # fmt: skip


@triton.jit
def _measure_block(
    b_q, b_scale, k, k_scale, p_masses, key_bias, b_lse, i_b, i_h, i_k, i_q, Nq, Nk,
    stride_kb, stride_kh, stride_kl, Lk, scale_log2,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_Q: tl.constexpr,
    HAS_BIAS: tl.constexpr, INT8: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Masses of one block of keys."""
    first = i_k * BLOCK
    # [BLOCK, D]
    b_k = load_rows(k, i_b, i_h, first, stride_kb, stride_kh, stride_kl, Lk, BLOCK, D, RAGGED)
    # [TILE_Q, BLOCK]
    if INT8 and not (HAS_BIAS or RAGGED):
        b_factor = b_scale * tl.load(k_scale + i_k)
        b_s = int8_matmul(b_q, tl.trans(b_k), tl.full([TILE_Q, BLOCK], MAGIC_BITS, tl.int32))
        b_p = tl.exp2(tl.fma(b_s, b_factor[:, None], (-(b_factor * MAGIC) - b_lse)[:, None]))
    else:
        if INT8:
            b_factor = b_scale * tl.load(k_scale + i_k)
            b_s = int8_scores(b_q, b_k) * b_factor[:, None]
        else:
            b_s = raw_scores(b_q, b_k)
        if HAS_BIAS:
            b_s = bias_scores(b_s, scale_log2, key_bias, None, first, Lk, BLOCK, False, RAGGED)
        elif RAGGED:
            b_s = hide_past(b_s, first, Lk, BLOCK)
        b_p = weights(b_s, b_lse, scale_log2, HAS_BIAS)
    store_masses(b_p, p_masses + i_k, i_q, Nq, Nk, BLOCK_Q)


@triton.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=["lse", "key_bias", "q_scale", "q_shift", "k_scale", "masses"],
)
def _block_masses_kernel(
    q, k, lse, key_bias, q_scale, q_shift, k_scale, masses,
    stride_qb, stride_qh, stride_ql,
    stride_kb, stride_kh, stride_kl,
    H, Lq, Lk, Nk, num_rows,
    scale_log2,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    num_q_tiles = tl.cdiv(Lq, TILE_Q)
    pid = tl.program_id(0)
    i_bh, i_tile = pid // num_q_tiles, pid % num_q_tiles
    i_b, i_h = i_bh // H, i_bh % H
    first_q = i_tile * TILE_Q
    o_tile = neighbours(TILE_Q)
    o_q = first_q + o_tile
    if HAS_BIAS:
        key_bias += i_b.to(tl.int64) * Lk
    Nq = tl.cdiv(Lq, BLOCK_Q)
    i_q = first_q // BLOCK_Q
    p_masses = masses + (i_bh.to(tl.int64) * Nq + i_q) * Nk

    # rows past Lq and rows without a key have no mass
    b_lse = tl.load(lse + i_bh.to(tl.int64) * Lq + o_q, mask=o_q < Lq, other=float("inf"))
    b_scale = b_lse  # not read
    if INT8:
        row = i_bh.to(tl.int64) * num_rows + o_q
        b_lse -= tl.load(q_shift + row, mask=o_q < Lq, other=0.0)
        b_scale = tl.load(q_scale + row, mask=o_q < Lq, other=0.0)
        k_scale += i_bh.to(tl.int64) * Nk
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2_E
    # [TILE_Q, D]
    b_q = load_tile(
        q, i_b, i_h, first_q, o_tile, 0, stride_qb, stride_qh, stride_ql, Lq, D, RAGGED=True
    )
    if INT8:
        # zeros in the layout of the scores: what they are added to moves there before the loop
        b_zero = tl.full([TILE_Q, 16], MAGIC_BITS, tl.int32)
        b_zero = tl.max(int8_matmul(b_q, tl.zeros([D, 16], tl.int8), b_zero) - MAGIC, 1)
        b_scale += b_zero
        b_lse += b_zero
    whole = Lk // BLOCK
    for i_k in tl.range(0, whole):
        _measure_block(
            b_q, b_scale, k, k_scale, p_masses, key_bias, b_lse, i_b, i_h, i_k, i_q, Nq, Nk,
            stride_kb, stride_kh, stride_kl, Lk, scale_log2,
            D, BLOCK, TILE_Q, BLOCK_Q, HAS_BIAS, INT8, RAGGED=False,
        )  # fmt: skip
    # at most one turn
    for i_k in tl.range(whole, Nk, num_stages=1):
        _measure_block(
            b_q, b_scale, k, k_scale, p_masses, key_bias, b_lse, i_b, i_h, i_k, i_q, Nq, Nk,
            stride_kb, stride_kh, stride_kl, Lk, scale_log2,
            D, BLOCK, TILE_Q, BLOCK_Q, HAS_BIAS, INT8, RAGGED=True,
        )  # fmt: skip


@dataclass(frozen=True)
class MassOperands:
    """The tensors of one call, checked once and in the form that the kernels read.

    Args:
        q, k: [B, H, L, D] with D contiguous and rows on 16 bytes, or int8 as `quantise_qk` pads them.
        q_scale, q_shift, k_scale: of int8 q and k, else None.
        scale: makes scores units of nats; of int8 ones the scales do.
        sizes: B, H, Lq, Lk, D.
    """

    q: torch.Tensor
    k: torch.Tensor
    lse: torch.Tensor
    key_bias: torch.Tensor | None
    q_scale: torch.Tensor | None
    q_shift: torch.Tensor | None
    k_scale: torch.Tensor | None
    scale: float
    sizes: tuple[int, int, int, int, int]

    @classmethod
    def of(cls, q, k, lse, scale, key_bias, int8: bool) -> "MassOperands":
        """Check a call and quantise q and k where asked to."""
        B, H, Lq, D = q.shape
        Lk = k.shape[2]
        if k.shape != (B, H, Lk, D):
            raise ValueError(f"q and k must belong together, got {list(q.shape)}, {list(k.shape)}.")
        q, k = launch.aligned(q), launch.aligned(k)
        lse = launch.checked(lse, "lse", (B, H, Lq))
        key_bias = launch.checked(key_bias, "key_bias", (B, Lk))
        scales = 3 * (None,)
        if int8:
            x = quantise_qk(q, k, scale=float(scale), key_bias=key_bias)
            # these make scores units of log2
            q, k, scales, scale = x.q, x.k, (x.q_scale, x.q_shift, x.k_scale), 1 / LOG2_E.value
        return cls(q, k, lse, key_bias, *scales, float(scale), (B, H, Lq, Lk, D))


def block_masses(
    q, k, lse, *, block_q, block_k, scale, key_bias=None, renormalise=True, int8=False
) -> torch.Tensor:
    """Softmax mass of every block pair: sum over its rows and keys of exp(score - lse).

    Args:
        q: [B, H, Lq, D] float16 or bfloat16; k: [B, H, Lk, D].
        lse: [B, H, Lq] float32, of these q and k or of an earlier step.
        block_q: 16 or 32, for rows sampled of larger blocks, or 64 or 128. block_k: 64 or 128.
        scale: positive factor of the scores.
        key_bias: [B, Lk] float32 added to the scaled scores, or None.
        renormalise: make every block row sum to its number of query rows; needed when the LSE is
            of an earlier step, harmless when it is exact.
        int8: quantise q and k: faster, and the masses less exact.
        tile: a `tiles.Tile` in place of the table's, for benchmarks.

    Returns:
        [B, H, Nq, Nk] float32.
    """
    found = measured_rows(block_q), TILE
    masses = empty_masses(q, k, *found)
    if masses.numel():
        tile = tiles.block_masses(tiles.card_of(q.device), int8, key_bias is not None)
        with launch.on_device(q):
            x = MassOperands.of(q, k, lse, scale, key_bias, int8)
            B, H, Lq, Lk, D = x.sizes
            _block_masses_kernel[(B * H * triton.cdiv(Lq, tile.tile_q),)](
                x.q, x.k, x.lse, x.key_bias, x.q_scale, x.q_shift, x.k_scale, masses,
                *launch.row_strides(x.q), *launch.row_strides(x.k),
                H, Lq, Lk, masses.shape[-1], x.q.shape[2],
                x.scale * LOG2_E.value,
                D=D,
                BLOCK=TILE,
                TILE_Q=tile.tile_q,
                BLOCK_Q=found[0],
                HAS_BIAS=x.key_bias is not None,
                INT8=int8,
                **tile.options,
            )  # fmt: skip
    return to_granularity(masses, q.shape[2], found, (block_q, block_k), renormalise)
