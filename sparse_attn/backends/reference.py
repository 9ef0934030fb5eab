"""Ground truth in plain torch: slow, obvious, float64 when given float64."""

import torch


def scaled_logits(q, k, scale: float, key_bias=None) -> torch.Tensor:
    """Logits [B, H, Lq, Lk] of q [B, H, Lq, D] and k [B, H, Lk, D]; `key_bias` is [B, Lk]."""
    logits = (q @ k.transpose(-1, -2)) * scale
    logits = logits.to(torch.promote_types(q.dtype, torch.float32))
    return logits if key_bias is None else logits + key_bias[:, None, None, :].to(logits.dtype)


def weights_of(logits, lse) -> torch.Tensor:
    """exp(logit - lse), 0 in rows whose LSE is -inf."""
    nothing = (lse == float("-inf"))[..., None]
    return (logits - lse[..., None].masked_fill(nothing, 0.0)).exp().masked_fill(nothing, 0.0)


def expand_blocks(keep, block_q: int, block_k: int, len_q: int, len_k: int) -> torch.Tensor:
    """Turn a block map [B, H, Nq, Nk] into a token map [B, H, Lq, Lk]."""
    keep = keep.repeat_interleave(block_q, -2)[..., :len_q, :]
    return keep.repeat_interleave(block_k, -1)[..., :len_k]


def sparse_attention(q, k, v, keep, *, block_q, block_k, scale, key_bias=None):
    """Attention over the kept key blocks only.

    Args:
        q: [B, H, Lq, D]. k, v: [B, H, Lk, D]. keep: [B, H, Nq, Nk] bool.

    Returns:
        out: [B, H, Lq, D], dtype of `v`, 0 where a row keeps no block.
        lse: [B, H, Lq], natural log, -inf where a row keeps no block.
    """
    logits = scaled_logits(q, k, scale, key_bias)
    tokens = expand_blocks(keep, block_q, block_k, q.shape[-2], k.shape[-2])
    logits = logits.masked_fill(~tokens, float("-inf"))
    lse = logits.logsumexp(-1)
    # a row without a key weighs nothing, instead of exp(-inf + inf)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return weights.to(v.dtype) @ v, lse


def in_order(x, order) -> torch.Tensor:
    """The tokens of x [B, H, L, D] in the `order` [B, H, L] of each head."""
    return x.gather(2, order.long()[..., None].expand(-1, -1, -1, x.shape[-1]))


def block_means(x, block: int) -> torch.Tensor:
    """Mean of every block of tokens of x [B, H, L, D], [B, H, N, D]."""
    return torch.stack([part.mean(-2) for part in x.split(block, -2)], -2)


def sparse_attention_with_tail(q, k, v, keep, order, *, block_q, block_k, scale, key_bias=None):
    """Attention over the kept key blocks and, for each other block, its mean key and mean value.

    A block in which any key has a bias has no stand-in.

    Args:
        q, k, v: [B, H, L, D]. keep: [B, H, Nq, N] bool, of the tokens in `order`. order: [B, H, L].
            A `key_bias` goes with the order of the first head.

    Returns:
        out: [B, H, L, D] as the tokens came. lse: [B, H, L] in `order`.
    """
    order = order.long()
    q, k, v = (in_order(x, order) for x in (q, k, v))
    length = k.shape[-2]
    if key_bias is not None:
        key_bias = key_bias.gather(1, order[:, 0])
    logits = scaled_logits(q, k, scale, key_bias)
    tokens = expand_blocks(keep, block_q, block_k, length, length)
    logits = logits.masked_fill(~tokens, float("-inf"))
    sizes = torch.tensor([part.shape[-1] for part in order.split(block_k, -1)], dtype=logits.dtype)
    pseudo = scaled_logits(q, block_means(k, block_k), scale) + sizes.log()
    pseudo = pseudo.masked_fill(expand_blocks(keep, block_q, 1, length, len(sizes)), float("-inf"))
    if key_bias is not None:
        biased = torch.stack([(part != 0).any(-1) for part in key_bias.split(block_k, -1)], -1)
        pseudo = pseudo.masked_fill(biased[:, None, None], float("-inf"))
    both = torch.cat([logits, pseudo], -1)
    lse = both.logsumexp(-1)
    values = torch.cat([v, block_means(v, block_k)], -2)
    arranged = weights_of(both, lse).to(v.dtype) @ values
    out = torch.empty_like(arranged)
    out.scatter_(2, order[..., None].expand_as(arranged), arranged)
    return out, lse


def tail_error(q, k, v, lse, *, block_q, block_k, scale) -> torch.Tensor:
    """sqrt(M (M - P)) s + (M - P) |vm - o| of every block pair, one at a time, [B, H, Nq, N].

    M and P are the masses of a block and of its pseudo key, vm and s the mean and the deviation of
    the block's values, o the mean output of the query block as the block means give it.
    """
    masses = block_masses(q, k, lse, block_q=block_q, block_k=block_k, scale=scale)
    k_mean, v_mean = block_means(k, block_k), block_means(v, block_k)
    pseudo = weights_of(scaled_logits(q, k_mean, scale), lse)
    scores = torch.zeros_like(masses)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in masses.shape)).tolist():
        b, h, i, j = index
        rows = slice(i * block_q, (i + 1) * block_q)
        values = v[b, h, j * block_k : (j + 1) * block_k]
        M = masses[b, h, i, j]
        P = len(values) * pseudo[b, h, rows, j].sum()
        s = (values - v_mean[b, h, j]).square().mean(0).sum().sqrt()
        o = masses[b, h, i] @ v_mean[b, h] / len(q[b, h, rows])
        # a rounded mean may weigh more than its keys
        missing = (M - P).clamp(min=0)
        scores[b, h, i, j] = (M * missing).sqrt() * s + missing * (v_mean[b, h, j] - o).norm()
    return scores


def dense_attention(q, k, v, *, scale, key_bias=None):
    """Attention over all keys; shapes as in `sparse_attention`."""
    logits = scaled_logits(q, k, scale, key_bias)
    lse = logits.logsumexp(-1)
    return weights_of(logits, lse).to(v.dtype) @ v, lse


def block_masses(q, k, lse, *, block_q, block_k, scale, key_bias=None) -> torch.Tensor:
    """M[i, j]: sum of exp(logit - lse) over query block i and key block j, [B, H, Nq, Nk]."""
    weights = weights_of(scaled_logits(q, k, scale, key_bias), lse)
    B, H, len_q, len_k = weights.shape
    pad_q, pad_k = -len_q % block_q, -len_k % block_k
    weights = torch.nn.functional.pad(weights, (0, pad_k, 0, pad_q))
    weights = weights.view(B, H, (len_q + pad_q) // block_q, block_q, -1, block_k)
    return weights.sum((3, 5))


def renormalised(masses, len_q: int, block_q: int) -> torch.Tensor:
    """Scale every row of blocks to sum to its number of query rows."""
    masses = masses.clone()
    for i in range(masses.shape[-2]):
        rows = min(block_q, len_q - i * block_q)
        masses[..., i, :] *= rows / masses[..., i, :].sum(-1, keepdim=True)
    return masses


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


def row_wise_top_k(scores, budgets, sink, sink_q=None) -> torch.Tensor:
    """Per row, one at a time: the sinks first, then the highest scores. All of a sink's row.

    Args:
        scores: [B, H, Nq, Nk]. budgets: [B][H] key blocks per row. sink: [Nk] bool.
        sink_q: [Nq] bool, None where the same.
    """
    sink_q = sink if sink_q is None else sink_q
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:-1])).tolist():
        b, h, i = index
        row = scores[b, h, i].tolist()
        order = sorted(range(len(row)), key=lambda j: (not sink[j], -row[j]))
        kept = range(len(row)) if sink_q[i] else order[: budgets[b][h]]
        keep[b, h, i][list(kept)] = True
    return keep


def sink_blocks(layout, block_size: int) -> list[bool]:
    """Whether each block holds a token outside the video, token by token."""
    video = range(layout.before, layout.before + layout.video)
    starts = range(0, layout.tokens, block_size)
    blocks = [range(start, min(start + block_size, layout.tokens)) for start in starts]
    return [any(token not in video for token in block) for block in blocks]
