"""Ground truth in plain torch: slow, obvious, float64 when given float64.

Every operation of `choice.Backend` has its truth here, under its name and with its arguments.
"""

import torch

from .permuted import BLOCK, Permuted, Pooled


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


def attention(q, k, v, *, scale, key_bias=None, mask=None, pooled=None, order=None):
    """Attention over all keys, or over the blocks that a mask keeps and the means of the others.

    Args:
        q: [B, H, Lq, D]. k, v: [B, H, Lk, D]. key_bias: [B, Lk] or None.
        mask: a `BlockMask` or None. pooled: a `Pooled` or None.
        order: [B, H, Lq], the token at every place of q, or None.

    Returns:
        out: [B, H, Lq, D] in the order of the tokens, dtype of `v`, 0 where a row sees no key.
        lse: [B, H, Lq] in the order of q, natural log, -inf where a row sees no key.
    """
    logits = scaled_logits(q, k, scale, key_bias)
    if mask is not None:
        keep = mask.to_dense()
        tokens = expand_blocks(keep, mask.block_q, mask.block_k, q.shape[-2], k.shape[-2])
        logits = logits.masked_fill(~tokens, float("-inf"))
        if pooled is not None:
            means = scaled_logits(q, pooled.k_mean, scale, pooled.log_sizes)
            listed = expand_blocks(keep, mask.block_q, 1, q.shape[-2], mask.num_k)
            logits = torch.cat([logits, means.masked_fill(listed, float("-inf"))], -1)
            v = torch.cat([v, pooled.v_mean], -2)
    lse = logits.logsumexp(-1)
    out = weights_of(logits, lse).to(v.dtype) @ v
    if order is not None:
        places = order.long()[..., None].expand_as(out)
        out = torch.empty_like(out).scatter_(2, places, out)
    return out, lse


def attention_with_masses(q, k, v, *, scale, previous_lse, block_q, block_k, key_bias=None):
    """Dense attention, and the masses by an earlier LSE, scaled to their rows."""
    options = {"scale": scale, "key_bias": key_bias}
    masses = block_masses(q, k, previous_lse, block_q=block_q, block_k=block_k, **options)
    return *attention(q, k, v, **options), masses


# what quantising changes is error
quantised_attention = attention


def block_masses(
    q, k, lse, *, block_q, block_k, scale, key_bias=None, renormalise=True, int8=False
) -> torch.Tensor:
    """M[i, j]: sum of exp(logit - lse) over query block i and key block j, [B, H, Nq, Nk]."""
    weights = weights_of(scaled_logits(q, k, scale, key_bias), lse)
    B, H, len_q, len_k = weights.shape
    pad_q, pad_k = -len_q % block_q, -len_k % block_k
    weights = torch.nn.functional.pad(weights, (0, pad_k, 0, pad_q))
    weights = weights.view(B, H, (len_q + pad_q) // block_q, block_q, -1, block_k)
    masses = weights.sum((3, 5))
    return renormalised(masses, len_q, block_q) if renormalise else masses


def renormalised(masses, len_q: int, block_q: int) -> torch.Tensor:
    """Scale every row of blocks to sum to its number of query rows; a row of none stays."""
    masses = masses.clone()
    for i in range(masses.shape[-2]):
        rows, total = min(block_q, len_q - i * block_q), masses[..., i, :].sum(-1, keepdim=True)
        masses[..., i, :] *= (rows / total).where(total != 0, 1.0)
    return masses


def pooled_masses(q, k_mean, log_sizes, lse, *, block_q, scale) -> torch.Tensor:
    """P[i, j]: the same of pooled keys [B, H, N, D] that weigh exp(log_sizes [B, N])."""
    options = {"scale": scale, "key_bias": log_sizes, "renormalise": False}
    return block_masses(q, k_mean, lse, block_q=block_q, block_k=1, **options)


def tail_error(masses, pooled, v, v_mean) -> torch.Tensor:
    """sqrt(M (M - P)) s + (M - P) |vm - o| of every block pair, one at a time, [B, H, Nq, N].

    M and P are the masses of a block and of its pooled key, vm and s the mean and the deviation of
    the block's values, o the mean output of the query block as the block means give it.
    """
    scores = torch.zeros_like(masses)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in masses.shape)).tolist():
        b, h, i, j = index
        values = v[b, h, j * BLOCK : (j + 1) * BLOCK]
        M, row = masses[b, h, i, j], masses[b, h, i]
        s = (values - v_mean[b, h, j]).square().mean(0).sum().sqrt()
        o = row @ v_mean[b, h] / row.sum()
        # a rounded mean may weigh more than its keys
        missing = (M - pooled[b, h, i, j]).clamp(min=0)
        scores[b, h, i, j] = (M * missing).sqrt() * s + missing * (v_mean[b, h, j] - o).norm()
    return scores


def permute(q, k, v, order, key_bias=None) -> Permuted:
    """Tokens in their order and the means of its blocks; a block with a biased key has none."""
    if key_bias is not None:
        # the heads have one order where there is a bias
        key_bias = key_bias.gather(1, order[:, 0].long())
    q = None if q is None else in_order(q, order)
    k, v = in_order(k, order), in_order(v, order)
    sizes = [part.shape[-1] for part in order.split(BLOCK, -1)]
    dtype = torch.promote_types(k.dtype, torch.float32)
    log_sizes = torch.tensor(sizes, dtype=dtype, device=k.device).log().repeat(len(k), 1)
    if key_bias is not None:
        biased = [(part != 0).any(-1) for part in key_bias.split(BLOCK, -1)]
        log_sizes = log_sizes.masked_fill(torch.stack(biased, -1), float("-inf"))
    return Permuted(q, k, v, key_bias, Pooled(block_means(k), block_means(v), log_sizes))


def in_order(x, order) -> torch.Tensor:
    """The tokens of x [B, H, L, D] in the `order` [B, H, L] of each head."""
    return x.gather(2, order.long()[..., None].expand(-1, -1, -1, x.shape[-1]))


def block_means(x) -> torch.Tensor:
    """Mean of every block of 64 tokens of x [B, H, L, D], [B, H, N, D]."""
    return torch.stack([part.mean(-2) for part in x.split(BLOCK, -2)], -2)


def features(q, k, centres, directions, places) -> torch.Tensor:
    """(q - centre) @ directions, the same of k, and places; 0 where that is not finite."""
    sides = [(x - c[:, :, None]) @ w for x, c, w in zip((q, k), centres, directions, strict=True)]
    found = torch.cat([*sides, places.expand(*q.shape[:3], -1)], -1)
    return found.masked_fill(~found.isfinite(), 0.0)


def pca_tree(features) -> torch.Tensor:
    """[h, V] order of [h, V, F]: on every level each node is split at the median of its direction.

    The direction is that of eight power steps over 128 samples of the node.
    """
    tokens = torch.arange(features.shape[1])
    levels = (-(-len(tokens) // BLOCK) - 1).bit_length()
    return torch.stack([_split(head, tokens, levels) for head in features])


def _split(features, tokens, levels: int) -> torch.Tensor:
    if levels == 0 or len(tokens) == 0:
        return tokens
    some = features[tokens[torch.arange(128) * len(tokens) // 128]]
    some = some - some.mean(0)
    direction = some.square().sum(0).sqrt()
    for _ in range(8):
        direction = some.T @ (some @ direction)
        direction = direction / direction.norm().clamp(min=1e-20)
    tokens = tokens[(features[tokens] @ direction).argsort(stable=True)]
    middle = (-(-len(tokens) // BLOCK) + 1) // 2 * BLOCK
    halves = tokens[:middle], tokens[middle:]
    return torch.cat([_split(features, half, levels - 1) for half in halves])


def row_wise_top_k(scores, masses, budgets, largest_budget, sink_k, sink_q):
    """Per row, one at a time: the sinks first, then the highest scores. All of a sink's row.

    Returns:
        keep: [B, H, Nq, Nk] bool. recall: [B, H], the share of mass that it keeps.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:-1])).tolist():
        b, h, i = index
        row = scores[b, h, i].tolist()
        order = sorted(range(len(row)), key=lambda j: (not sink_k[j], -row[j]))
        kept = range(len(row)) if sink_q[i] else order[: budgets[b][h]]
        keep[b, h, i][list(kept)] = True
    return keep, (masses * keep).sum((-1, -2)) / masses.sum((-1, -2))
