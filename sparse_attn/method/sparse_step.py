"""A sparse step: attention over what a mask keeps and, with an order, averages of what it skips."""

import torch

from ..backends.choice import Backend
from ..block_mask import BlockMask
from ..call import Call
from ..head_groups import attend_in_groups

# of every pair of blocks, a number in a list
PAIR_BYTES = 4


def sparse_step(
    backend: Backend, call: Call, mask: BlockMask, order: torch.Tensor | None, quantised: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Attend what a mask keeps.

    Args:
        order: [B, H, L] int32, the token at every place of the mask's sequence, or None where that
            is q's and nothing stands for skipped blocks.
        quantised: score with INT8 q and k, which the backend must be able to.

    Returns:
        out: [B, H, L, D]. lse: [B, H, L] float32, or None where the backend does not tell it.
    """
    # permuted and quantised q, k and v
    copies = (0 if order is None else 3) + 1.5 * quantised

    def attend(part, heads):
        places = None if order is None else order[:, heads]
        kept = mask.with_bits(mask.bits[:, heads])
        return _attend(backend, part, kept, places, quantised)

    return attend_in_groups(call, copies, PAIR_BYTES, attend)


def _attend(backend, call, mask, order, quantised):
    attention = backend.quantised_attention if quantised else backend.attention
    assert attention is not None, "`why_not_quantised` says when"
    tokens = call.q.shape[2]
    mask = mask.as_walked(tokens)
    options = {"scale": call.scale, "key_bias": call.key_bias, "mask": mask}
    if order is None:
        return attention(call.q, call.k, call.v, **options)
    moved = backend.permute(call.q, call.k, call.v, order, call.key_bias)
    pooled = moved.pooled.of_blocks(tokens, mask.block_k)
    options.update(key_bias=moved.key_bias, pooled=pooled, order=order)
    return attention(moved.q, moved.k, moved.v, **options)
