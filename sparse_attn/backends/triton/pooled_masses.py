"""Pooled masses: what a block's mean key, weighted by the block's size, gets of the softmax.

One program owns one query block of one head and walks the mean keys. By Jensen's inequality a
pooled mass is at most the block's exact mass; the difference is what a pooled tail misses.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from . import launch
from .softmax import LOG2_E, load_rows, raw_scores

SIZES = [
    "stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl",
    "H", "Lq", "Nq", "Nk",
]  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["log_sizes", "lse"])
def _pooled_masses_kernel(
    q, k_mean, log_sizes, lse, masses,
    stride_qb, stride_qh, stride_ql,
    stride_kb, stride_kh, stride_kl,
    H, Lq, Nq, Nk,
    scale_log2,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_bh, i_q = pid // Nq, pid % Nq
    i_b, i_h = i_bh // H, i_bh % H
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    # rows past Lq and rows without a key have no mass
    b_lse = tl.load(lse + i_bh.to(tl.int64) * Lq + o_q, mask=o_q < Lq, other=float("inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2_E
    # [BLOCK_Q, D]
    b_q = load_rows(
        q, i_b, i_h, i_q * BLOCK_Q, stride_qb, stride_qh, stride_ql, Lq, BLOCK_Q, D, RAGGED=True,
    )  # fmt: skip
    p_masses = masses + (i_bh.to(tl.int64) * Nq + i_q) * Nk
    p_sizes = log_sizes + i_b.to(tl.int64) * Nk
    for first in tl.range(0, Nk, TILE_K):
        o_k = first + tl.arange(0, TILE_K)
        m_k = o_k < Nk
        b_k = load_rows(
            k_mean, i_b, i_h, first, stride_kb, stride_kh, stride_kl, Nk, TILE_K, D, RAGGED=True,
        )  # fmt: skip
        b_size = tl.load(p_sizes + o_k, mask=m_k, other=float("-inf")) * LOG2_E
        b_s = raw_scores(b_q, b_k) * scale_log2 + b_size[None, :] - b_lse[:, None]
        tl.store(p_masses + o_k, tl.sum(tl.exp2(b_s), 0), mask=m_k)


def pooled_masses(q, k_mean, log_sizes, lse, *, block_q: int, scale: float) -> torch.Tensor:
    """Sum over the rows of each query block of n_j exp(scale q . k_mean_j - lse).

    Args:
        q: [B, H, Lq, D] float16 or bfloat16; k_mean: [B, H, Nk, D], mean key of each key block.
        log_sizes: [B, Nk] float32, natural log of the number n_j of keys of each block; -inf
            leaves a block out.
        lse: [B, H, Lq] float32, natural log, of the exact softmax.
        scale: positive factor of the scores.

    Returns:
        [B, H, ceil(Lq / block_q), Nk] float32.
    """
    B, H, Lq, D = q.shape
    Nq, Nk = triton.cdiv(Lq, block_q), k_mean.shape[2]
    q, k_mean = launch.aligned(q), launch.aligned(k_mean)
    log_sizes = launch.checked(log_sizes, "log_sizes", (B, Nk))
    lse = launch.checked(lse, "lse", (B, H, Lq))
    masses = torch.empty((B, H, Nq, Nk), device=q.device, dtype=torch.float32)
    tile = tiles.pooled_masses(block_q)
    if masses.numel():
        with launch.on_device(q):
            _pooled_masses_kernel[(B * H * Nq,)](
                q, k_mean, log_sizes, lse, masses,
                *launch.row_strides(q), *launch.row_strides(k_mean),
                H, Lq, Nq, Nk,
                float(scale) * LOG2_E.value,
                D=D,
                BLOCK_Q=tile.tile_q,
                TILE_K=tile.tile_k,
                **tile.options,
            )  # fmt: skip
    return masses
