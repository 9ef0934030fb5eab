"""Features: queries and keys projected on their head's 16 principal directions, and their places.

One program owns a tile of tokens of one head and reads their queries and keys once.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from . import launch
from .softmax import FLOAT32, load_rows

SIZES = [
    "stride_qb", "stride_qh", "stride_ql", "stride_kb", "stride_kh", "stride_kl", "H", "V",
]  # fmt: skip


@triton.jit
def _finite(b_x):
    return tl.where(tl.abs(b_x) < float("inf"), b_x, 0.0)


@triton.jit
def _projected(b_x, centre, directions, D: tl.constexpr, N: tl.constexpr):
    """[TILE, N]: b_x [TILE, D] less a centre [D], projected on directions [D, N]."""
    o_d, o_n = tl.arange(0, D), tl.arange(0, N)
    b_x = b_x.to(tl.float32) - tl.load(centre + o_d)[None, :]
    b_to = tl.load(directions + o_d[:, None] * N + o_n[None, :])
    return _finite(tl.dot(b_x, b_to, input_precision=FLOAT32))


@triton.jit(do_not_specialize=SIZES)
def _features_kernel(
    q, k, centres, directions, places, features,
    stride_qb, stride_qh, stride_ql,
    stride_kb, stride_kh, stride_kl,
    H, V,
    D: tl.constexpr, N: tl.constexpr, PLACE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    first, i_bh = tl.program_id(0) * TILE, tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    o_v, o_n, o_p = first + tl.arange(0, TILE), tl.arange(0, N), tl.arange(0, PLACE)
    m_v = (o_v < V)[:, None]
    # [TILE, D]
    b_q = load_rows(
        q, i_b, i_h, first, stride_qb, stride_qh, stride_ql, V, TILE, D, RAGGED=True
    )  # fmt: skip
    b_k = load_rows(
        k, i_b, i_h, first, stride_kb, stride_kh, stride_kl, V, TILE, D, RAGGED=True
    )  # fmt: skip
    b_q = _projected(b_q, centres + i_bh * D, directions + i_bh * D * N, D, N)
    side = tl.num_programs(1)
    b_k = _projected(b_k, centres + (side + i_bh) * D, directions + (side + i_bh) * D * N, D, N)
    row = i_bh.to(tl.int64) * V + o_v
    p_out = features + row[:, None] * (2 * N + PLACE)
    tl.store(p_out + o_n[None, :], b_q, mask=m_v)
    tl.store(p_out + N + o_n[None, :], b_k, mask=m_v)
    b_place = tl.load(places + o_v[:, None] * PLACE + o_p[None, :], mask=m_v, other=0.0)
    tl.store(p_out + 2 * N + o_p[None, :], b_place, mask=m_v)


def features(q, k, centres, directions, places) -> torch.Tensor:
    """(q - centre) @ directions, the same of k, and places; what is not finite becomes 0.

    Args:
        q, k: [B, H, V, D] float16 or bfloat16. centres: [2, B, H, D] float32, of q and of k.
        directions: [2, B, H, D, N] float32; N is 16. places: [V, P] float32; P is a power of 2.

    Returns:
        [B, H, V, 2 N + P] float32.
    """
    B, H, V, D = q.shape
    N, P = directions.shape[-1], places.shape[-1]
    q, k = launch.aligned(q), launch.aligned(k)
    out = torch.empty((B, H, V, 2 * N + P), device=q.device)
    with launch.on_device(q):
        tile = tiles.features(tiles.card_of(q.device), launch.TRITON)
        _features_kernel[(triton.cdiv(V, tile.tile_q), B * H)](
            q, k, centres.contiguous(), directions.contiguous(), places.contiguous(), out,
            *launch.row_strides(q), *launch.row_strides(k), H, V,
            D=D, N=N, PLACE=P, TILE=tile.tile_q, **tile.options,
        )  # fmt: skip
    return out


def why_not(q, k, centres, directions, places) -> str | None:
    """Reason why this kernel cannot serve the call, or None."""
    if directions.shape[-1] != 16:
        return f"needs 16 directions, got {directions.shape[-1]}"
    return launch.why_not_tensors(q, k)
