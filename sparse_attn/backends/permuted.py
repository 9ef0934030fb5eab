"""Arranged tokens with a pooled tail: behind the keys and values stands the mean of every block.

A key block that a query block skips enters the softmax as one pseudo key: its mean key with its
mean value, weighted by its number of keys (after Sol-Attn, arXiv 2607.24027).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..orders.position import rods
from ..token_layout import TokenLayout

# tokens per mean: the key block of the mask
BLOCK = 64
NOTHING = float("-inf")


@dataclass(frozen=True)
class Arranged:
    """q, k and v in another order. Lp is L in whole blocks, N their number, Np that in blocks.

    Args:
        tokens: L.
        q: [B, H, L, D], or None where it was not wanted.
        k, v: [B, H, Lp + Np, D], tokens, zeros up to Lp, N means, zeros up to Lp + Np.
        key_bias: [B, Lp + Np] float32: the caller's or 0, the log of a block's number of keys for
            its mean, -inf for what only pads.
        log_sizes: [B, N] float32, the part of `key_bias` that belongs to the means.
        token_bias: [B, L] float32, the part of the caller's tokens, or None where there is none.
    """

    tokens: int
    q: torch.Tensor | None
    k: torch.Tensor
    v: torch.Tensor
    key_bias: torch.Tensor
    log_sizes: torch.Tensor
    token_bias: torch.Tensor | None = None

    @property
    def blocks(self) -> int:
        """Blocks of tokens."""
        return -(-self.tokens // BLOCK)

    @property
    def pseudo_blocks(self) -> int:
        """Blocks of means."""
        return pseudo_blocks(self.blocks)

    @property
    def token_k(self) -> torch.Tensor:
        return self.k[:, :, : self.tokens]

    @property
    def token_v(self) -> torch.Tensor:
        return self.v[:, :, : self.tokens]

    @property
    def k_mean(self) -> torch.Tensor:
        """[B, H, N, D]."""
        return self._means(self.k)

    @property
    def v_mean(self) -> torch.Tensor:
        """[B, H, N, D]."""
        return self._means(self.v)

    def _means(self, x):
        return x[:, :, self.blocks * BLOCK :][:, :, : self.blocks]


def arranged(q, k, v, order: torch.Tensor, key_bias=None, *, arrange) -> Arranged:
    """Arrange q, k, v [B, H, L, D] and a `key_bias` [B, L] or None; q may be None too.

    Args:
        order: [B, H, L] int32, the token at every place. Where tokens of the video have a bias,
            the heads have one order.
        arrange: arrange(x, order, means) -> [B, H, L, D], or [B, H, Lp + Np, D] with means.
    """
    B, tokens = len(k), order.shape[-1]
    bias, log_sizes = plain_bias(B, tokens, k.device)
    token_bias = None
    if key_bias is not None:
        token_bias = key_bias.gather(1, order[:, 0].long())
        bias, log_sizes = with_bias(bias, log_sizes, token_bias)
    return Arranged(
        tokens,
        None if q is None else arrange(q, order, means=False),
        arrange(k, order, means=True),
        arrange(v, order, means=True),
        bias,
        log_sizes,
        token_bias,
    )


def prepare(layout: TokenLayout, batch: int, device: torch.device) -> None:
    """Make what the calls of a sequence share, a megabyte."""
    plain_bias(batch, layout.tokens, device)
    rods(layout, device)


def pseudo_blocks(blocks: int) -> int:
    """Blocks that the means of `blocks` blocks fill."""
    return -(-blocks // BLOCK)


def block_sizes(tokens: int, device=None) -> torch.Tensor:
    """Tokens of every block, [N] float32."""
    return (tokens - torch.arange(0, tokens, BLOCK, device=device)).clamp(max=BLOCK).float()


@lru_cache(maxsize=8)
def plain_bias(batch: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`key_bias` and `log_sizes` of `Arranged` where the caller has no bias; do not write to it."""
    log_sizes = block_sizes(tokens).log()
    pads = torch.full((-tokens % BLOCK,), NOTHING)
    more = torch.full((-len(log_sizes) % BLOCK,), NOTHING)
    bias = torch.cat([torch.zeros(tokens), pads, log_sizes, more])
    return tuple(x.repeat(batch, 1).to(device) for x in (bias, log_sizes))


def with_bias(bias, log_sizes, token_bias) -> tuple[torch.Tensor, torch.Tensor]:
    """Enter the caller's bias. A block of unequal keys has no stand-in: its mean means nothing."""
    tokens, blocks = token_bias.shape[1], log_sizes.shape[1]
    biased = F.pad(token_bias != 0, (0, -tokens % BLOCK)).unflatten(1, (-1, BLOCK)).any(-1)
    log_sizes = log_sizes.masked_fill(biased, NOTHING)
    bias = bias.clone()
    bias[:, :tokens] = token_bias
    bias[:, blocks * BLOCK :][:, :blocks] = log_sizes
    return bias, log_sizes
