"""Attention while a small model learns: plain, and by the fastest of torch's backends."""

import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def plain_attention(func, q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
    """ComfyUI's attention override: SDPA without the host's bookkeeping, so that it compiles."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def fastest_backends(heads: int, head_dim: int, tokens: int, device) -> list[SDPBackend]:
    """cuDNN's attention first where it agrees with flash attention and is faster."""
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    others = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if device.type != "cuda":
        return [flash, *others]
    qkv = torch.randn(4, tokens, 3, heads, head_dim, device=device, dtype=torch.bfloat16)
    qkv.requires_grad_()
    found, seconds = {}, {}
    for backend in (flash, cudnn):
        try:
            with sdpa_kernel(backend):
                for _ in range(3):
                    torch.cuda.synchronize()
                    began = time.monotonic()
                    out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
                    (grad,) = torch.autograd.grad(out.square().sum(), qkv)
                    torch.cuda.synchronize()
                    seconds[backend] = time.monotonic() - began
                found[backend] = torch.cat((out.flatten(), grad.flatten())).float()
        except RuntimeError as error:
            print(f"{backend.name}: {error}", flush=True)
    print({b.name: round(1000 * s, 2) for b, s in seconds.items()}, "ms", flush=True)
    if len(found) < 2:
        return [*found, *others]
    error = (found[cudnn] - found[flash]).norm() / found[flash].norm()
    agree = bool(error < 0.02) and seconds[cudnn] < seconds[flash]
    return [cudnn, flash, *others] if agree else [flash, *others]
