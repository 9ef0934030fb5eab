"""Tail error: the score map in one pass, and how far the values of a block lie apart.

One program scores a strip of block pairs of one head. It holds the mean outputs of its query blocks
and walks the mean values of its key blocks.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..permuted import BLOCK
from . import launch
from .softmax import load_rows, matmul

SIZES = [
    "stride_vb", "stride_vh", "stride_vl", "stride_mb", "stride_mh", "stride_ml", "H", "L", "N",
    "Nq",
]  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _deviation_kernel(
    v, v_mean, deviations, lengths,
    stride_vb, stride_vh, stride_vl,
    stride_mb, stride_mh, stride_ml,
    H, L, N,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    size = tl.minimum(L - i_n * BLOCK, BLOCK)
    # [BLOCK, D]
    b_v = load_rows(
        v, i_b, i_h, i_n * BLOCK, stride_vb, stride_vh, stride_vl, L, BLOCK, D, RAGGED=True
    )  # fmt: skip
    mean = i_b.to(tl.int64) * stride_mb + i_h.to(tl.int64) * stride_mh + i_n * stride_ml
    b_mean = tl.load(v_mean + mean * 8 + tl.arange(0, D)).to(tl.float32)
    b_apart = b_v.to(tl.float32) - b_mean[None, :]
    b_square = tl.where((tl.arange(0, BLOCK) < size)[:, None], b_apart * b_apart, 0.0)
    deviation = tl.sqrt(tl.sum(tl.sum(b_square, 1), 0) / size)
    tl.store(deviations + i_bh.to(tl.int64) * N + i_n, deviation)
    tl.store(lengths + i_bh.to(tl.int64) * N + i_n, tl.sum(b_mean * b_mean, 0))


@triton.jit(do_not_specialize=SIZES)
def _scores_kernel(
    masses, pooled, v_mean, outputs, deviations, lengths,
    stride_mb, stride_mh, stride_ml,
    H, N, Nq,
    D: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    i_bh, start = tl.program_id(2), tl.program_id(0) * TILE_K * TURNS
    i_b, i_h = i_bh // H, i_bh % H
    o_q, o_k = tl.program_id(1) * TILE_Q + tl.arange(0, TILE_Q), tl.arange(0, TILE_K)
    m_q = (o_q < Nq)[:, None]
    o_row = (i_bh.to(tl.int64) * Nq + o_q)[:, None]
    # [TILE_Q, D]
    b_out = tl.load(outputs + o_row * D + tl.arange(0, D)[None, :], mask=m_q, other=0.0)
    b_length = tl.sum(b_out * b_out, 1)[:, None]
    # three parts in half precision hold every digit
    b_first = b_out.to(v_mean.dtype.element_ty)
    b_out -= b_first.to(tl.float32)
    b_second = b_out.to(v_mean.dtype.element_ty)
    b_out -= b_second.to(tl.float32)
    b_third = b_out.to(v_mean.dtype.element_ty)
    for first in range(start, tl.minimum(start + TILE_K * TURNS, N), TILE_K):
        m_k = first + o_k < N
        m_both = m_q & m_k[None, :]
        o_pair = o_row * N + (first + o_k)[None, :]
        o_block = i_bh.to(tl.int64) * N + first + o_k
        b_mean = load_rows(
            v_mean, i_b, i_h, first, stride_mb, stride_mh, stride_ml, N, TILE_K, D, RAGGED=True
        )  # fmt: skip
        b_product = matmul(b_third, tl.trans(b_mean), tl.zeros([TILE_Q, TILE_K], tl.float32))
        b_product = matmul(b_second, tl.trans(b_mean), b_product)
        b_product = matmul(b_first, tl.trans(b_mean), b_product)
        b_square = tl.load(lengths + o_block, mask=m_k, other=0.0)[None, :] - 2 * b_product
        # NaN stays where negative numbers give way to 0
        b_apart = b_length + b_square
        b_apart = tl.sqrt(tl.where(b_apart < 0, 0.0, b_apart))
        b_mass = tl.load(masses + o_pair, mask=m_both, other=0.0)
        b_missing = b_mass - tl.load(pooled + o_pair, mask=m_both, other=0.0)
        b_missing = tl.where(b_missing < 0, 0.0, b_missing)
        b_deviation = tl.load(deviations + o_block, mask=m_k, other=0.0)[None, :]
        b_score = tl.sqrt(b_mass * b_missing) * b_deviation + b_missing * b_apart
        tl.store(pooled + o_pair, b_score, mask=m_both)


def tail_error(masses, pooled, v, v_mean) -> torch.Tensor:
    """Score every block pair by the error that skipping it leaves.

    Args:
        masses: [B, H, Nq, N] float32. pooled: the same, contiguous; the result takes its place.
        v: [B, H, L, D] float16 or bfloat16. v_mean: [B, H, N, D], mean of every block of 64.

    Returns:
        [B, H, Nq, N] float32.
    """
    B, H, Nq, N = masses.shape
    L, D = v.shape[2:]
    v, v_mean = launch.aligned(v), launch.aligned(v_mean)
    masses = masses.contiguous()
    deviations, lengths = torch.empty((2, B, H, N), device=v.device)
    rows = masses.sum(-1, keepdim=True).clamp_(min=1e-20)
    outputs = (masses @ v_mean.float()).div_(rows)
    tile, turns = tiles.TAIL_ERROR, tiles.TAIL_ERROR_TURNS
    with launch.on_device(v):
        _deviation_kernel[(N, B * H)](
            v, v_mean, deviations, lengths, *launch.row_strides(v), *launch.row_strides(v_mean),
            H, L, N, D=D, BLOCK=BLOCK, **tiles.DEVIATION.options,
        )  # fmt: skip
        _scores_kernel[(triton.cdiv(N, tile.tile_k * turns), triton.cdiv(Nq, tile.tile_q), B * H)](
            masses, pooled, v_mean, outputs, deviations, lengths, *launch.row_strides(v_mean),
            H, N, Nq,
            D=D, TILE_Q=tile.tile_q, TILE_K=tile.tile_k, TURNS=turns, **tile.options,
        )  # fmt: skip
    return pooled


def why_not(masses, pooled, v, v_mean) -> str | None:
    """Reason why this kernel cannot serve the call, or None."""
    if not masses.dtype == pooled.dtype == torch.float32 or not pooled.is_contiguous():
        return "needs float32 masses, and contiguous pooled ones"
    return launch.why_not_tensors(v, v_mean)
