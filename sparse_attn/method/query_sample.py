"""A sample of the query rows of every block, which measures its masses at a part of the price."""

import torch


def query_sample(tokens: int, stride: int, device: torch.device) -> torch.Tensor:
    """Choose one row of every `stride` that follow each other, here the first, there another.

    In a block of 4 x 4 x 4 tokens the rows of a sample of every fourth take each frame, row and
    column equally often, and each pair of two of them once: a Latin square.

    Returns:
        [ceil(tokens / stride)] int64, ascending places.
    """
    groups = torch.arange(-(-tokens // stride), device=device)
    return (stride * groups + (groups + groups // 4) % stride).clamp_(max=tokens - 1)
