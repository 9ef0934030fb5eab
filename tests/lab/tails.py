"""What stands for the blocks that are left out of a sparse step.

pooled          one pseudo key per block: mean key, mean value, weight of its size
query weighted  pooled, with means weighted by the mass that mean queries give at the search
frozen          no pseudo keys: (1 - tau) * sparse + sum of the masses of the search over the rows
                of the block times today's mean values
"""

import torch
import torch.nn.functional as F
from scores import blocks_of, means, sizes


def fake_int8(x: torch.Tensor, rows: int = 64) -> torch.Tensor:
    """x rounded to 8-bit integers with one scale per `rows` tokens of a head."""
    blocks = blocks_of(x.float(), rows)
    scale = blocks.abs().amax((-1, -2), keepdim=True).clamp(min=1e-8) / 127
    rounded = (blocks / scale).round() * scale
    return rounded.flatten(-3, -2)[..., : x.shape[-2], :].to(x.dtype)


def fake_fp8(x: torch.Tensor) -> torch.Tensor:
    """x rounded to e4m3 with one scale per channel of a head."""
    scale = x.float().abs().amax(-2, keepdim=True).clamp(min=1e-8) / 448
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def smooth(k: torch.Tensor) -> torch.Tensor:
    """Keys less their mean over the sequence, which no softmax sees."""
    return k - k.mean(-2, keepdim=True, dtype=torch.float32).to(k.dtype)


class Tail:
    """The tail of one layer and one mask."""

    def __init__(self, rule, keep, length: int, found: dict):
        self.kind, self.block_q, self.block_k = rule.tail, rule.block_q, rule.block_k
        if self.kind == "frozen":
            share = found["mass"] / sizes(length, self.block_q, keep.device)[:, None]
            self.share = share * ~keep
            return
        bias = sizes(length, self.block_k, keep.device).log().expand(keep.shape)
        bias = bias.masked_fill(keep, float("-inf"))
        # matrix products are much faster with rows on 32 bytes
        self.bias = F.pad(bias, (0, -bias.shape[-1] % 8), value=float("-inf"))
        if self.kind == "query weighted":
            weight = blocks_of(found["query mass"][..., None], self.block_k)
            self.weight = weight / weight.sum(-2, keepdim=True).clamp(min=1e-20)

    def apply(self, q, k, v, out, lse, scale: float):
        """`out` and `lse` of the kept keys -> the output with the tail in it."""
        L = q.shape[2]
        if self.kind == "frozen":
            extra = self.share @ means(v, self.block_k)
            held = 1 - self.share.sum(-1, keepdim=True)
            rows = torch.cat([extra, held], -1).repeat_interleave(self.block_q, 2)[:, :, :L]
            return (rows[..., -1:] * out.float() + rows[..., :-1]).to(out.dtype)
        tail_out, tail_lse = self.attend(q, k, v, scale)
        both = torch.logaddexp(lse, tail_lse)
        share = (tail_lse - both).exp()[..., None]
        return torch.lerp(out.float(), tail_out, share).to(out.dtype)

    def means(self, x):
        if self.kind == "query weighted":
            return (blocks_of(x.float(), self.block_k) * self.weight).sum(-2)
        return means(x, self.block_k)

    def attend(self, q, k, v, scale: float):
        """Attention over the pseudo keys: [B, H, L, D] float32 and LSE [B, H, L]."""
        L = q.shape[2]
        k_mean, v_mean = self.means(k), self.means(v)
        # as a kernel would hold them
        more = (0, 0, 0, self.bias.shape[-1] - k_mean.shape[2])
        k_mean = F.pad(k_mean.to(k.dtype).float(), more)
        v_mean = F.pad(v_mean.to(v.dtype).float(), more)
        rows = F.pad(q.float(), (0, 0, 0, -L % self.block_q))
        logits = (rows @ k_mean.mT * scale).unflatten(2, (-1, self.block_q))
        logits = logits.add_(self.bias[:, :, :, None])
        lse = logits.logsumexp(-1, keepdim=True)
        # a row that keeps everything has no tail
        weights = logits.sub_(lse.clamp(min=-1e30)).exp_().flatten(2, 3)
        return (weights @ v_mean)[:, :, :L], lse.flatten(2, 4)[:, :, :L]
