"""Inputs of the tests of operations, and the ground truth in float64."""

import torch
import torch.nn.functional as F

from sparse_attn.backends import reference
from sparse_attn.backends.permuted import Pooled
from sparse_attn.backends.reference import expand_blocks
from sparse_attn.block_mask import BlockMask


def doubled(pooled):
    """Pooled keys in float64, or None."""
    if pooled is None:
        return None
    return Pooled(*(x.double() for x in (pooled.k_mean, pooled.v_mean, pooled.log_sizes)))


def exact_attention(q, k, v, scale, key_bias=None, mask=None, pooled=None, order=None):
    """(out, lse) of the inputs in float64."""
    return reference.attention(
        q.double(), k.double(), v.double(), scale=scale, key_bias=key_bias, mask=mask,
        pooled=doubled(pooled), order=order,
    )  # fmt: skip


def torch_attention(q, k, v, scale, key_bias=None, mask=None, pooled=None, order=None):
    """What torch itself answers in the dtype of q."""
    B, _, Lq, _ = q.shape
    bias = torch.zeros(B, 1, Lq, k.shape[2], device=q.device, dtype=q.dtype)
    if key_bias is not None:
        bias = bias + key_bias[:, None, None, :].to(q.dtype)
    if mask is not None:
        keep = mask.to_dense()
        tokens = expand_blocks(keep, mask.block_q, mask.block_k, Lq, k.shape[2])
        bias = bias.masked_fill(~tokens, float("-inf"))
        if pooled is not None:
            sizes = pooled.log_sizes[:, None, None].to(q.dtype)
            listed = expand_blocks(keep, mask.block_q, 1, Lq, mask.num_k)
            bias = torch.cat([bias, (sizes + 0 * listed).masked_fill(listed, float("-inf"))], -1)
            k, v = torch.cat([k, pooled.k_mean], 2), torch.cat([v, pooled.v_mean], 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).nan_to_num(0.0)
    if order is not None:
        out = torch.empty_like(out).scatter_(2, order.long()[..., None].expand_as(out), out)
    return out


def exact_masses(q, k, lse, scale, block_q, block_k, key_bias=None, renormalise=False):
    """[B, H, Nq, Nk] sums of exp(score - lse) in float64."""
    return reference.block_masses(
        q.double(), k.double(), lse.double(), block_q=block_q, block_k=block_k, scale=scale,
        key_bias=key_bias, renormalise=renormalise,
    )  # fmt: skip


def blocks(length, block):
    return -(-length // block)


def random_mask(B, H, Lq, Lk, block_q, block_k, device, density=0.4, seed=0):
    """Random block pairs; one row keeps none, one keeps all, when there are rows enough."""
    g = torch.Generator().manual_seed(seed)
    Nq = blocks(Lq, block_q)
    keep = torch.rand(B, H, Nq, blocks(Lk, block_k), generator=g) < density
    keep[:, :, 0, -1] = True
    if Nq > 1:
        keep[:, :, 1, :] = True
    if Nq > 2:
        keep[:, :, 2, :] = False
    return mask_of(keep, device, block_q, block_k)


def mask_of(keep, device, block_q=64, block_k=64):
    """The mask of a [B, H, Nq, Nk] map, given as a tensor or as lists."""
    keep = torch.as_tensor(keep, dtype=torch.bool).to(device)
    return BlockMask.from_dense(keep, block_q=block_q, block_k=block_k)


def random_orders(B, H, L, device):
    """[B, H, L] int32, a permutation of the tokens for every head."""
    g = torch.Generator().manual_seed(1)
    return torch.rand(B, H, L, generator=g).argsort(-1).int().to(device)


def few_biased_keys(B, Lk, device):
    """[B, Lk] bias that is zero for most tiles of keys; B and Lk at least 2 and 450."""
    bias = torch.zeros(B, Lk, device=device)
    bias[0, -30:] = float("-inf")
    bias[0, 131] = -1e4
    bias[1, 0] = -3.0
    bias[1, 320:450] = 2.5
    return bias


def make(B, H, Lq, Lk, D, dtype, device, layout="BHLD", seed=0):
    """Random q, k, v; `layout` says how they lie in memory."""
    g = torch.Generator(device=device).manual_seed(seed)

    def one(L):
        shape = (B, L, H, D) if layout == "BLHD" else (B, H, L, D)
        x = torch.randn(shape, device=device, dtype=torch.float32, generator=g).to(dtype)
        return x.transpose(1, 2) if layout == "BLHD" else x

    if layout == "packed":
        # q, k and v side by side in one tensor, as a fused projection leaves them
        x = torch.randn(B, Lq, 3, H, D, device=device, generator=g).to(dtype)
        return x.permute(2, 0, 3, 1, 4).unbind(0)
    return one(Lq), one(Lk), one(Lk)


def stored_values(v8, tile_scale, D):
    """[B, H, tokens, D] values in float64 as `quantise` stores them, without their channels' scales."""
    # place 16 g + 4 t + 2 j + b holds key 16 g + 8 j + 2 t + b
    tiles = v8.double().unflatten(2, (-1, D)).unflatten(-1, (4, 4, 2, 2)).transpose(-2, -3)
    tiles = tiles.flatten(-4).transpose(-1, -2)
    if tile_scale is not None:
        # 64 channels share a scale
        tiles = tiles * tile_scale.repeat_interleave(64, -1)[..., None, :].double()
    return tiles.flatten(2, 3)


def a_row_without_keys(device):
    """q, k, v, bias and mask of one head, whose first block of rows keeps only keys of bias -inf."""
    bias = torch.zeros(1, 192, device=device)
    bias[:, 64:128] = float("-inf")
    mask = mask_of([[[[False, True, False], [True, True, False]]]], device)
    return *make(1, 1, 128, 192, 64, torch.bfloat16, device), bias, mask
