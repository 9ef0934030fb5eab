"""What every kernel asks of its tensors, and how they are handed over."""

from contextlib import nullcontext

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)
INTERPRETED = triton.knobs.runtime.interpret


def why_not_device(x: torch.Tensor) -> str | None:
    """Reason why no kernel runs where x is, or None."""
    if x.device.type != "cuda":
        return None if INTERPRETED else f"needs a CUDA tensor, got {x.device.type}"
    major, minor = torch.cuda.get_device_capability(x.device)
    if torch.version.hip is None and major < 8:
        return f"needs compute capability 8.0 or newer, got {major}.{minor}"
    return None


def why_not_tensors(*tensors: torch.Tensor) -> str | None:
    """Reason why [B, H, L, D] tensors cannot be served, or None."""
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


def why_not_blocks(block_q: int, block_k: int) -> str | None:
    """Reason why a mask granularity cannot be served, or None."""
    if block_q not in BLOCK_SIZES or block_k not in BLOCK_SIZES:
        return f"needs blocks of 64 or 128 tokens, got {block_q} x {block_k}"
    return None


def refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"The kernel {reason}.")


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x with D contiguous and every row on 16 bytes; a copy only when it is not so already."""
    strides = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides)
    return x if fits else x.contiguous()


def row_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of [B, H, L, :] in units of 8 elements; 0 where a dimension has one entry."""
    return tuple(s // 8 if n > 1 else 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))


def descriptor_geometry(x: torch.Tensor, rows: int) -> tuple[list, list, list]:
    """(shape, strides, block) of a TMA descriptor that reads `rows` tokens of one head."""
    # a dimension of one entry may carry any stride; TMA wants a multiple of 16 bytes
    strides = [s if n > 1 else x.shape[-1] for s, n in zip(x.stride(), x.shape, strict=True)]
    strides[-1] = 1
    return list(x.shape), strides, [1, 1, rows, x.shape[-1]]


def source(x: torch.Tensor, rows: int, tma: bool):
    """What a kernel loads tiles of `rows` tokens from: a TMA descriptor, or x itself."""
    return TensorDescriptor(x, *descriptor_geometry(x, rows)) if tma else x


def checked_bias(key_bias, B: int, Lk: int):
    """`key_bias` as a contiguous float32 [B, Lk], or None."""
    if key_bias is None:
        return None
    if key_bias.shape != (B, Lk):
        raise ValueError(f"`key_bias` must be [{B}, {Lk}], got {list(key_bias.shape)}.")
    return key_bias.to(torch.float32).contiguous()


def checked_lse(lse, q: torch.Tensor):
    """`lse` as a contiguous float32 [B, H, Lq], or None."""
    if lse is None:
        return None
    if lse.shape != q.shape[:3]:
        raise ValueError(f"The LSE must be {list(q.shape[:3])}, got {list(lse.shape)}.")
    return lse.to(torch.float32).contiguous()


def checked_tail(tail, Lk: int, rows: tuple, block_k: int, key_bias):
    """(N, contiguous bits) of a `tail` for Lk keys, (0, None) without one."""
    if tail is None:
        return 0, None
    # N blocks of tokens and ceil(N / 64) blocks of means
    total = Lk // 64
    num_listed = total - triton.cdiv(total, 65)
    if block_k != 64 or key_bias is None or Lk % 64 or tail.dtype != torch.uint8:
        raise ValueError(
            f"A tail needs key blocks of 64 tokens, a key bias, whole blocks of keys and uint8 "
            f"bits, got blocks of {block_k}, {Lk} keys and {tail.dtype}."
        )
    if tail.shape != (*rows, triton.cdiv(num_listed, 8)):
        raise ValueError(
            f"`tail` must be {[*rows, triton.cdiv(num_listed, 8)]}, got {list(tail.shape)}."
        )
    return num_listed, tail.contiguous()


def checked_order(order: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`order` of the tokens of x [B, H, L, D], its last dimension contiguous."""
    if order.shape != x.shape[:3] or order.dtype != torch.int32:
        raise ValueError(
            f"`order` must be {list(x.shape[:3])} int32, got {list(order.shape)} {order.dtype}."
        )
    return order if order.stride(-1) == 1 else order.contiguous()


def empty_output(q: torch.Tensor) -> torch.Tensor:
    """[B, H, Lq, D] viewed on a contiguous [B, Lq, H, D]."""
    B, H, L, D = q.shape
    return torch.empty((B, L, H, D), device=q.device, dtype=q.dtype).transpose(1, 2)


def on_device(x: torch.Tensor):
    """Context in which x's device is the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
