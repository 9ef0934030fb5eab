"""The backend in plain torch: for CPUs, Macs and machines without Triton. It really skips work.

The keys and values that a row of blocks lists are gathered and attended by ordinary products. On a CPU
every thread computes rows of its own; elsewhere rows that list equally many keys make a batch.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from ...block_mask import BlockMask
from ..permuted import BLOCK, Arranged, arranged, block_sizes

# one pass over dense attention and masses took 0.88 s where two took 0.74 s: 4 heads x 8,320
# tokens x 64, float32, two cores of a 2.8 GHz Xeon
ONE_PASS_SEARCH = False
# bytes of a tile of weights: about what the cache of a CPU's core holds
TILE_BYTES = 2 << 20
# the same on other devices, also of a batch of rows: enough work for a GPU, little of its memory
BATCH_BYTES = 256 << 20
# exponents above this leave float32; reached only when an earlier LSE is useless
LARGEST_EXPONENT = 80.0


def why_not(q, k, v, block_q: int, block_k: int) -> str | None:
    """Say why plain torch cannot serve the call, or None when it can."""
    if not q.is_floating_point():
        return f"needs floating point tensors, got {q.dtype}"
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return f"needs one head_dim, got {q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]}"
    return None


def why_not_low_precision(q, k, v, block_q: int, block_k: int, precision: str) -> str:
    return "plain torch computes in float32"


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
    step = max(1, BATCH_BYTES // per_row)
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
    B, H, Lq, D = q.shape
    Lk = k.shape[-2]
    padded = Lk + -Lk % block_k
    room = TILE_BYTES if q.device.type == "cpu" else BATCH_BYTES
    step = max(1, room // (padded * 4 * block_q)) * block_q
    # two more columns let the product add the key bias and subtract the LSE; keys that pad the
    # last block weigh nothing
    keys = torch.zeros(padded, D + 2, device=k.device)
    queries = torch.ones(Lq, D + 2, device=q.device)

    def sum_rows(start):
        weights = queries[start : start + step] @ keys.t()
        weights.clamp_(max=LARGEST_EXPONENT).exp_()
        sums = _sum_blocks(weights, block_q, block_k)
        first = start // block_q
        masses[b, h, first : first + len(sums)] = sums

    with _each_alone(q.device) as for_each:
        for b in range(B):
            keys[:, D] = -1e30
            keys[:Lk, D] = 0.0 if key_bias is None else key_bias[b].clamp(min=-1e30)
            keys[:, D + 1] = -1.0
            for h in range(H):
                keys[:Lk, :D] = k[b, h]
                queries[:, :D] = q[b, h].float() * scale
                queries[:, D + 1] = lse[b, h]
                for_each(sum_rows, range(0, Lq, step))
    if renormalise:
        starts = torch.arange(masses.shape[2], device=q.device) * block_q
        count = (q.shape[-2] - starts).clamp(max=block_q)
        masses *= count[:, None] / masses.sum(-1, keepdim=True)
    return masses


def pooled_masses(q, k_mean, log_sizes, lse, *, block_q, scale):
    """Masses of pseudo keys k_mean [B, H, N, D], whose weights have the logs log_sizes [B, N]."""
    return block_masses(
        q, k_mean, lse, block_q=block_q, block_k=1, scale=scale, key_bias=log_sizes,
        renormalise=False,
    )  # fmt: skip


def arrange(q, k, v, order, key_bias=None) -> Arranged:
    """Put tokens in `order` and the means of their blocks behind them."""
    return arranged(q, k, v, order, key_bias, arrange=_arrange)


def _arrange(x, order, means):
    B, H, L, D = x.shape
    blocks = -(-L // BLOCK)
    whole = blocks * BLOCK
    out = x.new_zeros(B, H, whole + blocks + -blocks % BLOCK if means else L, D)
    for b in range(B):
        for h in range(H):
            out[b, h, :L] = x[b, h].index_select(0, order[b, h])
            if not means:
                continue
            sums = out[b, h, :whole].view(blocks, BLOCK, D).sum(1, dtype=torch.float32)
            out[b, h, whole : whole + blocks] = sums / block_sizes(L, x.device)[:, None]
    return out


def unpack_mask(bits: torch.Tensor, num_k: int, more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn bits [B, H, Nq, ceil(Nk / 8)] into `kv_indices` and `kv_num_blocks`.

    Args:
        more: blocks num_k to num_k + more - 1, which no bit tells of, end every list.
    """
    mask = BlockMask(bits, num_k, 0, 0)
    if more:
        listed = torch.nn.functional.pad(mask.to_dense(), (0, more), value=True)
        mask = BlockMask.from_dense(listed, block_q=0, block_k=0)
    return mask.kv_lists()


def sparse_attention(
    q, k, v, kv_indices, kv_num_blocks, *, block_q, block_k, scale, key_bias=None, tail=None,
    order=None,
):  # fmt: skip
    """Attention over the listed key blocks, computed in float32.

    Args:
        q: [B, H, Lq, D]. k, v: [B, H, Lk, D].
        kv_indices: [B, H, Nq, K] int32, ascending, packed left. kv_num_blocks: [B, H, Nq] int32.
        tail: [B, H, Nq, ceil(N / 8)] uint8, the lists as bits, where k and v end with means of
            their N blocks (`Arranged`) and every list with all blocks of means. The mean of a
            block that a row lists weighs nothing there.
        order: [B, H, Lq] int32, the token at every place of q; `out` is in the order of the tokens.

    Returns:
        out: [B, H, Lq, D], 0 where a row lists no block. lse: None, it would cost a fifth more time.
    """
    B, H, Lq, _ = q.shape
    out = _empty_output(q, v)
    attend_head = _attend_rows if q.device.type == "cpu" else _attend_batches
    with _each_alone(q.device) as for_each:
        for b in range(B):
            bias = None if key_bias is None else _blocks(key_bias[b, :, None], block_k)
            for h in range(H):
                q_blocks = _blocks(q[b, h].float() * scale, block_q)
                k_blocks, v_blocks = (_blocks(x[b, h].float(), block_k) for x in (k, v))
                counts = kv_num_blocks[b, h]
                lengths = _lengths(kv_indices[b, h], counts, k.shape[-2], block_k)
                hidden = None if tail is None else _hidden_means(tail[b, h], k.shape[-2])
                head = torch.zeros_like(q_blocks)
                attend_head(
                    head, q_blocks, k_blocks, v_blocks, bias, hidden, kv_indices[b, h], counts,
                    lengths, for_each,
                )  # fmt: skip
                head = head.flatten(0, 1)[:Lq]
                if order is None:
                    out[b, h] = head
                else:
                    out[b, h].index_copy_(0, order[b, h].long(), head.to(out.dtype))
    return out, None


def _hidden_means(bits, Lk):
    """What to add to the logits of all means, by rows of blocks: -inf where the row lists the block.

    Args:
        bits: [Nq, ceil(N / 8)] uint8. Lk: keys, means among them.

    Returns:
        [Nq, Np] float32.
    """
    total = Lk // BLOCK
    # one block of means for every 64 of tokens, or fewer at the end
    blocks = total - -(-total // (BLOCK + 1))
    listed = BlockMask(bits, blocks, 0, 0).to_dense()
    hidden = torch.zeros(len(bits), (total - blocks) * BLOCK, device=bits.device)
    hidden[:, :blocks].masked_fill_(listed, float("-inf"))
    return hidden


def _attend_rows(
    head, q_blocks, k_blocks, v_blocks, bias, hidden, kv_indices, counts, lengths, for_each
):  # fmt: skip
    """Attend one row of blocks at a time: its keys and weights stay in the cache of a core."""
    room = _Room()
    # made once: each operation, a view too, has a thread wait for the interpreter's lock
    q_rows, out_rows = q_blocks.unbind(), head.unbind()

    def attend_row(row):
        i, listed, length = row
        blocks, keys, logits = room.for_row(len(listed), length, q_blocks, k_blocks)
        torch.index_select(k_blocks, 0, listed, out=blocks)
        torch.mm(q_rows[i], keys.t(), out=logits)
        if bias is not None:
            logits += bias[listed].view(1, -1)[:, :length]
        if hidden is not None:
            logits[:, -hidden.shape[1] :] += hidden[i]
        torch.softmax(logits, -1, out=logits)
        # the values take the place of the keys
        torch.index_select(v_blocks, 0, listed, out=blocks)
        torch.mm(logits, keys, out=out_rows[i])

    rows = zip(kv_indices.unbind(), counts.tolist(), lengths.tolist(), strict=True)
    for_each(attend_row, [(i, x[:n], length) for i, (x, n, length) in enumerate(rows) if n])


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


def _attend_batches(
    head, q_blocks, k_blocks, v_blocks, bias, hidden, kv_indices, counts, lengths, _
):  # fmt: skip
    """Attend many rows of blocks at once, as many as list equally many keys and fit."""
    block_k, D = k_blocks.shape[1:]
    for length in lengths.unique().tolist():
        if length == 0:
            continue
        blocks = -(-length // block_k)
        step = max(1, BATCH_BYTES // (blocks * block_k * 4 * (2 * D + q_blocks.shape[1])))
        for rows in (lengths == length).nonzero()[:, 0].split(step):
            listed = kv_indices[rows, :blocks].long()
            keys, values = (x[listed].flatten(1, 2)[:, :length] for x in (k_blocks, v_blocks))
            logits = q_blocks[rows] @ keys.mT
            if bias is not None:
                logits += bias[listed].view(len(rows), 1, -1)[..., :length]
            if hidden is not None:
                logits[..., -hidden.shape[1] :] += hidden[rows][:, None]
            head[rows] = logits.softmax(-1) @ values


def _lengths(kv_indices, kv_num_blocks, Lk, block_k):
    """How many keys each row of blocks lists; the last block may hold fewer than the others."""
    last_block, missing = (Lk - 1) // block_k, -Lk % block_k
    last = kv_indices.gather(-1, (kv_num_blocks.long() - 1).clamp(min=0)[:, None])[:, 0]
    lengths = kv_num_blocks * block_k - missing * (last == last_block).int()
    return lengths.where(kv_num_blocks > 0, 0)


@contextmanager
def _each_alone(device):
    """Yield for_each(work, tiles), which calls work(tile) for every tile; on a CPU, in threads.

    A tile is too little work to share: the threads would wait for each other after each product.
    So each thread computes whole tiles, alone.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:

        def for_each(work: Callable, tiles: Iterable):
            deque(map(work, tiles), maxlen=0)

        yield for_each
        return

    def for_each(work: Callable, tiles: Iterable):
        # one task per thread: one per tile would wake the waiting caller after each
        rest = deque(tiles)

        # threads do not inherit the caller's inference mode
        @torch.inference_mode()
        def take_turns(_):
            while rest:
                try:
                    tile = rest.popleft()
                except IndexError:
                    return
                work(tile)

        deque(pool.map(take_turns, range(threads)), maxlen=0)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield for_each
    finally:
        # the last number set is also that of every thread yet to start
        torch.set_num_threads(threads)


def _blocks(x, block):
    """Cut [L, D] into zero-padded blocks [N, block, D]."""
    missing = -x.shape[0] % block
    # padding by nothing would still copy
    x = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return x.view(-1, block, x.shape[-1])


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
