"""Heads in groups: what a call needs beside its results, it needs for a few heads at a time.

Budgets, orders and masks are of single heads, so groups change no result. How many heads make a
group is decided here alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from .call import Call, empty_output

# what a call may take above q, k, v, its results and what is kept of it, unless one head takes more.
# 24 heads x 119,056 tokens x 128 at density 0.2, all heads at once 69.0 ms and 2.4 GiB, INT8 48.1 and 3.5:
# 1 GiB 72.6 ms (INT8 50.0; 1.5 GiB 49.7), since the last wave of a group leaves the card
# idle (NVIDIA H200, torch 2.11, Triton 3.6, 2026-11-30, tests/bench/bench_memory.py)
WORKSPACE_BYTES = 1 << 30


def head_groups(call: Call, copies: float, pair_bytes: int) -> Iterator[tuple[slice, Call]]:
    """Split a call into calls of as many heads as the workspace has room for.

    Args:
        copies: how many tensors as large as q are made of every head.
        pair_bytes: what is made for every pair of blocks of 64 tokens, at most.

    Yields:
        Which heads, and the call of these; its `dense` is still that of all.
    """
    batch, heads, tokens, _ = call.q.shape
    need = copies * call.q.nbytes / heads + batch * pair_bytes * (-(-tokens // 64)) ** 2
    room = max(1, int(WORKSPACE_BYTES // max(need, 1)))
    # no group much smaller than the others
    size = -(-heads // -(-heads // room))
    for first in range(0, heads, size):
        some = slice(first, first + size)
        yield some, replace(call, q=call.q[:, some], k=call.k[:, some], v=call.v[:, some])


def attend_in_groups(
    call: Call, copies: float, pair_bytes: int, attend: Callable
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of all heads, a group at a time.

    Args:
        copies, pair_bytes: as `head_groups` takes them, the output of a group not among them.
        attend: attend(call, heads) -> (out [B, h, L, D], lse [B, h, L] float32 or None) of a group.

    Returns:
        out: [B, H, L, D]. lse: [B, H, L] float32, or None where `attend` does not tell it.
    """
    groups = list(head_groups(call, copies + 1, pair_bytes))
    if len(groups) == 1:
        return attend(call, groups[0][0])
    out, lse = empty_output(call.v), None
    for heads, part in groups:
        found, found_lse = attend(part, heads)
        out[:, heads] = found
        if found_lse is not None:
            lse = found_lse.new_empty(call.q.shape[:3]) if lse is None else lse
            lse[:, heads] = found_lse
        # not beside those of the next heads
        del found
    return out, lse
