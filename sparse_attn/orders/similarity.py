"""Similar order: the video's tokens by what they ask and offer, so that a block holds its like.

Every head gets an order of its own. A block's pooled key stands for keys that are nearly equal, and
its query rows want nearly the same blocks; so a pooled tail loses least. Semantic clusters are
Sparse VideoGen2's idea (arXiv 2505.18875); here they all have 64 tokens: the tokens are split at the
median along their first principal component, then each half again, down to a block.

With the kernels it takes 11.9 ms for 24 heads x 118,800 tokens x 128, of which a GPU works 7.9
(H200, Triton 3.6, 2026-11-24).
"""

import torch

from ..token_layout import TokenLayout

# leading directions of the queries, and as many of the keys
DIRECTIONS = 16
# weights beside the keys': a token's query, and its place, which stays from step to step
QUERY, PLACE = 0.5, 0.3
# columns of a place, the last ones 0: rows of features begin on 32 bytes
PLACE_COLUMNS = 8
SAMPLED_TOKENS = 4096
POWER_STEPS = 8
WORKSPACE_BYTES = 1 << 29


def similar_order(backend, q: torch.Tensor, k: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Order the video of every head by similarity, and extra tokens behind it.

    Args:
        backend: a `backends.choice.Backend`.
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
    # float32
    heads = max(1, WORKSPACE_BYTES // (video * (2 * DIRECTIONS + PLACE_COLUMNS) * 4))
    for b in range(B):
        for i in range(0, H, heads):
            one = slice(b, b + 1), slice(i, i + heads), slice(first, first + video)
            features = _features(backend, q[one], k[one], places)
            order[one[:2]][..., :video] = backend.pca_tree(features[0]) + first
    return order


def _features(backend, q, k, places) -> torch.Tensor:
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
    return backend.features(q, k, centres[..., 0, :], directions, places)


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
