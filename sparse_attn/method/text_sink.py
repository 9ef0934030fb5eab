"""Text sink: blocks that hold a token outside the video are always kept, as rows and as columns."""

import torch

from ..token_layout import TokenLayout


def sink_blocks(layout: TokenLayout, block_size: int, device=None) -> torch.Tensor:
    """Mark the blocks that hold at least one text or other extra token.

    Returns:
        [N] bool, N blocks of `block_size` tokens.
    """
    sink = torch.zeros(layout.num_blocks(block_size), dtype=torch.bool, device=device)
    sink[: count_before(layout, block_size)] = True
    if layout.after:
        sink[(layout.tokens - layout.after) // block_size :] = True
    return sink


def count_before(layout: TokenLayout, block_size: int) -> int:
    return -(-layout.before // block_size)


def count_sinks(layout: TokenLayout, block_size: int) -> int:
    """How many blocks `sink_blocks` marks, without a tensor."""
    total = layout.num_blocks(block_size)
    head = count_before(layout, block_size)
    tail = total - (layout.tokens - layout.after) // block_size if layout.after else 0
    return min(total, head + tail)
