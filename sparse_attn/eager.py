"""The backend in plain torch: for CPUs, Macs and machines without Triton. It really skips work.

Rows of a head that keep equally many blocks are gathered and attended as one batch, so that torch's
own attention does the arithmetic on exactly the kept keys.
"""

import math

import torch

from .block_mask import BlockMask

# on a CPU one pass over dense attention and masses took 0.88 s where two took 0.74 s
ONE_PASS_SEARCH = False
# bytes of one tile of gathered keys or of weights: small enough to stay in a CPU's cache
TILE_BYTES = 4 << 20
# exponents above this leave float32; reached only when an earlier LSE is useless
LARGEST_EXPONENT = 80.0


def why_not(q, k, v, block_q: int, block_k: int) -> str | None:
    """Say why plain torch cannot serve the call, or None when it can."""
    if not q.is_floating_point():
        return f"needs floating point tensors, got {q.dtype}"
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return f"needs one head_dim, got {q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]}"
    return None


def attend(q, k, v, scale: float, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention with its LSE.

    Args:
        q: [B, H, Lq, D]. k, v: [B, H, Lk, D]. bias: [B, 1, 1, Lk] float32 or None.

    Returns:
        out: [B, H, Lq, D]. lse: [B, H, Lq] float32.
    """
    if q.device.type == "cpu":
        mask = None if bias is None else bias.to(q.dtype).expand(-1, 1, q.shape[-2], -1)
        # the public function does not return the LSE
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scale
        )
    logits = (q @ k.transpose(-1, -2)).float() * scale
    logits = logits if bias is None else logits + bias
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().to(v.dtype) @ v, lse


def dense_attention(
    q, k, v, *, scale, key_bias=None, previous_lse=None, block_q=64, block_k=64
):  # fmt: skip
    """Dense attention; the masses take a pass of their own (`ONE_PASS_SEARCH`).

    Returns:
        out: [B, H, Lq, D]. lse: [B, H, Lq] float32. masses: None.
    """
    bias = None if key_bias is None else key_bias[:, None, None, :]
    if q.device.type == "cpu":
        return *attend(q, k, v, scale, bias), None
    out, lse = _empty_output(q, v), torch.empty(q.shape[:-1], device=q.device)
    per_row = q.shape[0] * q.shape[1] * k.shape[-2] * 4
    step = max(1, 16 * TILE_BYTES // per_row)
    for start in range(0, q.shape[-2], step):
        rows = slice(start, start + step)
        out[..., rows, :], lse[..., rows] = attend(q[..., rows, :], k, v, scale, bias)
    return out, lse, None


def block_masses(q, k, lse, *, block_q, block_k, scale, key_bias=None, renormalise=True):
    """Sum exp(S - lse) by blocks.

    Args:
        lse: [B, H, Lq] float32, of this step or an earlier one.
        renormalise: scale every row of blocks to sum to its number of query rows.

    Returns:
        [B, H, Nq, Nk] float32.
    """
    masses = _empty_masses(q, k, block_q, block_k)
    for b, h, _, blocks, weights in _weights(q, k, lse, scale, key_bias, block_q, block_k):
        masses[b, h, blocks] = _sum_blocks(weights, block_q, block_k)
    if renormalise:
        starts = torch.arange(masses.shape[2], device=q.device) * block_q
        count = (q.shape[-2] - starts).clamp(max=block_q)
        masses *= count[:, None] / masses.sum(-1, keepdim=True)
    return masses


def unpack_mask(bits: torch.Tensor, num_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn bits [B, H, Nq, ceil(Nk / 8)] into `kv_indices` and `kv_num_blocks`."""
    return BlockMask(bits, num_k, 0, 0).kv_lists()


def sparse_attention(
    q, k, v, kv_indices, kv_num_blocks, *, block_q, block_k, scale, key_bias=None
):  # fmt: skip
    """Attention over the listed key blocks, computed in float32.

    Args:
        q: [B, H, Lq, D]. k, v: [B, H, Lk, D].
        kv_indices: [B, H, Nq, K] int32, ascending, packed left. kv_num_blocks: [B, H, Nq] int32.

    Returns:
        out: [B, H, Lq, D], 0 where a row lists no block. lse: None, it would cost a fifth more time.
    """
    B, H, Lq, _ = q.shape
    out = _empty_output(q, v)
    tile = _Tile(q.device)
    for b in range(B):
        bias = None if key_bias is None else _blocks(key_bias[b, :, None], block_k)
        for h in range(H):
            q_blocks = _blocks(q[b, h].float() * scale, block_q)
            k_blocks, v_blocks = (_blocks(x[b, h].float(), block_k) for x in (k, v))
            head = torch.zeros_like(q_blocks)
            lists = kv_indices[b, h], kv_num_blocks[b, h]
            for rows, listed, length in _equal_rows(*lists, k.shape[-2], block_k):
                logits = tile.multiply(q_blocks[rows], tile.gather(k_blocks, listed, length).mT)
                if bias is not None:
                    logits += bias[listed].view(len(rows), 1, -1)[..., :length]
                torch.softmax(logits, -1, out=logits)
                # the values take the place of the keys, so that a tile stays in the cache
                head[rows] = logits @ tile.gather(v_blocks, listed, length)
            out[b, h] = head.flatten(0, 1)[:Lq]
    return out, None


class _Tile:
    """Memory that one tile after another uses: fresh pages cost a third of the time on a CPU."""

    def __init__(self, device):
        self.gathered, self.product = (torch.empty(0, device=device) for _ in range(2))

    def gather(self, blocks, listed, length):
        """Collect the listed blocks of each row, [rows, length, D]."""
        shape = (listed.numel(), *blocks.shape[1:])
        self.gathered = _room(self.gathered, math.prod(shape))
        out = self.gathered[: math.prod(shape)].view(shape)
        torch.index_select(blocks, 0, listed.flatten(), out=out)
        return out.view(len(listed), -1, blocks.shape[-1])[:, :length]

    def multiply(self, a, b):
        shape = (len(a), a.shape[1], b.shape[2])
        self.product = _room(self.product, math.prod(shape))
        return torch.bmm(a, b, out=self.product[: math.prod(shape)].view(shape))


def _room(flat, size):
    return flat if flat.numel() >= size else torch.empty(size, device=flat.device)


def _equal_rows(kv_indices, kv_num_blocks, Lk, block_k):
    """Yield (rows, their lists, valid keys per list) for a few rows that list equally many keys."""
    last_block, missing = (Lk - 1) // block_k, -Lk % block_k
    last = kv_indices.gather(-1, (kv_num_blocks.long() - 1).clamp(min=0)[:, None])[:, 0]
    lengths = kv_num_blocks * block_k - missing * (last == last_block).int()
    lengths = lengths.where(kv_num_blocks > 0, 0)
    for length in lengths.unique().tolist():
        if length == 0:
            continue
        blocks = -(-length // block_k)
        step = max(1, TILE_BYTES // (blocks * block_k * 512))
        for rows in (lengths == length).nonzero()[:, 0].split(step):
            yield rows, kv_indices[rows, :blocks].long(), length


def _blocks(x, block):
    """Cut [L, D] into zero-padded blocks [N, block, D]."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % block))
    return x.view(-1, block, x.shape[-1])


def _weights(q, k, lse, scale, key_bias, block_q, block_k):
    """Yield exp(S - lse) in tiles of whole query blocks of one head.

    Two more columns let the matrix product add the key bias and subtract the LSE, and keys padded
    to whole blocks weigh nothing.

    Yields:
        b, h, slice of query rows, slice of query blocks, weights [rows, Nk * block_k] float32.
    """
    B, H, Lq, D = q.shape
    Lk = k.shape[-2]
    padded = Lk + -Lk % block_k
    step = max(1, TILE_BYTES // (padded * 4 * block_q)) * block_q
    keys = torch.zeros(padded, D + 2, device=k.device)
    queries = torch.ones(Lq, D + 2, device=q.device)
    for b in range(B):
        keys[:, D] = -1e30
        keys[:Lk, D] = 0.0 if key_bias is None else key_bias[b].clamp(min=-1e30)
        keys[:, D + 1] = -1.0
        for h in range(H):
            keys[:Lk, :D] = k[b, h]
            queries[:, :D] = q[b, h].float() * scale
            queries[:, D + 1] = lse[b, h]
            for start in range(0, Lq, step):
                rows = slice(start, min(start + step, Lq))
                weights = queries[rows] @ keys.t()
                weights.clamp_(max=LARGEST_EXPONENT).exp_()
                yield b, h, rows, slice(start // block_q, -(-rows.stop // block_q)), weights


def _sum_blocks(weights, block_q, block_k):
    """Sum weights [rows, Nk * block_k] to [Nq, Nk]."""
    sums = weights.view(len(weights), -1, block_k).sum(-1)
    sums = torch.nn.functional.pad(sums, (0, 0, 0, -len(sums) % block_q))
    return sums.view(-1, block_q, sums.shape[-1]).sum(1)


def _empty_masses(q, k, block_q, block_k):
    shape = (*q.shape[:2], -(-q.shape[-2] // block_q), -(-k.shape[-2] // block_k))
    return torch.empty(shape, device=q.device, dtype=torch.float32)


def _empty_output(q, v):
    """[B, H, L, D] over memory in [B, L, H, D] order, so that [B, L, H * D] is a view."""
    B, H, L, _ = q.shape
    return torch.empty((B, L, H, v.shape[-1]), device=q.device, dtype=v.dtype).transpose(1, 2)
