"""Recall: the share of softmax mass that falls on kept blocks."""

import torch

from ..block_mask import BlockMask
from ..call import Call

# share of 1 by which an evenly spread, never repeating sequence moves on
GOLDEN = 0.6180339887498949


def sample_rows(tokens: int, rows: int) -> list[int]:
    """Choose query rows all over a sequence; never in step with its frames or lines."""
    return sorted({int(tokens * ((i + 0.5) * GOLDEN % 1)) for i in range(min(rows, tokens))})


def sampled_recall(
    call: Call, mask: BlockMask, rows: list[int], order: torch.Tensor | None = None
) -> torch.Tensor:
    """Recall of a mask on some query rows, each an exact float32 softmax over all keys.

    Args:
        rows: numbers of query rows, places in `order` where there is one.
        order: [B, H, L] int32, the token at every place of the mask's sequence; None is that of q
            and k.

    Returns:
        [B, H] float32.
    """
    q, k = call.q, call.k
    B, H, L, _ = k.shape
    places = torch.tensor(rows, device=q.device)
    held = torch.zeros(B, H, device=q.device)
    listed = mask.with_bits(mask.bits[:, :, places // mask.block_q]).to_dense()
    # one head at a time: the rows of all heads would be a gigabyte
    for b in range(B):
        for h in range(H):
            chosen = places if order is None else order[b, h, places]
            logits = (q[b, h, chosen].float() @ k[b, h].float().mT) * call.scale
            if call.key_bias is not None:
                logits += call.key_bias[b]
            weights = logits.softmax(-1)
            weights = weights if order is None else weights.index_select(-1, order[b, h])
            kept = listed[b, h].repeat_interleave(mask.block_k, -1)[:, :L]
            held[b, h] = (weights * kept).sum(-1).mean()
    return held
