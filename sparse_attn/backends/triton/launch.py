"""What every kernel asks of its tensors, and how they are handed over."""

from contextlib import nullcontext

import torch
import triton

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)
# elements between rows
FARTHEST_ROW = 2**23
# release, such as (3, 8)
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
INTERPRETED = triton.knobs.runtime.interpret


def why_not(q, k, v, block_q: int, block_k: int) -> str | None:
    """Reason why no attention kernel serves tensors and blocks of this kind, or None."""
    reason = why_not_tensors(q, k, v)
    if reason is None and (block_q not in BLOCK_SIZES or block_k not in BLOCK_SIZES):
        return f"needs blocks of 64 or 128 tokens, got {block_q} x {block_k}"
    return reason


def why_not_tensors(*tensors: torch.Tensor) -> str | None:
    """Reason why no kernel serves [B, H, L, D] tensors of this kind, or None."""
    first = tensors[0]
    for x in tensors:
        if x.device != first.device or x.dtype != first.dtype:
            return "needs q, k and v on one device in one dtype"
        if x.ndim != 4:
            return f"needs [B, H, L, D] tensors, got {x.ndim} dimensions"
        if x.shape[:2] != first.shape[:2] or x.shape[-1] != first.shape[-1]:
            return "needs q, k and v with the same batch, heads and head_dim"
    reason = why_not_device(first)
    if reason is not None:
        return reason
    if first.dtype not in DTYPES:
        return f"needs float16 or bfloat16, got {str(first.dtype).removeprefix('torch.')}"
    if first.shape[-1] not in HEAD_DIMS:
        return f"needs head_dim 64 or 128, got {first.shape[-1]}"
    return None


def why_not_device(x: torch.Tensor) -> str | None:
    """Reason why no kernel runs where x is, or None."""
    if x.device.type != "cuda":
        return None if INTERPRETED else f"needs a CUDA tensor, got {x.device.type}"
    major, minor = torch.cuda.get_device_capability(x.device)
    if torch.version.hip is None and major < 8:
        return f"needs compute capability 8.0 or newer, got {major}.{minor}"
    return None


def checked(x, name: str, shape, dtype=torch.float32):
    """x, contiguous and in the dtype, or None; a kernel would read past one of another shape."""
    if x is None:
        return None
    if x.shape != torch.Size(shape):
        raise ValueError(f"`{name}` must be {list(shape)}, got {list(x.shape)}.")
    return x.to(dtype).contiguous()


def checked_order(order: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`order` of the tokens of x [B, H, L, D], its last dimension contiguous."""
    if order.shape != x.shape[:3] or order.dtype != torch.int32:
        raise ValueError(
            f"`order` must be {list(x.shape[:3])} int32, got {list(order.shape)} {order.dtype}."
        )
    return order if order.stride(-1) == 1 else order.contiguous()


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x with D contiguous and every row on 16 bytes; a copy only when it is not so already."""
    strides = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides)
    # a tile's rows, 128 or 256, lie within 2^31 elements of its first
    fits = fits and x.stride(2) < FARTHEST_ROW
    # contiguous() would leave a view that begins off 16 bytes as it is
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def row_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of [B, H, L, :] in units of 8 elements; 0 where a dimension has one entry."""
    return tuple(s // 8 if n > 1 else 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))


def on_device(x: torch.Tensor):
    """Context in which x's device is the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
