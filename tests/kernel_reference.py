"""Ground truth and inputs for the kernel tests: dense, obvious, in the dtype of its arguments."""

import torch
import torch.nn.functional as F


def expand(keep, block_q, block_k, Lq, Lk):
    """[.., Nq, Nk] block pairs as [.., Lq, Lk] token pairs."""
    keep = keep.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)
    return keep[..., :Lq, :Lk]


def scores(q, k, scale, key_bias=None, keep=None):
    """[B, H, Lq, Lk] scaled, biased, -inf where `keep` is False."""
    s = q @ k.transpose(-1, -2) * scale
    if key_bias is not None:
        s = s + key_bias[:, None, None, :].to(s.dtype)
    return s if keep is None else s.masked_fill(~keep, float("-inf"))


def attention(q, k, v, scale, key_bias=None, keep=None):
    """(out, lse) of the inputs in float64; rows without a key are zero and -inf."""
    s = scores(q.double(), k.double(), scale, key_bias, keep)
    lse = s.logsumexp(-1)
    weights = (s - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return weights @ v.double(), lse


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
    lse = lse.double()
    weights = (scores(q.double(), k.double(), scale, key_bias) - lse[..., None]).exp()
    weights = weights.masked_fill((lse == float("-inf"))[..., None], 0.0)
    B, H, Lq, Lk = weights.shape
    weights = F.pad(weights, (0, -Lk % block_k, 0, -Lq % block_q))
    Nq, Nk = weights.shape[-2] // block_q, weights.shape[-1] // block_k
    return weights.view(B, H, Nq, block_q, Nk, block_k).sum((3, 5))


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


def lists(keep):
    """Block pairs as (kv_indices, kv_num_blocks); slots past the count hold nonsense."""
    order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
    count = keep.sum(-1, dtype=torch.int32)
    past = torch.arange(keep.shape[-1], device=keep.device) >= count[..., None]
    return order.masked_fill(past, 2**30), count


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
