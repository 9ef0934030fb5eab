"""Permute: tokens in another order and, of its blocks, the means.

One program owns one block of one head. Heads run fastest, so that with an order in common programs
which run together read whole tokens of the host's [B, L, H, D] memory; orders of their own cost no
more.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..permuted import BLOCK, Permuted, permuted
from . import launch

SIZES = ["stride_b", "stride_h", "stride_l", "stride_ob", "stride_oh", "H", "L", "N"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["order"])
def _permute_kernel(
    x, order, out, means,
    stride_b, stride_h, stride_l, stride_ob, stride_oh,
    H, L, N,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MEANS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_h, i_n = pid % H, (pid // H) % N
    i_b = pid // (H * N)
    o_l = i_n * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, D)
    m_l = o_l < L
    order += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    o_from = tl.load(order + o_l, mask=m_l, other=0).to(tl.int64)
    base = i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    # the factor 8 tells the compiler that every row starts on 16 bytes
    p_x = x + (base + o_from * stride_l)[:, None] * 8 + o_d[None, :]
    # [BLOCK, D], zero past L
    b_x = tl.load(p_x, mask=m_l[:, None], other=0.0)
    i_bh = i_b.to(tl.int64) * H + i_h
    tl.store(out + i_bh * L * D + o_l[:, None] * D + o_d[None, :], b_x, mask=m_l[:, None])
    if HAS_MEANS:
        b_mean = tl.sum(b_x.to(tl.float32), 0) / tl.minimum(L - i_n * BLOCK, BLOCK)
        tl.store(means + (i_bh * N + i_n) * D + o_d, b_mean.to(means.dtype.element_ty))


def permute(q, k, v, order, key_bias=None) -> Permuted:
    """Put tokens in `order` and pool them.

    Args:
        q, k, v: [B, H, L, D] float16 or bfloat16; any strides, copied only if D is not contiguous;
            q may be None.
        order: [B, H, L] int32, the token at every place; any strides of batch and heads.
        key_bias: [B, L] float32 or None.
    """
    order = launch.checked_order(order, k)

    def permute_and_pool(x, order):
        means = x.new_empty((*x.shape[:2], triton.cdiv(x.shape[2], BLOCK), x.shape[3]))
        return _permute(x, order, means), means

    return permuted(q, k, v, order, key_bias, permute=_permute, permute_and_pool=permute_and_pool)


def _permute(x, order, means=None):
    """x in `order`, contiguous; `means` are filled."""
    B, H, L, D = x.shape
    x = launch.aligned(x)
    N = triton.cdiv(L, BLOCK)
    out = torch.empty((B, H, L, D), device=x.device, dtype=x.dtype)
    if out.numel():
        with launch.on_device(x):
            _permute_kernel[(B * H * N,)](
                x, order, out, means,
                *launch.row_strides(x), *order.stride()[:2],
                H, L, N,
                D=D,
                BLOCK=BLOCK,
                HAS_MEANS=means is not None,
                **tiles.PERMUTE.options,
            )  # fmt: skip
    return out
