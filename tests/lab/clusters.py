"""An order per head in which 64 consecutive tokens hold similar queries and keys.

Two keys are alike where the queries there are give them nearly the same scores: keys are compared
after a map whose squared lengths are the queries' mean squared scores, queries likewise with the
keys. Of that the `DIMENSIONS` leading directions count, of queries with half the weight of keys, and
a little where and when tokens lie, which keeps an order good for later steps. Sets of tokens are
then halved across their principal direction until blocks are left.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch
from orders import coordinates

from sparse_attn.orders.similarity import similar_order

DIMENSIONS = 16
QUERIES = 0.5  # what queries count beside keys
NEAR = 0.3  # what places count beside keys
LEAF = 64
NAMES = ("clusters", "clusters of the pack")


@torch.no_grad()
def cluster_order(name: str, q, k, layout) -> torch.Tensor:
    """[B, H, L] for q and k [B, H, L, D] in raster order; text goes behind the video.

    Args:
        name: "clusters", or "clusters of the pack": what the pack itself makes.
    """
    if name == "clusters of the pack":
        return similar_order(q, k, layout).long()
    video = slice(layout.before, layout.before + layout.video)
    q, k = (x[:, :, video].float() for x in (q, k))
    grid = (layout.frames, layout.height, layout.width)
    place = torch.stack([a.flatten().float() for a in coordinates(grid)], -1).to(q.device)
    place = unit(place).expand(*q.shape[:2], -1, -1)
    features = unit(leading(k, q)), QUERIES * unit(leading(q, k)), NEAR * place
    order = halved(torch.cat(features, -1)) + layout.before
    text = [torch.arange(layout.before), torch.arange(video.stop, layout.tokens)]
    text = torch.cat(text).to(q.device).expand(*order.shape[:2], -1)
    return torch.cat([order, text], -1)


def unit(x: torch.Tensor) -> torch.Tensor:
    """x with its mean taken off and a mean squared length of 1."""
    x = x - x.mean(-2, keepdim=True)
    return x / x.square().sum(-1, keepdim=True).mean(-2, keepdim=True).sqrt().clamp(min=1e-20)


def leading(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The leading directions of x after the map that makes lengths of scores with `other`."""
    moment = other.mT @ other / other.shape[-2]
    trace = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    root = torch.linalg.cholesky(moment + 1e-4 * trace * torch.eye(x.shape[-1], device=x.device))
    x = x - x.mean(-2, keepdim=True)
    spread = root.mT @ (x.mT @ x / x.shape[-2]) @ root
    return x @ (root @ eigenvectors(spread)[..., -DIMENSIONS:])


def eigenvectors(x: torch.Tensor) -> torch.Tensor:
    """Of symmetric [B, H, D, D]; a GPU would take so many small ones one after the other."""
    found = threads().map(lambda one: torch.linalg.eigh(one)[1], x.cpu())
    return torch.stack(list(found)).to(x.device)


@cache
def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(8)


def halved(x: torch.Tensor) -> torch.Tensor:
    """[B, H, L]: the order that halving [B, H, L, F] down to blocks of `LEAF` rows ends in."""
    B, H, L, _ = x.shape
    y = x.flatten(0, 1)
    order = torch.arange(L, device=x.device).expand(B * H, L)
    bounds = [0, -(-L // LEAF)]
    while max(b - a for a, b in pairwise(bounds)) > 1:
        edges = torch.tensor(bounds, device=x.device).mul(LEAF).clamp(max=L)
        first, last = edges[:-1, None], edges[1:, None]
        places = first + torch.arange(int((last - first).max()), device=x.device)
        inside = places < last
        z = y[:, places.clamp(max=L - 1)] * inside[..., None]
        z = (z - z.sum(-2, keepdim=True) / (last - first)[..., None]) * inside[..., None]
        along = (z @ principal(z.mT @ z))[..., 0].masked_fill(~inside, float("inf"))
        # what is outside of its set sorts behind it
        moved = (first + along.argsort(-1))[:, inside]
        order = order.gather(1, moved)
        y = y.gather(1, moved[..., None].expand_as(y))
        middles = {(a + b + 1) // 2 for a, b in pairwise(bounds)}
        bounds = sorted({*bounds, *middles})
    return order.unflatten(0, (B, H))


def principal(moment: torch.Tensor, rounds: int = 12) -> torch.Tensor:
    """Leading eigenvectors of [..., F, F] by the power method, [..., F, 1]."""
    direction = moment.diagonal(dim1=-2, dim2=-1).sqrt()[..., None] + 1e-6
    for _ in range(rounds):
        direction = moment @ direction
        direction = direction / direction.norm(dim=-2, keepdim=True).clamp(min=1e-20)
    return direction
