"""Block masses from queries, keys and a cached LSE: the QK^T half of attention, nothing else.

One program owns `TILE_Q` query rows of one head and walks all keys. Of each tile it keeps the sum
of exp(score - lse) per block; no value is read, no score reaches memory. The scores may be of INT8
queries and keys, quantised as for attention: a mass then errs by 0.03 to 5 % of itself, as the data
have it, and the choice of blocks holds the recall (tests/bench/bench_low_precision.py).
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from . import launch as inputs
from .quantise import TILE, quantise
from .quantised_attention import eight_bit_scores
from .softmax import LOG2_E, load_rows, mask_scores, raw_scores, weights

SIZES = [
    "stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl",
    "H", "Lq", "Lk", "Nk", "num_rows",
]  # fmt: skip

# keys that share a scale
SCALED = tl.constexpr(TILE)
# keeps a hopelessly stale LSE from turning a whole row into inf / inf
MAX_MASS = tl.constexpr(1e30)


@triton.jit
def _store_tile(
    b_q, b_scale, k, p_scale, p_masses, key_bias, b_lse, i_b, i_h, first, i_q, Nq, Nk,
    stride_kb, stride_kh, stride_kl, Lk, scale_log2,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, INT8: tl.constexpr, TMA: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Masses of the key blocks of one tile."""
    ROWS: tl.constexpr = TILE_Q // BLOCK_Q
    COLS: tl.constexpr = TILE_K // BLOCK_K
    # [TILE_K, D]
    b_k = load_rows(k, i_b, i_h, first, stride_kb, stride_kh, stride_kl, Lk, TILE_K, D, TMA, RAGGED)
    # [TILE_Q, TILE_K]
    if INT8:
        o_tile = (first + tl.arange(0, TILE_K)) // SCALED
        b_factor = tl.load(p_scale + o_tile, mask=o_tile < tl.cdiv(Lk, SCALED), other=0.0)
        b_s = eight_bit_scores(b_q, b_k) * b_scale[:, None] * b_factor[None, :]
    else:
        b_s = raw_scores(b_q, b_k)
    b_s = mask_scores(
        b_s, scale_log2, key_bias, first, Lk, None, 0, 0, TILE_K, HAS_BIAS, False, RAGGED
    )
    b_p = weights(b_s, b_lse, scale_log2, HAS_BIAS)
    b_rows = tl.sum(tl.reshape(b_p, [TILE_Q, COLS, BLOCK_K]), 2)
    # [ROWS, COLS]
    b_mass = tl.sum(tl.reshape(b_rows, [ROWS, BLOCK_Q, COLS]), 1)
    b_mass = tl.where(b_mass > MAX_MASS, MAX_MASS, b_mass)
    o_row = tl.arange(0, ROWS)
    o_col = first // BLOCK_K + tl.arange(0, COLS)
    p_out = p_masses + o_row.to(tl.int64)[:, None] * Nk + o_col[None, :]
    tl.store(p_out, b_mass, mask=(i_q + o_row < Nq)[:, None] & (o_col < Nk)[None, :])


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
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT8: tl.constexpr,
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
    p_masses = masses + (i_bh.to(tl.int64) * Nq + i_q) * Nk

    # rows past Lq and rows without a key have no mass
    b_lse = tl.load(lse + i_bh.to(tl.int64) * Lq + o_q, mask=o_q < Lq, other=float("inf"))
    b_scale = b_lse  # not read
    if INT8:
        row = i_bh.to(tl.int64) * num_rows + o_q
        b_lse -= tl.load(q_shift + row, mask=o_q < Lq, other=0.0)
        b_scale = tl.load(q_scale + row, mask=o_q < Lq, other=0.0)
        k_scale += i_bh.to(tl.int64) * tl.cdiv(Lk, SCALED)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2_E
    # [TILE_Q, D]
    b_q = load_rows(
        q, i_b, i_h, first_q, stride_qb, stride_qh, stride_ql, Lq, TILE_Q, D, TMA, RAGGED=True
    )
    whole = Lk // TILE_K * TILE_K
    for first in tl.range(0, whole, TILE_K):
        _store_tile(
            b_q, b_scale, k, k_scale, p_masses, key_bias, b_lse, i_b, i_h, first, i_q, Nq, Nk,
            stride_kb, stride_kh, stride_kl, Lk, scale_log2,
            D, BLOCK_Q, BLOCK_K, TILE_Q, TILE_K, HAS_BIAS, INT8, TMA, RAGGED=False,
        )  # fmt: skip
    # at most one turn
    for first in tl.range(whole, Lk, TILE_K, num_stages=1):
        _store_tile(
            b_q, b_scale, k, k_scale, p_masses, key_bias, b_lse, i_b, i_h, first, i_q, Nq, Nk,
            stride_kb, stride_kh, stride_kl, Lk, scale_log2,
            D, BLOCK_Q, BLOCK_K, TILE_Q, TILE_K, HAS_BIAS, INT8, TMA, RAGGED=True,
        )  # fmt: skip


def block_masses(
    q, k, lse, *, block_q, block_k, scale, key_bias=None, renormalise=True, int8=False, tile=None
):
    """Softmax mass of every block pair: sum over its rows and keys of exp(score - lse).

    Args:
        q: [B, H, Lq, D] float16 or bfloat16; k: [B, H, Lk, D].
        lse: [B, H, Lq] float32, of these q and k or of an earlier step.
        scale: positive factor of the scores.
        key_bias: [B, Lk] float32 added to the scaled scores, or None.
        renormalise: make every block row sum to its number of query rows; needed when the LSE is
            of an earlier step, harmless when it is exact.
        int8: quantise q and k: faster, and the masses less exact.
        tile: a `tiles.Tile` in place of the table's, for benchmarks.

    Returns:
        [B, H, Nq, Nk] float32.
    """
    inputs.refuse(why_not(q, k, block_q, block_k))
    B, H, Lq, D = q.shape
    Lk = k.shape[2]
    q, k = inputs.aligned(q), inputs.aligned(k)
    key_bias = inputs.checked_bias(key_bias, B, Lk)
    lse = inputs.checked_lse(lse, q)
    # a bias takes the registers that INT8 leaves
    kernel = "int8 masses" if int8 and key_bias is None else "masses"
    tile = tile or tiles.choose(kernel, q, block_q, block_k)
    masses = empty_masses(q, k, block_q, block_k, tile)
    if masses.numel() == 0:
        return masses
    scale, scales = float(scale), (None, None, None)
    with inputs.on_device(q):
        if int8:
            x = quantise(
                q, k, None, scale=scale, dtype=torch.int8, values=False, ordered=False,
                key_bias=key_bias,
            )  # fmt: skip
            # these make scores units of log2
            q, k, scales, scale = x.q, x.k, (x.q_scale, x.q_shift, x.k_scale), 1 / LOG2_E.value
        if tile.hopper:
            from ..hopper import block_masses as hopper_block_masses

            hopper_block_masses.launch(
                q, k, lse, masses, Lk, scale=scale, scales=scales, tile=tile, key_bias=key_bias
            )
            return finished(masses, Lq, block_q, block_k, tile, renormalise)
        _block_masses_kernel[(B * H * triton.cdiv(Lq, tile.tile_q),)](
            inputs.source(q, tile.tile_q, tile.tma),
            inputs.source(k, tile.tile_k, tile.tma),
            lse, key_bias, *scales, masses,
            *inputs.row_strides(q), *inputs.row_strides(k),
            H, Lq, Lk, masses.shape[-1], q.shape[2],
            scale * LOG2_E.value,
            D=D,
            BLOCK_Q=block_q,
            BLOCK_K=tile.mass_block(block_q, block_k)[1],
            TILE_Q=tile.tile_q,
            TILE_K=tile.tile_k,
            HAS_BIAS=key_bias is not None,
            INT8=int8,
            TMA=tile.tma,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )  # fmt: skip
    return finished(masses, Lq, block_q, block_k, tile, renormalise)


def empty_masses(q, k, block_q: int, block_k: int, tile: tiles.Tile) -> torch.Tensor:
    """What a kernel with this tile fills."""
    rows, cols = tile.mass_block(block_q, block_k)
    shape = (*q.shape[:2], triton.cdiv(q.shape[2], rows), triton.cdiv(k.shape[2], cols))
    return torch.empty(shape, device=q.device, dtype=torch.float32)


def finished(masses, Lq: int, block_q: int, block_k: int, tile: tiles.Tile, renormalise: bool):
    """Masses as the caller asked for them; None stays None."""
    if masses is None:
        return None
    rows, cols = tile.mass_block(block_q, block_k)
    masses = coarser(masses, block_q // rows, block_k // cols)
    return renormalised(masses, Lq, block_q) if renormalise else masses


def coarser(masses: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Sums of rows x cols neighbouring blocks."""
    if rows == cols == 1:
        return masses
    pad = (0, -masses.shape[-1] % cols, 0, -masses.shape[-2] % rows)
    masses = torch.nn.functional.pad(masses, pad)
    return masses.unflatten(-1, (-1, cols)).unflatten(-3, (-1, rows)).sum((-1, -3))


def renormalised(masses: torch.Tensor, Lq: int, block_q: int) -> torch.Tensor:
    """Scale every row of blocks, in place, to sum to its number of query rows; empty rows stay."""
    rows = torch.full((masses.shape[2], 1), float(block_q), device=masses.device)
    rows[-1] = Lq - (masses.shape[2] - 1) * block_q
    total = masses.sum(-1, keepdim=True)
    return masses.mul_(torch.where(total == 0, 1.0, rows / total))


def why_not(q, k, block_q: int, block_k: int) -> str | None:
    """Reason why this kernel cannot serve the call, or None."""
    return inputs.why_not_tensors(q, k) or inputs.why_not_blocks(block_q, block_k)
