"""The truths of the method: token by token and head by head, nothing rounded to blocks."""

import torch

from sparse_attn.backends.reference import expand_blocks, scaled_logits


def recall(q, k, keep, *, block_q, block_k, scale, key_bias=None) -> torch.Tensor:
    """Share of each head's softmax weight that falls on kept blocks, token by token, [B, H]."""
    weights = scaled_logits(q, k, scale, key_bias).softmax(-1)
    tokens = expand_blocks(keep, block_q, block_k, q.shape[-2], k.shape[-2])
    return (weights * tokens).sum((-1, -2)) / weights.sum((-1, -2))


def head_sparsities(recalls: list[float], sparsity: float) -> list[float]:
    """One sparsity per head (AdaSpa, 4.3), before anything is rounded to whole blocks."""
    heads = sorted(range(len(recalls)), key=lambda head: -recalls[head])
    n = min(sum(recall > 0.8 for recall in recalls), len(recalls) // 2)
    sparsities = [sparsity] * len(recalls)
    for head in heads[:n]:
        sparsities[head] = (1 + sparsity) / 2
    for head in heads[len(heads) - n :]:
        sparsities[head] = (3 * sparsity - 1) / 2
    return sparsities


def sink_blocks(layout, block_size: int) -> list[bool]:
    """Whether each block holds a token outside the video, token by token."""
    video = range(layout.before, layout.before + layout.video)
    starts = range(0, layout.tokens, block_size)
    blocks = [range(start, min(start + block_size, layout.tokens)) for start in starts]
    return [any(token not in video for token in block) for block in blocks]
