"""Orders per head in which 64 consecutive tokens hold similar queries, or similar keys.

Two keys are alike where the queries there are give them nearly the same scores: keys are compared
after a map whose squared lengths are the queries' mean squared scores, queries likewise with the
keys. Of that the `DIMENSIONS` leading directions count, and a little where and when tokens lie,
which keeps an order good for later steps. Sets of tokens are then halved across their principal
direction until blocks are left.
"""

from itertools import pairwise

import torch
from orders import coordinates, rods

DIMENSIONS = 16
NEAR = 0.3  # what places count beside features, both of deviation 1
LEAF = 64
PLACES = {"free": 0.0, "near": 1.0}
QUERIES = {"one": 1.0, "one half": 0.5}
COARSE = 16  # blocks of rods that "within" reorders together


def is_clusters(name: str) -> bool:
    return name.startswith("clusters")


@torch.no_grad()
def cluster_orders(name: str, q, k, layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Orders of the queries and of the keys, [B, H, L] each, text behind the video.

    Args:
        name: "clusters", alone or with "keys" (queries stay in rods), "one" (one order for
            both, of tokens with similar keys and queries), "one half" (queries count half),
            "within" (clusters inside of 16 blocks of rods), "free" (places do not count) or
            "near" (they count more).
        q, k: [B, H, L, D] in raster order.
    """
    word = name.removeprefix("clusters").strip()
    video = slice(layout.before, layout.before + layout.video)
    q, k = (x[:, :, video].float() for x in (q, k))
    grid = (layout.frames, layout.height, layout.width)
    place = torch.stack([a.flatten().float() for a in coordinates(grid)], -1).to(q.device)
    snake = rods(grid).to(q.device)

    def order(*features):
        near = PLACES.get(word, NEAR) * unit(place).expand(*q.shape[:2], -1, -1)
        features = torch.cat([*features, near], -1)
        if word != "within":
            return halved(features)
        count = -(-layout.video // LEAF)
        bounds = [*range(0, count, COARSE), count]
        return snake[halved(features[:, :, snake], bounds)]

    if word in QUERIES:
        features = unit(leading(k, q)), QUERIES[word] * unit(leading(q, k))
        of_queries = of_keys = order(*features)
    else:
        of_keys = order(unit(leading(k, q)))
        rest = word == "keys"
        of_queries = snake.expand_as(of_keys) if rest else order(unit(leading(q, k)))
    text = [torch.arange(layout.before), torch.arange(video.stop, layout.tokens)]
    text = torch.cat(text).to(q.device).expand(*of_keys.shape[:2], -1)
    return tuple(torch.cat([x + layout.before, text], -1) for x in (of_queries, of_keys))


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
    _, directions = torch.linalg.eigh(spread)
    return x @ (root @ directions[..., -DIMENSIONS:])


def halved(x: torch.Tensor, bounds: list[int] | None = None) -> torch.Tensor:
    """[B, H, L]: the order that halving [B, H, L, F] down to blocks of `LEAF` rows ends in.

    Args:
        bounds: numbers of blocks between which to halve; all of them without.
    """
    B, H, L, _ = x.shape
    y = x.flatten(0, 1)
    order = torch.arange(L, device=x.device).expand(B * H, L)
    bounds = bounds or [0, -(-L // LEAF)]
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
