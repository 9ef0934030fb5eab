"""Tokens in another order, with the means of their blocks."""

import torch

from ..permuted import BLOCK, Permuted, block_sizes, permuted


def permute(q, k, v, order, key_bias=None) -> Permuted:
    """Put tokens in `order` and pool them.

    Args:
        q, k, v: [B, H, L, D]; q may be None.
        order: [B, H, L] int32, the token at every place.
        key_bias: [B, L] float32 or None.
    """
    return permuted(q, k, v, order, key_bias, permute=_permute, permute_and_pool=_permute_and_pool)


def _permute(x, order):
    out = x.new_empty(x.shape)
    for b, heads in enumerate(order):
        for h, places in enumerate(heads):
            torch.index_select(x[b, h], 0, places, out=out[b, h])
    return out


def _permute_and_pool(x, order):
    B, H, L, D = x.shape
    blocks = -(-L // BLOCK)
    # the last block whole, so that one sum serves all
    padded = x.new_zeros(B, H, blocks * BLOCK, D)
    means = x.new_empty(B, H, blocks, D)
    for b in range(B):
        for h in range(H):
            padded[b, h, :L] = x[b, h].index_select(0, order[b, h])
            sums = padded[b, h].view(blocks, BLOCK, D).sum(1, dtype=torch.float32)
            means[b, h] = sums / block_sizes(L, x.device)[:, None]
    return padded[:, :, :L], means
