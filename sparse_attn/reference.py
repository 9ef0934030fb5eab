"""Ground truth in plain torch: slow, obvious, float64 when given float64."""

import torch


def scaled_logits(q, k, scale: float, key_bias=None) -> torch.Tensor:
    """Logits [B, H, Lq, Lk] of q [B, H, Lq, D] and k [B, H, Lk, D]; `key_bias` is [B, Lk]."""
    logits = (q @ k.transpose(-1, -2)) * scale
    logits = logits.to(torch.promote_types(q.dtype, torch.float32))
    return logits if key_bias is None else logits + key_bias[:, None, None, :].to(logits.dtype)


def expand_blocks(keep, block_q: int, block_k: int, len_q: int, len_k: int) -> torch.Tensor:
    """Turn a block map [B, H, Nq, Nk] into a token map [B, H, Lq, Lk]."""
    keep = keep.repeat_interleave(block_q, -2)[..., :len_q, :]
    return keep.repeat_interleave(block_k, -1)[..., :len_k]


def sparse_attention(q, k, v, keep, *, block_q, block_k, scale, key_bias=None):
    """Attention over the kept key blocks only.

    Args:
        q: [B, H, Lq, D]. k, v: [B, H, Lk, D]. keep: [B, H, Nq, Nk] bool.

    Returns:
        out: [B, H, Lq, D], dtype of `v`. lse: [B, H, Lq], natural log.
    """
    logits = scaled_logits(q, k, scale, key_bias)
    tokens = expand_blocks(keep, block_q, block_k, q.shape[-2], k.shape[-2])
    logits = logits.masked_fill(~tokens, float("-inf"))
    lse = logits.logsumexp(-1)
    out = (logits - lse[..., None]).exp().to(v.dtype) @ v
    return out, lse


def dense_attention(q, k, v, *, scale, key_bias=None):
    """Attention over all keys; shapes as in `sparse_attention`."""
    logits = scaled_logits(q, k, scale, key_bias)
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().to(v.dtype) @ v, lse


def block_masses(q, k, lse, *, block_q, block_k, scale, key_bias=None) -> torch.Tensor:
    """M[i, j]: sum of exp(logit - lse) over query block i and key block j, [B, H, Nq, Nk]."""
    weights = (scaled_logits(q, k, scale, key_bias) - lse[..., None]).exp()
    B, H, len_q, len_k = weights.shape
    pad_q, pad_k = -len_q % block_q, -len_k % block_k
    weights = torch.nn.functional.pad(weights, (0, pad_k, 0, pad_q))
    weights = weights.view(B, H, (len_q + pad_q) // block_q, block_q, -1, block_k)
    return weights.sum((3, 5))


def row_wise_top_k(scores, budget: int, sink) -> torch.Tensor:
    """Per row, one at a time: the sinks first, then the highest scores. All of a sink's row."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:-1])).tolist():
        row = scores[tuple(index)].tolist()
        order = sorted(range(len(row)), key=lambda j: (not sink[j], -row[j]))
        kept = range(len(row)) if sink[index[-1]] else order[:budget]
        keep[tuple(index)][list(kept)] = True
    return keep
