"""A run rehearsed: every operation of its steps once, for who wants its kernels compiled or loaded."""

import torch
from torch.overrides import TorchFunctionMode

from ..backends.choice import Backend
from ..block_mask import BlockMask
from ..call import Call
from ..config import AdaSpaConfig
from ..method.fused_online_search import fused_online_search
from ..method.lse_cached_search import lse_cached_search
from ..method.sparse_step import sparse_step
from ..orders.choice import find_order
from ..orders.position import serpentine_order
from ..token_layout import TokenLayout

# 33 blocks: kernels that go by size meet every size but those of FURTHER_BLOCKS
LAYOUT = TokenLayout(0, 3, 8, 88)
HEADS = 2
# key blocks of longer videos, for which rows of masks have binaries of their own
FURTHER_BLOCKS = (2048, 4096)


FILLED = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
    torch.Tensor.new_empty: torch.Tensor.new_zeros,
}


class _Zeros(TorchFunctionMode):
    """Gives zeros for memory that nothing fills: indices among it are read."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return FILLED.get(func, func)(*args, **(kwargs or {}))


def rehearse(
    backend: Backend, config: AdaSpaConfig, head_dim: int, dtype: torch.dtype, bias: bool = False
) -> None:
    """Do what a run does on zeros of the CPU: an order, then dense, search, sparse, later search.

    Args:
        backend: whose launches do not run.
        bias: with a key bias, as masked text makes one.
    """
    tokens = LAYOUT.tokens
    with _Zeros():
        q = torch.zeros((1, HEADS, tokens, head_dim), dtype=dtype)
        key_bias = torch.zeros(1, tokens) if bias else None
        by_position = serpentine_order(LAYOUT, q.device) if config.pooled else None
        scale = head_dim**-0.5
        call = Call(q, q, q, scale, LAYOUT, 0, lambda: q, key_bias, by_position=by_position)
        if config.by_similarity:
            # what sorts tokens takes longest to compile
            find_order(backend, call, config)
        quantised_attention = backend.quantised_attention
        low = config.low_precision is not None and quantised_attention is not None
        precisions = (True, False) if low else (False,)

        def dense(call):
            return backend.attention(call.q, call.k, call.v, scale=call.scale, key_bias=key_bias)

        _, lse = dense(call)
        found = fused_online_search(backend, call, config, lse, dense)
        if quantised_attention is not None and low and not bias:
            quantised_attention(q, q, q, scale=call.scale)

        def sparse(mask):
            for quantised in precisions:
                sparse_step(backend, call, mask, found.order, quantised)

        sparse(found.mask)
        for int8 in precisions:
            lse_cached_search(backend, call, config, lse, int8)
        # blocks of longer videos, and their numbers
        for block_q, block_k in {(128, config.block_k), (128, 128)} - {
            (config.block_q, config.block_k)
        }:
            shape = 1, HEADS, LAYOUT.num_blocks(block_q), LAYOUT.num_blocks(block_k)
            keep = torch.ones(shape, dtype=torch.bool)
            sparse(BlockMask.from_dense(keep, block_q=block_q, block_k=block_k))
        for blocks in FURTHER_BLOCKS:
            scores, budgets = torch.zeros(1, 1, 1, blocks), torch.ones(1, 1)
            sinks = torch.zeros(blocks, dtype=torch.bool)
            backend.row_wise_top_k(scores, scores, budgets, 1, sinks, sinks[:1])
