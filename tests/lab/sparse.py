"""The sparse part of a step: the pack's kernel on a GPU, plain torch elsewhere."""

import torch

from sparse_attn.backends.choice import choose
from sparse_attn.block_mask import BlockMask

KERNEL_BLOCKS = (64, 128)
CHUNK_BYTES = 3 << 29


class SparseAttention:
    """Attention over kept blocks: call with q, k, v; returns out and lse."""

    def __init__(self, keep, block_q: int, block_k: int, device):
        self.keep, self.block_q, self.block_k = keep, block_q, block_k
        on_kernel = block_q in KERNEL_BLOCKS and block_k in KERNEL_BLOCKS
        self.mask = None
        if on_kernel and device.type == "cuda":
            self.mask = BlockMask.from_dense(keep, block_q=block_q, block_k=block_k)

    def __call__(self, q, k, v, scale: float):
        if self.mask is None:
            return masked_attention(q, k, v, self.keep, self.block_q, self.block_k, scale)
        backend, _ = choose(q, k, v, self.block_q, self.block_k)
        return backend.attention(q, k, v, scale=scale, mask=self.mask)


def masked_attention(q, k, v, keep, block_q: int, block_k: int, scale: float):
    """The same by a mask over tokens, slow and obviously right."""
    B, H, L, _ = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(B, H, L, device=q.device)
    rows = max(1, CHUNK_BYTES // (12 * L * H) // block_q) * block_q
    for b in range(B):
        keys, values = k[b].float(), v[b].float()
        for r in range(0, L, rows):
            logits = q[b, :, r : r + rows].float() @ keys.mT * scale
            kept = keep[b, :, r // block_q : (r + rows) // block_q]
            kept = kept.repeat_interleave(block_q, 1).repeat_interleave(block_k, 2)
            logits.masked_fill_(~kept[:, : logits.shape[1], :L], float("-inf"))
            total = logits.logsumexp(-1, keepdim=True)
            weights = logits.sub_(total.clamp(min=-1e30)).exp_()
            out[b, :, r : r + rows] = (weights @ values).to(q.dtype)
            lse[b, :, r : r + rows] = total[..., 0]
    return out, lse


def masses_with(q, k, lse, block_q: int, block_k: int, scale: float):
    """Block masses for given softmax denominators, every row scaled to its number of queries."""
    backend, _ = choose(q, k, k, block_q, block_k)
    return backend.block_masses(q, k, lse, block_q=block_q, block_k=block_k, scale=scale)
