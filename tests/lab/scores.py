"""Exact scores of every block pair, in chunks of query rows.

With w the softmax weights of a row, m_j = sum of w over the keys of block j, n_j the block's size,
km_j its mean key and p_j = n_j exp(q km_j - LSE) the weight of its pseudo key:

    mass        sum over rows of m_j
    deficit     sum of m_j - p_j: the mass that pseudo keys miss; never negative
    block tail  sqrt(M (M - P)) s_j + (M - P) |vm_j - om_i|, to first order what pseudo keys leave, from
                sums over blocks: mass M, pseudo mass P, deviation s_j and mean vm_j of the block's
                values, and om_i = sum of M vm_j over the rows of block i, its mean output but for
                what varies inside key blocks
"""

import torch
import torch.nn.functional as F

CHUNK_BYTES = 3 << 29
PER_PAIR = ("mass", "deficit")


def sizes(length: int, block: int, device=None) -> torch.Tensor:
    """Tokens of every block, [N] float32."""
    return (length - torch.arange(0, length, block, device=device)).clamp(max=block).float()


def blocks_of(x: torch.Tensor, block: int) -> torch.Tensor:
    """[..., L, D] -> [..., N, block, D], padded with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % block)).unflatten(-2, (-1, block))


def means(x: torch.Tensor, block: int) -> torch.Tensor:
    """Mean of every block of [..., L, D], float32."""
    return blocks_of(x.float(), block).sum(-2) / sizes(x.shape[-2], block, x.device)[:, None]


@torch.no_grad()
def analyse(q, k, v, *, block_q=64, block_k=64, scale=None, tails: bool = True) -> dict:
    """{score: [B, H, Nq, Nk] float32} for [B, H, L, D] tensors; only masses without `tails`.

    "lse" [B, H, L] and "query mass" [B, H, L] come along: how much weight every key receives,
    estimated from mean queries and their mean denominators.
    """
    B, H, L, D = q.shape
    scale = D**-0.5 if scale is None else scale
    Nq, Nk = -(-L // block_q), -(-L // block_k)
    flat = [x.flatten(0, 1).float() for x in (q, k)]
    number = sizes(L, block_k, q.device)
    names = PER_PAIR if tails else PER_PAIR[:1]
    result = {name: torch.empty(B * H, Nq, Nk, device=q.device) for name in names}
    result["lse"] = torch.empty(B * H, L, device=q.device)
    rows = max(1, CHUNK_BYTES // (16 * Nk * block_k) // block_q) * block_q
    heads = max(1, rows // (Nq * block_q))
    for i in range(0, B * H, heads):
        one = slice(i, i + heads)
        keys, k_mean = blocks_of(flat[1][one], block_k).flatten(1, 2), means(flat[1][one], block_k)
        for r in range(0, L, rows):
            part = flat[0][one, r : r + rows]
            w = part @ keys.mT * scale
            w[..., L:] = float("-inf")
            lse = w.logsumexp(-1, keepdim=True)
            result["lse"][one, r : r + rows] = lse[..., 0]
            found = {"mass": w.sub_(lse).exp_().unflatten(-1, (Nk, block_k)).sum(-1)}
            if tails:
                pseudo = number * (part @ k_mean.mT * scale - lse).exp()
                found["deficit"] = (found["mass"] - pseudo).clamp(min=0)
            for name, value in found.items():
                short = -value.shape[1] % block_q
                value = F.pad(value, (0, 0, 0, short)).unflatten(1, (-1, block_q)).sum(2)
                result[name][one, r // block_q : r // block_q + value.shape[1]] = value
    q_mean, lse_mean = means(flat[0], block_q), means(result["lse"][..., None], block_q)
    gap = sizes(L, block_q, q.device).log() - lse_mean[..., 0]
    result["query mass"] = (flat[1] @ q_mean.mT * scale + gap[:, None]).logsumexp(-1).exp()
    result = {name: x.unflatten(0, (B, H)) for name, x in result.items()}
    if tails:
        centre = means(v, block_k)
        variance = (means(v.float().square(), block_k) - centre.square()).clamp(min=0)
        result |= {"value mean": centre, "value spread": variance.sum(-1).sqrt()}
        result["block tail"] = block_tail(result)
    return result


def block_tail(found: dict) -> torch.Tensor:
    mass, deficit, centre = (found[name] for name in ("mass", "deficit", "value mean"))
    out = (mass / mass.sum(-1, keepdim=True).clamp(min=1e-20)) @ centre
    spread = found["value spread"][:, :, None]
    return (mass * deficit).clamp(min=0).sqrt() * spread + deficit * torch.cdist(out, centre)


def grouped(found: dict, rows: int) -> dict:
    """The scores of query blocks that are `rows` times as large."""
    if rows == 1:
        return found
    found = {name: coarser(x, rows) if name in PER_PAIR else x for name, x in found.items()}
    return found | ({"block tail": block_tail(found)} if "deficit" in found else {})


def coarser(scores: torch.Tensor, rows: int) -> torch.Tensor:
    """Sums of `rows` neighbouring rows of blocks."""
    return F.pad(scores, (0, 0, 0, -scores.shape[-2] % rows)).unflatten(-2, (-1, rows)).sum(-2)
