"""Orders in half their size, for what is kept between steps.

A mask knows blocks, not who stands where in one. Sorted within their block, tokens are told by their
lowest 16 bits and, for every multiple of 65,536, how many tokens of the block lie below it. The tokens
beside the video follow it in their own sequence, and need nothing.
"""

import torch
import torch.nn.functional as F

from ..backends.permuted import BLOCK
from ..token_layout import TokenLayout

LOW = 1 << 16


def packed_bytes(layout: TokenLayout) -> int:
    """Bytes of one head."""
    size = 2 * layout.video + _multiples(layout) * -(-layout.video // BLOCK)
    return size + size % 2


def pack(order: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """`order` [B, H, L] int32 of the tokens of a layout, as [B, H, bytes] uint8."""
    blocks = _sorted_blocks(order, layout)
    low = blocks.view(torch.int16)[..., ::2].flatten(-2)[..., : layout.video]
    parts = [low.contiguous().view(torch.uint8)]
    for i in range(_multiples(layout)):
        parts.append((blocks < (i + 1) * LOW).sum(-1).to(torch.uint8))
    packed = torch.cat(parts, -1)
    return F.pad(packed, (0, packed_bytes(layout) - packed.shape[-1]))


def unpack(packed: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """What was packed, [B, H, L] int32, with the tokens of every block sorted."""
    video, device = layout.video, packed.device
    order = packed.new_empty((*packed.shape[:2], layout.tokens), dtype=torch.int32)
    found = order[..., :video]
    found.copy_(packed[..., : 2 * video].view(torch.int16)).bitwise_and_(LOW - 1)
    place = torch.arange(video, device=device) % BLOCK
    num_blocks = -(-video // BLOCK)
    for i in range(_multiples(layout)):
        below = packed[..., 2 * video + i * num_blocks :][..., :num_blocks]
        below = below.repeat_interleave(BLOCK, -1)[..., :video]
        found.add_((place >= below).int(), alpha=LOW)
    order[..., video : video + layout.before] = torch.arange(layout.before, device=device)
    first = layout.before + video
    order[..., first:] = torch.arange(first, layout.tokens, device=device)
    return order


def same_blocks(order: torch.Tensor, other: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Which heads of two orders [B, H, L] have the same tokens in every block, [B, H] bool."""
    blocks = (_sorted_blocks(x, layout) for x in (order, other))
    return torch.eq(*blocks).all(-1).all(-1)


def _sorted_blocks(order, layout) -> torch.Tensor:
    """[B, H, N, BLOCK] int32 of the video; places past its end hold what no token is."""
    video = order[..., : layout.video]
    video = F.pad(video, (0, -layout.video % BLOCK), value=torch.iinfo(torch.int32).max)
    return video.unflatten(-1, (-1, BLOCK)).sort(-1).values.contiguous()


def _multiples(layout) -> int:
    """How many multiples of 65,536 lie above 0 and below the number of tokens."""
    return (layout.tokens - 1) // LOW
