"""Tail error: what a pooled tail gets wrong about a block that is skipped.

With M the exact mass of a block pair, P the mass of its pooled key, vm the block's mean value, s the
deviation of its values and o the mean output of the query block, the score is

    sqrt(M (M - P)) s + (M - P) |vm - o|

Keys that get unequal weight (M > P) mix their values otherwise than the mean does: the first term.
The mass that the pooled key lacks is spread over everything else: the second. Masses and means are
all it takes, no weight of a single token.
"""

import torch

from ..permuted import BLOCK, block_sizes

WORKSPACE_BYTES = 256 << 20


def tail_error(
    masses: torch.Tensor, pooled: torch.Tensor, v: torch.Tensor, v_mean: torch.Tensor
) -> torch.Tensor:
    """Score every block pair by the error that skipping it leaves; nothing is read back.

    Args:
        masses: [B, H, Nq, N] float32, of the softmax over all keys; a row sums to its queries.
        pooled: [B, H, Nq, N] float32, of the pooled keys; the result takes its place.
        v: [B, H, L, D]. v_mean: [B, H, N, D].

    Returns:
        [B, H, Nq, N] float32.
    """
    B, H, Nq, N = masses.shape
    # a few heads at a time: three maps of block pairs at once, and the values in float32
    per_head = 12 * Nq * N + 8 * v.shape[2] * v.shape[3]
    step = max(1, WORKSPACE_BYTES // per_head)
    for b in range(B):
        for first in range(0, H, step):
            heads = slice(first, first + step)
            mass, means = masses[b, heads], v_mean[b, heads].float()
            missing = mass.sub(pooled[b, heads]).clamp_(min=0)
            rows = mass.sum(-1, keepdim=True).clamp_(min=1e-20)
            apart = torch.cdist(mass @ means / rows, means)
            score = torch.mul(mass, missing).sqrt_().mul_(deviation(v[b, heads], means)[:, None])
            pooled[b, heads] = score.addcmul_(missing, apart)
    return pooled


def deviation(v: torch.Tensor, v_mean: torch.Tensor) -> torch.Tensor:
    """Root of the variance of a block's values, summed over channels.

    Args:
        v: [h, L, D]. v_mean: [h, N, D] float32.

    Returns:
        [h, N] float32.
    """
    tokens = v.shape[1]
    whole = tokens // BLOCK
    centred = v[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)) - v_mean[:, :whole, None]
    squares = centred.square_().sum((-1, -2))
    if tokens % BLOCK:
        rest = (v[:, whole * BLOCK :] - v_mean[:, whole:]).square_().sum((-1, -2))
        squares = torch.cat([squares, rest[:, None]], 1)
    return (squares / block_sizes(tokens, v.device)).sqrt_()
