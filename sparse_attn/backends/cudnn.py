"""cuDNN's dense attention through torch, which yields the LSE that the public function keeps back."""

import torch


def torch_cudnn(q, k, v, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's attention through torch; q, k, v [B, H, L, D] bf16 or fp16 on a CUDA device.

    Returns:
        out: [B, H, L, D]. lse: [B, H, L] float32, natural log.
    """
    # the public function picks a backend by itself and does not return the LSE
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, False, False, scale=scale
    )
    return out, lse.view(q.shape[:-1])


def cudnn_serves(q) -> bool:
    """Whether torch has cuDNN's attention for tensors like q."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(q.device) >= (
        8,
        0,
    )
