"""Tokens in another order, and the mean key and value of every block of it: a pooled tail.

A key block that a query block skips enters the softmax as one pooled key: its mean key with its
mean value, weighted by its number of keys (after Sol-Attn, arXiv 2607.24027).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# tokens of a pooled block: the key block of the mask
BLOCK = 64
NOTHING = float("-inf")


@dataclass(frozen=True)
class Pooled:
    """One key and one value for every block of 64 tokens, or of more; N blocks, the last may be short.

    Args:
        k_mean, v_mean: [B, H, N, D].
        log_sizes: [B, N] float32, natural log of a block's number of keys; -inf where a key of the
            block has a bias: the mean of unequal keys means nothing.
    """

    k_mean: torch.Tensor
    v_mean: torch.Tensor
    log_sizes: torch.Tensor

    def of_blocks(self, tokens: int, block: int) -> "Pooled":
        """The same of a sequence of `tokens` in larger blocks, a multiple of 64 tokens each."""
        each = block // BLOCK
        if each == 1:
            return self
        pad = -self.log_sizes.shape[-1] % each
        sizes = block_sizes(tokens, self.log_sizes.device)
        sizes = F.pad(sizes, (0, pad)).unflatten(0, (-1, each))
        whole = sizes.sum(1, keepdim=True)
        shares = (sizes / whole)[:, None]

        def together(means):
            parts = F.pad(means.float(), (0, 0, 0, pad)).unflatten(2, (-1, each))
            return (shares @ parts)[..., 0, :].to(means.dtype)

        hidden = F.pad(self.log_sizes == NOTHING, (0, pad)).unflatten(1, (-1, each)).any(-1)
        log_sizes = whole[:, 0].log().expand(len(hidden), -1).masked_fill(hidden, NOTHING)
        return Pooled(together(self.k_mean), together(self.v_mean), log_sizes)


@dataclass(frozen=True)
class Permuted:
    """q, k and v in another order.

    Args:
        q: [B, H, L, D], or None where it was not wanted.
        k, v: [B, H, L, D].
        key_bias: [B, L] float32, the tokens' own, or None where there is none.
        pooled: of k and v.
    """

    q: torch.Tensor | None
    k: torch.Tensor
    v: torch.Tensor
    key_bias: torch.Tensor | None
    pooled: Pooled


def permuted(
    q, k, v, order: torch.Tensor, key_bias: torch.Tensor | None, *,
    permute: Callable, permute_and_pool: Callable,
) -> Permuted:  # fmt: skip
    """Permute q, k, v [B, H, L, D] and a `key_bias` [B, L] or None; q may be None too.

    Args:
        order: [B, H, L] int32, the token at every place. Where tokens of the video have a bias,
            the heads have one order.
        permute: permute(x, order) -> x in that order, [B, H, L, D].
        permute_and_pool: permute_and_pool(x, order) -> the same and the blocks' means [B, H, N, D].
    """
    if key_bias is not None:
        key_bias = key_bias.gather(1, order[:, 0].long())
    q = None if q is None else permute(q, order)
    k, k_mean = permute_and_pool(k, order)
    v, v_mean = permute_and_pool(v, order)
    sizes = log_sizes(len(k), order.shape[-1], key_bias, k.device)
    return Permuted(q, k, v, key_bias, Pooled(k_mean, v_mean, sizes))


def put_in_raster(out: torch.Tensor, arranged: torch.Tensor, order: torch.Tensor) -> None:
    """Put the tokens of `arranged` [B, H, L, ...] into `out`, where `order` [B, H, L] has them from."""
    for b, heads in enumerate(order):
        for h, places in enumerate(heads):
            out[b, h].index_copy_(0, places.long(), arranged[b, h])


def block_sizes(
    tokens: int, device: torch.device | None = None, block: int = BLOCK
) -> torch.Tensor:
    """Tokens of every block, [N] float32."""
    return (tokens - torch.arange(0, tokens, block, device=device)).clamp(max=block).float()


def row_scales(masses: torch.Tensor, tokens: int, block_q: int) -> torch.Tensor:
    """What makes each row of masses [B, H, Nq, Nk] sum to its query rows, [B, H, Nq, 1]; 1 if it is empty."""
    total = masses.sum(-1, keepdim=True)
    sizes = block_sizes(tokens, masses.device, block_q)[:, None]
    return (sizes / total).where(total > 0, 1.0)


def log_sizes(batch: int, tokens: int, key_bias: torch.Tensor | None, device) -> torch.Tensor:
    """[batch, N] `log_sizes` of `Pooled` for tokens with a `key_bias` [batch, tokens] or None."""
    sizes = block_sizes(tokens, device).log().expand(batch, -1)
    if key_bias is None:
        return sizes.contiguous()
    biased = F.pad(key_bias != 0, (0, -tokens % BLOCK)).unflatten(1, (-1, BLOCK)).any(-1)
    return sizes.masked_fill(biased, NOTHING)
