"""Median splits along the first principal component: blocks of tokens that are alike.

A node is a range of places in the order. Its tokens are split at the median along the direction in
which a sample of them differs most, then each half again, down to a block.
"""

from itertools import pairwise

import torch

from ..permuted import BLOCK

SAMPLED_PER_NODE = 128
POWER_STEPS = 8
WORKSPACE_BYTES = 1 << 29


def pca_tree(features: torch.Tensor) -> torch.Tensor:
    """Order tokens so that every block of 64 holds alike ones.

    Args:
        features: [h, V, F] float32, finite.

    Returns:
        [h, V] int32, the token at every place. Equal inputs give equal orders.
    """
    h, V, F = features.shape
    tree, order = _Tree(V, features.device), features.new_empty((h, V), dtype=torch.int32)
    # the features again in the order of the nodes, and as much of sorting
    step = max(1, WORKSPACE_BYTES // (V * F * 8))
    for start in range(0, h, step):
        order[start : start + step] = tree.order(features[start : start + step])
    return order


class _Tree:
    """Halves nodes of blocks until each is one block; where they are cut is known beforehand.

    Args:
        tokens: of the sequence, V. Nodes begin at multiples of 64; only the last block is short.
    """

    def __init__(self, tokens: int, device):
        self.tokens, self.device = tokens, device
        self.levels = []
        cuts = [0, -(-tokens // BLOCK)]
        while max(b - a for a, b in pairwise(cuts)) > 1:
            self.levels.append(self._level(cuts))
            middles = [(a + b + 1) // 2 for a, b in pairwise(cuts)]
            cuts = sorted({*cuts, *middles})

    def _level(self, cuts):
        """Places of every node's tokens, [nodes, most], which are real, and [nodes, S] samples."""
        edges = (torch.tensor(cuts, device=self.device) * BLOCK).clamp(max=self.tokens)
        starts, sizes = edges[:-1, None], edges.diff()[:, None]
        most = max(b - a for a, b in pairwise(cuts)) * BLOCK
        within = torch.arange(min(most, self.tokens), device=self.device)
        places = starts + within
        some = torch.arange(SAMPLED_PER_NODE, device=self.device)
        samples = starts + some * sizes // SAMPLED_PER_NODE
        return places.clamp(max=self.tokens - 1), within < sizes, samples

    def order(self, features) -> torch.Tensor:
        """[h, V] order of [h, V, F] features."""
        h = len(features)
        order = torch.arange(self.tokens, device=self.device).expand(h, -1)
        for places, real, samples in self.levels:
            some = _rows(features, order[:, samples.flatten()])
            direction = self._direction(some, len(samples))
            members = order[:, places.flatten()]
            nodes = _rows(features, members).unflatten(1, places.shape)
            along = (nodes @ direction)[..., 0].nan_to_num_(0.0, 0.0, 0.0)
            along.masked_fill_(~real, float("inf"))
            turn = along.argsort(dim=-1, stable=True)
            members = members.unflatten(1, places.shape).gather(-1, turn)
            # the places that only pad are last in their node
            order = members.flatten(1)[:, real.flatten().nonzero()[:, 0]]
        return order

    def _direction(self, some, nodes: int):
        """[h, nodes, F, 1], where the samples of each node differ most."""
        some = some.unflatten(1, (nodes, -1))
        some = some - some.mean(2, keepdim=True)
        spread = some.mT @ some
        direction = spread.diagonal(dim1=-2, dim2=-1).sqrt()[..., None]
        for _ in range(POWER_STEPS):
            direction = spread @ direction
            direction = direction / direction.norm(dim=-2, keepdim=True).clamp(min=1e-20)
        return direction


def _rows(features, numbers):
    """[h, n, F]: rows `numbers` [h, n] of [h, V, F]."""
    return features.gather(1, numbers[..., None].expand(-1, -1, features.shape[-1]))
