"""A sparse step: attention over what a mask keeps and, with an order, averages of what it skips."""

import torch

from ..backends.choice import Backend
from ..block_mask import BlockMask
from ..call import Call


def sparse_step(
    backend: Backend, call: Call, mask: BlockMask, order: torch.Tensor | None, quantised: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend what a mask keeps.

    Args:
        order: [B, H, L] int32, the token at every place of the mask's sequence, or None where that
            is q's and nothing stands for skipped blocks.
        quantised: score with INT8 q and k, which the backend must be able to.

    Returns:
        out: [B, H, L, D]. lse: [B, H, L] float32, or None where the backend does not tell it.
    """
    attention = backend.quantised_attention if quantised else backend.attention
    assert attention is not None, "`why_not_quantised` says when"
    if order is None:
        return attention(
            call.q, call.k, call.v, scale=call.scale, key_bias=call.key_bias, mask=mask
        )  # fmt: skip
    moved = backend.permute(call.q, call.k, call.v, order, call.key_bias)
    return attention(
        moved.q, moved.k, moved.v, scale=call.scale, key_bias=moved.key_bias, mask=mask,
        pooled=moved.pooled, order=order,
    )  # fmt: skip
