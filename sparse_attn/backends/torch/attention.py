"""Attention in plain torch: for CPUs, Macs and machines without Triton. It really skips work.

The keys and values that a row of blocks lists are gathered and attended by ordinary products. On a CPU
every thread computes rows of its own; elsewhere rows that list equally many keys make a batch.
"""

import threading
from dataclasses import dataclass

import torch

from ...block_mask import BlockMask
from ..permuted import NOTHING, Pooled, put_in_raster
from .threads import each_alone
from .unpack_mask import unpack_mask

# bytes of a batch of rows on other devices than a CPU: enough work for a GPU, little of its memory
BATCH_BYTES = 256 << 20


def why_not(q, k, v, block_q: int, block_k: int) -> str | None:
    """Say why plain torch cannot serve the call, or None when it can."""
    if not q.is_floating_point():
        return f"needs floating point tensors, got {q.dtype}"
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return f"needs one head_dim, got {q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]}"
    return None


def why_not_quantised(q, k, v, block_q: int, block_k: int) -> str:
    """Say why nothing here runs in eight bits."""
    return "plain torch computes in float32"


def attention(q, k, v, *, scale, key_bias=None, mask=None, pooled=None, order=None):
    """Attention over all keys, or over the blocks that a mask keeps and the means of the others.

    Args:
        q: [B, H, Lq, D]. k, v: [B, H, Lk, D].
        scale: factor of the scores.
        key_bias: [B, Lk] float32 added to the scaled scores, or None.
        mask: a `BlockMask` of q's and k's blocks; None is dense.
        pooled: `Pooled` of k and v, one key for each block that a row of the mask does not keep, or None.
        order: [B, H, Lq] int32, the token at every place of q; `out` is in the order of the tokens.

    Returns:
        out: [B, H, Lq, D], 0 where a row sees no key. lse: [B, H, Lq] float32 in the order of q, -inf
        there; None with a mask, where it would cost a fifth more time.
    """
    if mask is None:
        out, lse = dense_attention(q, k, v, scale=scale, key_bias=key_bias)
        if order is not None:
            arranged, out = out, torch.empty_like(out)
            put_in_raster(out, arranged, order)
        return out, lse
    B, H, Lq, _ = q.shape
    out = _empty_output(q, v)
    attend = _attend_rows if q.device.type == "cpu" else _attend_batches
    with each_alone(q.device) as for_each:
        for b in range(B):
            bias = None if key_bias is None else key_bias[b]
            for h in range(H):
                tail = None if pooled is None else _of_head(pooled, b, h)
                listed = mask.with_bits(mask.bits[b, h])
                rows = _rows_of(q[b, h], k[b, h], v[b, h], listed, scale, bias, tail)
                head = torch.zeros_like(rows.q)
                attend(head, rows, for_each)
                head = head.flatten(0, 1)[:Lq]
                if order is None:
                    out[b, h] = head
                else:
                    out[b, h].index_copy_(0, order[b, h].long(), head.to(out.dtype))
    return out, None


def dense_attention(q, k, v, *, scale, key_bias=None):
    """Attention over all keys; arguments and results as of `attention`."""
    if q.device.type == "cpu":
        return _dense_on_cpu(q, k, v, scale, key_bias)
    return _dense_by_products(q, k, v, scale, key_bias)


def _dense_on_cpu(q, k, v, scale, key_bias):
    # the operator takes the numbers of a row to lie side by side, and does not look
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    bias = mask = None
    if key_bias is not None:
        bias = key_bias.to(q.dtype).contiguous()
        mask = bias[:, None, None].expand(-1, 1, q.shape[-2], -1)
    # the public function does not return the LSE
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=mask, scale=scale
    )
    # of rows without a key the operator says 0
    return out, lse if bias is None else lse.masked_fill(_hidden(bias)[:, None], NOTHING)


def _hidden(added):
    """Whether what is added to the logits of rows [..., K] hides all their keys, [..., 1] bool."""
    return (added == NOTHING).all(-1, keepdim=True)


def _dense_by_products(q, k, v, scale, key_bias):
    """In float32: products of half precision would round a score by more than it weighs."""
    B, H, Lq, _ = q.shape
    out, lse = _empty_output(q, v), torch.empty(q.shape[:-1], device=q.device)
    step = max(1, BATCH_BYTES // (k.shape[-2] * 4))
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h].float(), v[b, h].float()
            for start in range(0, Lq, step):
                rows = slice(start, start + step)
                logits = (q[b, h, rows].float() @ keys.mT).mul_(scale)
                if key_bias is not None:
                    logits += key_bias[b]
                lse[b, h, rows] = logits.logsumexp(-1)
                found = logits.softmax(-1) @ values
                if key_bias is not None:
                    found.masked_fill_(_hidden(key_bias[b]), 0.0)
                out[b, h, rows] = found
    return out, lse


@dataclass(frozen=True)
class _Rows:
    """The rows of blocks of one head, all of it in float32; K gathered blocks of a row at most.

    Args:
        q: [Nq, block_q, D], scaled. k, v: [N, block_k, D], pooled blocks behind those of tokens.
        bias: [N, block_k] added to the logits, or None.
        hidden: [Nq, P] added to the logits of all pooled keys, the last ones of a row, or None.
        gathered: [Nq, K] int32, blocks of k and v that a row reads.
        counts: [Nq] int32, how many. lengths: [Nq] int32, how many keys these are.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    hidden: torch.Tensor | None
    gathered: torch.Tensor
    counts: torch.Tensor
    lengths: torch.Tensor

    def added(self, some, gathered, length: int):
        """[n, length], what is added to the logits of rows that gather these blocks [n, K]."""
        assert self.bias is not None
        added = self.bias[gathered].view(len(gathered), -1)[:, :length]
        if self.hidden is not None:
            added[:, -self.hidden.shape[1] :] += self.hidden[some]
        return added


def _of_head(pooled: Pooled, b: int, h: int) -> Pooled:
    return Pooled(pooled.k_mean[b, h], pooled.v_mean[b, h], pooled.log_sizes[b])


def _rows_of(q, k, v, mask: BlockMask, scale, bias, pooled: Pooled | None) -> _Rows:
    """Cut one head's q, k, v [L, D] into blocks, and list what each row of `mask` gathers."""
    tokens, block_k = k.shape[0], mask.block_k
    q = _blocks(q.float() * scale, mask.block_q)
    k, v = _blocks(k.float(), block_k), _blocks(v.float(), block_k)
    if pooled is None:
        gathered, counts = unpack_mask(mask)
        lengths = _lengths(gathered, counts, tokens, block_k)
        bias = None if bias is None else _blocks(bias[:, None], block_k)[..., 0]
        return _Rows(q, k, v, bias, None, gathered, counts, lengths)
    k = torch.cat([k, _blocks(pooled.k_mean.float(), block_k)])
    v = torch.cat([v, _blocks(pooled.v_mean.float(), block_k)])
    added = torch.full(k.shape[:2], NOTHING, device=k.device)
    added.view(-1)[:tokens] = 0.0 if bias is None else bias
    first = mask.num_k * block_k
    added.view(-1)[first : first + mask.num_k] = pooled.log_sizes
    num_pooled_blocks = len(k) - mask.num_k
    hidden = torch.zeros(len(q), num_pooled_blocks * block_k, device=k.device)
    hidden[:, : mask.num_k].masked_fill_(mask.to_dense(), NOTHING)
    gathered, counts = unpack_mask(mask, num_pooled_blocks)
    return _Rows(q, k, v, added, hidden, gathered, counts, counts * block_k)


def _attend_rows(head, rows: _Rows, for_each):
    """Attend one row of blocks at a time: its keys and weights stay in the cache of a core."""
    room = _Room()
    # made once: each operation, a view too, has a thread wait for the interpreter's lock
    q_rows, out_rows = rows.q.unbind(), head.unbind()

    def attend_row(row):
        i, gathered, length = row
        blocks, keys, logits = room.for_row(len(gathered), length, rows.q, rows.k)
        torch.index_select(rows.k, 0, gathered, out=blocks)
        torch.mm(q_rows[i], keys.t(), out=logits)
        if rows.bias is not None:
            added = rows.added(i, gathered[None], length)
            if _hidden(added):
                return
            logits += added
        torch.softmax(logits, -1, out=logits)
        # the values take the place of the keys
        torch.index_select(rows.v, 0, gathered, out=blocks)
        torch.mm(logits, keys, out=out_rows[i])

    listed = zip(rows.gathered.unbind(), rows.counts.tolist(), rows.lengths.tolist(), strict=True)
    for_each(attend_row, [(i, x[:n], length) for i, (x, n, length) in enumerate(listed) if n])


class _Room(threading.local):
    """Memory that a thread's rows use one after another: fresh pages cost a third of the time."""

    def __init__(self):
        self.gathered = self.weights = torch.empty(0)
        self.views = {}

    def for_row(self, count, length, q_blocks, k_blocks):
        """Room for `count` blocks, the same as [length, D], and for weights [block_q, length]."""
        (_, block_q, D), block_k = q_blocks.shape, k_blocks.shape[1]
        if count * block_k * D > self.gathered.numel():
            self.gathered = torch.empty(count * block_k * D)
            self.weights = torch.empty(block_q * count * block_k)
            self.views.clear()
        if (count, length) not in self.views:
            blocks = self.gathered[: count * block_k * D].view(count, block_k, D)
            weights = self.weights[: block_q * length].view(block_q, length)
            self.views[count, length] = blocks, blocks.view(-1, D)[:length], weights
        return self.views[count, length]


def _attend_batches(head, rows: _Rows, _):
    """Attend many rows of blocks at once, as many as read equally many keys and fit."""
    block_k, D = rows.k.shape[1:]
    for length in rows.lengths.unique().tolist():
        if length == 0:
            continue
        blocks = -(-length // block_k)
        step = max(1, BATCH_BYTES // (blocks * block_k * 4 * (2 * D + rows.q.shape[1])))
        for some in (rows.lengths == length).nonzero()[:, 0].split(step):
            gathered = rows.gathered[some, :blocks].long()
            keys, values = (x[gathered].flatten(1, 2)[:, :length] for x in (rows.k, rows.v))
            logits = rows.q[some] @ keys.mT
            if rows.bias is None:
                head[some] = logits.softmax(-1) @ values
            else:
                added = rows.added(some, gathered, length)[:, None]
                found = (logits + added).softmax(-1) @ values
                head[some] = found.masked_fill_(_hidden(added), 0.0)


def _lengths(kv_indices, kv_num_blocks, Lk, block_k):
    """How many keys each row of blocks lists; the last block may hold fewer than the others."""
    last_block, missing = (Lk - 1) // block_k, -Lk % block_k
    last = kv_indices.gather(-1, (kv_num_blocks.long() - 1).clamp(min=0)[:, None])[:, 0]
    lengths = kv_num_blocks * block_k - missing * (last == last_block).int()
    return lengths.where(kv_num_blocks > 0, 0)


def _blocks(x, block):
    """Cut [L, D] into zero-padded blocks [N, block, D]."""
    missing = -x.shape[0] % block
    # padding by nothing would still copy
    x = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return x.view(-1, block, x.shape[-1])


def _empty_output(q, v):
    """[B, H, L, D] over memory in [B, L, H, D] order, so that [B, L, H * D] is a view."""
    B, H, L, _ = q.shape
    return torch.empty((B, L, H, v.shape[-1]), device=q.device, dtype=v.dtype).transpose(1, 2)
