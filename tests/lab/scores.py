"""Exact scores of every block pair, in chunks of query rows.

With w the softmax weights of a row, U_j = sum of w v over the keys of block j, m_j = sum of w,
vm_j and km_j the mean value and key of the block, n_j its size, p_j = n_j exp(q km_j - LSE) the
weight of its pseudo key and o the row's exact output:

    mass        sum over rows of m_j
    error       sum of |U_j - m_j vm_j|: what a tail of the right mass leaves
    tail error  sum of |U_j - p_j vm_j - (m_j - p_j) o|: to first order, what pseudo keys leave
    drop error  sum of |U_j - m_j o|: to first order, what leaving the block out costs
    deficit     sum of m_j - p_j: the mass that pseudo keys miss; never negative
    spread      sum of sqrt(n_j (sum of w^2 - m_j^2 / n_j)) times the deviation of the values
    ...squared  the same with squares summed over the rows
    block drop  M |vm_j - om_i|, with the block's mass M and om_i = sum of M vm_j over the rows of
                block i, its mean output but for what varies inside key blocks
    block tail  sqrt(M (M - P)) s_j + (M - P) |vm_j - om_i|, with the pseudo mass P of the block and
                the deviation s_j of its values: two scores that need no pass over the values
"""

import torch
import torch.nn.functional as F

CHUNK_BYTES = 3 << 29
SCORES = ("mass", "error", "tail error", "drop error", "deficit", "spread",
          "error squared", "tail error squared", "drop error squared", "block drop",
          "block tail")  # fmt: skip
BY_BLOCK = ("block drop", "block tail")
QUICK = ("mass", "deficit", *BY_BLOCK)  # need no product with the values


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
def analyse(q, k, v, wanted=SCORES, *, block_q=64, block_k=64, scale=None) -> dict:
    """{score: [B, H, Nq, Nk] float32} for [B, H, L, D] tensors; "mass" is always there.

    "lse" [B, H, L], "key mass" [B, H, L] (how much weight every key receives) and "query mass"
    (the same from mean queries and their mean denominators) come along.
    """
    B, H, L, D = q.shape
    scale = D**-0.5 if scale is None else scale
    Nq, Nk = -(-L // block_q), -(-L // block_k)
    flat = [x.flatten(0, 1).float() for x in (q, k, v)]
    number = sizes(L, block_k, q.device)
    by_block = set(BY_BLOCK) & set(wanted)
    wanted = {"mass", *wanted} - by_block | ({"deficit"} if by_block else set())
    only_mass = wanted == {"mass"}
    result = {name: torch.empty(B * H, Nq, Nk, device=q.device) for name in wanted}
    result["lse"] = torch.empty(B * H, L, device=q.device)
    result["key mass"] = torch.zeros(B * H, L, device=q.device)
    per_row = 4 * Nk * (block_k * 4 + (0 if only_mass else 3 * D))
    rows = max(1, CHUNK_BYTES // per_row // block_q) * block_q
    heads = max(1, rows // (Nq * block_q))
    for i in range(0, B * H, heads):
        one = slice(i, i + heads)
        kb, vb = blocks_of(flat[1][one], block_k), blocks_of(flat[2][one], block_k)
        centre = {"k": means(flat[1][one], block_k), "v": means(flat[2][one], block_k)}
        inside = sizes(L, block_k, q.device)[:, None] > torch.arange(block_k, device=q.device)
        spread_v = ((vb - centre["v"][..., None, :]) * inside[..., None]).square().sum((-1, -2))
        spread_v = (spread_v / number).sqrt()
        keys = kb.flatten(1, 2)
        for r in range(0, L, rows):
            part = flat[0][one, r : r + rows]
            w = part @ keys.mT * scale
            w[..., L:] = float("-inf")
            lse = w.logsumexp(-1, keepdim=True)
            w = w.sub_(lse).exp_()
            result["lse"][one, r : r + rows] = lse[..., 0]
            result["key mass"][one] += w[..., :L].sum(1)
            found = _of_rows(
                w.unflatten(-1, (Nk, block_k)), vb, centre, number, spread_v, part, lse, scale,
                only_mass, wanted,
            )  # fmt: skip
            for name, value in found.items():
                short = -value.shape[1] % block_q
                value = F.pad(value, (0, 0, 0, short)).unflatten(1, (-1, block_q)).sum(2)
                result[name][one, r // block_q : r // block_q + value.shape[1]] = value
    q_mean, lse_mean = means(flat[0], block_q), means(result["lse"][..., None], block_q)
    gap = sizes(L, block_q, q.device).log() - lse_mean[..., 0]
    result["query mass"] = (flat[1] @ q_mean.mT * scale + gap[:, None]).logsumexp(-1).exp()
    result = {name: x.unflatten(0, (B, H)) for name, x in result.items()}
    if by_block:
        centre = means(v, block_k)
        variance = (means(v.float().square(), block_k) - centre.square()).clamp(min=0)
        result |= {"value mean": centre, "value spread": variance.sum(-1).sqrt()}
        result |= of_blocks(result)
    return result


def of_blocks(found: dict) -> dict:
    """The scores that only need sums over blocks."""
    mass, deficit, centre = (found[name] for name in ("mass", "deficit", "value mean"))
    out = (mass / mass.sum(-1, keepdim=True).clamp(min=1e-20)) @ centre
    apart = torch.cdist(out, centre)
    spread = found["value spread"][:, :, None]
    return {
        "block drop": mass * apart,
        "block tail": (mass * deficit).clamp(min=0).sqrt() * spread + deficit * apart,
    }


def _of_rows(w, vb, centre, number, spread_v, q, lse, scale, only_mass, wanted) -> dict:
    """Scores of every row and block, [n, R, N], from weights [n, R, N, block]."""
    mass = w.sum(-1)
    if only_mass:
        return {"mass": mass}
    found = {"mass": mass}
    pseudo = number * (q @ centre["k"].mT * scale - lse).exp()
    found["deficit"] = (mass - pseudo).clamp(min=0)
    if "spread" in wanted:
        deviation = (number * w.square().sum(-1) - mass.square()).clamp(min=0).sqrt()
        found["spread"] = deviation * spread_v[:, None]
    if any("error" in name for name in wanted):
        # [n, N, R, D], a matrix product per block
        u = w.transpose(1, 2) @ vb
        o = u.sum(1)
        uu = u.square().sum(-1).transpose(1, 2)
        uv = (u @ centre["v"][..., None])[..., 0].transpose(1, 2)
        uo = (u * o[:, None]).sum(-1).transpose(1, 2)
        vv, vo = centre["v"].square().sum(-1)[:, None], o @ centre["v"].mT
        oo = o.square().sum(-1, keepdim=True)

        def left(a, b):
            """|U - a vm - b o| squared."""
            total = uu + a * a * vv + b * b * oo - 2 * a * uv - 2 * b * uo + 2 * a * b * vo
            return total.clamp(min=0)

        kinds = {
            "error": left(mass, torch.zeros_like(mass)),
            "tail error": left(pseudo, mass - pseudo),
            "drop error": left(torch.zeros_like(mass), mass),
        }
        for name, value in kinds.items():
            found[f"{name} squared"] = value
            found[name] = value.sqrt()
    return {name: x for name, x in found.items() if name in wanted or name == "mass"}


def grouped(found: dict, rows: int) -> dict:
    """The scores of query blocks that are `rows` times as large."""
    if rows == 1:
        return found
    whole = ("lse", "key mass", "query mass", "value mean", "value spread")
    found = {name: x if name in whole else coarser(x, rows) for name, x in found.items()}
    return found | (of_blocks(found) if "value mean" in found else {})


def coarser(scores: torch.Tensor, rows: int) -> torch.Tensor:
    """Sums of `rows` neighbouring rows of blocks."""
    return F.pad(scores, (0, 0, 0, -scores.shape[-2] % rows)).unflatten(-2, (-1, rows)).sum(-2)
