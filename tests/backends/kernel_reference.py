"""Inputs for the kernel tests, and the ground truth in the form they need it."""

import torch
import torch.nn.functional as F

from sparse_attn.backends import reference


def attention(q, k, v, scale, key_bias=None, keep=None):
    """(out, lse) of the inputs in float64; `keep` is a [.., Lq, Lk] map of token pairs."""
    options = {"scale": scale, "key_bias": key_bias}
    q, k, v = q.double(), k.double(), v.double()
    if keep is None:
        return reference.dense_attention(q, k, v, **options)
    return reference.sparse_attention(q, k, v, keep, block_q=1, block_k=1, **options)


def torch_attention(q, k, v, scale, key_bias=None, keep=None):
    """What torch itself answers in the dtype of q."""
    mask = None
    if key_bias is not None or keep is not None:
        zero = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], device=q.device, dtype=q.dtype)
        bias = zero if key_bias is None else zero + key_bias[:, None, None, :].to(q.dtype)
        mask = bias if keep is None else bias.masked_fill(~keep, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).nan_to_num(0.0)


def block_masses(q, k, lse, scale, block_q, block_k, key_bias=None):
    """[B, H, Nq, Nk] sums of exp(score - lse) in float64."""
    blocks = {"block_q": block_q, "block_k": block_k}
    return reference.block_masses(
        q.double(), k.double(), lse.double(), scale=scale, key_bias=key_bias, **blocks
    )


def random_keep(B, H, Nq, Nk, density, device, seed=0):
    """Random block pairs; one row keeps none, one keeps all, when there are rows enough."""
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(B, H, Nq, Nk, generator=g) < density
    keep[:, :, 0, -1] = True
    if Nq > 1:
        keep[:, :, 1, :] = True
    if Nq > 2:
        keep[:, :, 2, :] = False
    return keep.to(device)


def random_orders(B, H, L, device):
    """[B, H, L] int32, a permutation of the tokens for every head."""
    g = torch.Generator().manual_seed(1)
    return torch.rand(B, H, L, generator=g).argsort(-1).int().to(device)


def lists(keep):
    """Block pairs as (kv_indices, kv_num_blocks); slots past the count hold nonsense."""
    order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
    count = keep.sum(-1, dtype=torch.int32)
    past = torch.arange(keep.shape[-1], device=keep.device) >= count[..., None]
    return order.masked_fill(past, 2**30), count


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
