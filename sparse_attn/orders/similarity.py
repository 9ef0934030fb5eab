"""Similar order: the video's tokens by what they ask and offer, so that a block holds its like.

Every head gets an order of its own. A block's pseudo key stands for keys that are nearly equal, and
its query rows want nearly the same blocks; so a pooled tail loses least. Semantic clusters are
Sparse VideoGen2's idea (arXiv 2505.18875); here they all have 64 tokens: the tokens are halved at
the median along the direction in which they differ most, then each half again, down to a block.

With the kernels it takes 11.9 ms for 24 heads x 118,800 tokens x 128, of which a GPU works 7.9
(H200, Triton 3.6, 2026-11-24).
"""

from itertools import pairwise

import torch

from ..backends import triton as kernels
from ..backends.permuted import BLOCK
from ..token_layout import TokenLayout

# leading directions of the queries, and as many of the keys
DIRECTIONS = 16
# weights beside the keys': a token's query, and its place, which stays from step to step
QUERY, PLACE = 0.5, 0.3
# columns of a place, the last ones 0: rows of features begin on 32 bytes
PLACE_COLUMNS = 8
SAMPLED_TOKENS = 4096
SAMPLED_PER_NODE = 128
POWER_STEPS = 8
WORKSPACE_BYTES = 1 << 29


def similar_order(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Order the video of every head by similarity, and extra tokens behind it.

    Args:
        q, k: [B, H, L, D].

    Returns:
        [B, H, L] int32, the token at every place. Equal inputs give equal orders.
    """
    B, H, L, _ = q.shape
    first, video = layout.before, layout.video
    before = torch.arange(first, device=q.device)
    after = torch.arange(first + video, L, device=q.device)
    places = _places(layout, q.device)
    order = torch.empty(B, H, L, dtype=torch.int32, device=q.device)
    order[..., video:] = torch.cat([before, after])
    # float32; without a kernel the same again in the order of the nodes, and as much of sorting
    each = 12 if kernels.kernel_for("pca_tree", places[None]) is None else 4
    heads = max(1, WORKSPACE_BYTES // (video * (2 * DIRECTIONS + PLACE_COLUMNS) * each))
    for b in range(B):
        for i in range(0, H, heads):
            one = slice(b, b + 1), slice(i, i + heads), slice(first, first + video)
            order[one[:2]][..., :video] = _halve(_features(q[one], k[one], places)[0]) + first
    return order


def _halve(features) -> torch.Tensor:
    """[h, V] order of [h, V, F] features, by the kernel where it serves."""
    kernel = kernels.kernel_for("pca_tree", features)
    if kernel is not None:
        return kernel.halve(features)
    return _Halving(features.shape[1], features.device).order(features)


def _features(q, k, places) -> torch.Tensor:
    """[B, h, V, F] float32 whose distances tell how differently tokens ask and are asked.

    Two keys differ as much as their scores do for the queries there are, and the other way round:
    with C C^T the second moment of the other side, |(k - k') C|^2 is the mean square difference.
    """
    stride = max(1, q.shape[2] // SAMPLED_TOKENS)
    # [2, B, h, S, D]: of queries and of keys
    some = torch.stack([x[:, :, ::stride].float() for x in (q, k)])
    root = _root((some.mT @ some / some.shape[-2]).flip(0))
    centres = some.mean(-2, keepdim=True)
    some = some - centres
    spread = root.mT @ (some.mT @ some / some.shape[-2]) @ root
    basis = _leading(spread, min(DIRECTIONS, q.shape[-1]))
    size = (basis.mT @ spread @ basis).diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
    directions = root @ basis / size.clamp(min=1e-20)[..., None, None]
    directions[0] *= QUERY
    kernel = kernels.kernel_for("features", q, k, directions)
    if kernel is not None:
        return kernel.features(q, k, centres[..., 0, :], directions, places)
    shape = *q.shape[:3], 2 * directions.shape[-1] + places.shape[-1]
    features = torch.empty(shape, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            parts = [
                (x[b, h].float() - c[b, h]) @ w[b, h]
                for x, c, w in zip((q, k), centres, directions, strict=True)
            ]
            torch.cat([*parts, places], -1, out=features[b, h])
    # a NaN belongs to the search, which answers for it; here it must only keep its place
    return features.nan_to_num_(0.0, 0.0, 0.0)


def _places(layout, device) -> torch.Tensor:
    """[V, PLACE_COLUMNS] float32: the token's frame, row and column, of mean square `PLACE`^2."""
    sizes = layout.frames, layout.height, layout.width
    axes = torch.meshgrid(*(torch.arange(n, device=device).float() for n in sizes), indexing="ij")
    places = torch.zeros(layout.video, PLACE_COLUMNS, device=device)
    torch.stack([axis.flatten() for axis in axes], -1, out=places[:, :3])
    places[:, :3] -= places[:, :3].mean(0)
    return places * (PLACE / places.square().sum(-1).mean().sqrt().clamp(min=1e-20))


def _root(moment) -> torch.Tensor:
    """C with C C^T the [..., D, D] moment, but for what keeps it regular; nothing waits for a GPU."""
    D = moment.shape[-1]
    some = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * 1e-5 + 1e-20
    eye = torch.eye(D, device=moment.device)
    return torch.linalg.cholesky_ex(moment + some * eye).L


def _leading(spread, number: int) -> torch.Tensor:
    """[..., D, number] orthonormal columns near the leading eigenvectors: subspace iteration."""
    D = spread.shape[-1]
    generator = torch.Generator().manual_seed(0)
    on_gpu = spread.device.type == "cuda"
    # from pinned memory nothing waits for the copy
    basis = torch.randn(D, number, generator=generator, pin_memory=on_gpu)
    basis = basis.to(spread.device, non_blocking=True).expand(*spread.shape[:-1], number)
    for _ in range(POWER_STEPS):
        basis = spread @ basis
        basis = basis / basis.norm(dim=-2, keepdim=True).clamp(min=1e-20)
        triangle = _root(basis.mT @ basis)
        basis = torch.linalg.solve_triangular(triangle, basis.mT, upper=False).mT
    return basis


class _Halving:
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
