"""Token order by position: a block of consecutive tokens is a compact piece of the video."""

from dataclasses import replace

import torch

from ..token_layout import TokenLayout

# frames and rows of a rod: 64 of its tokens are a cube of 4 x 4 x 4
FRAMES, ROWS = 4, 4


def video_first(layout: TokenLayout) -> TokenLayout:
    """The layout of a sequence whose extra tokens all lie behind the video, as orders put them."""
    return replace(layout, before=0, after=layout.before + layout.after)


def serpentine_order(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """Order the video in rods along its width, there and back again, and extra tokens behind it.

    A rod is `FRAMES` frames deep and `ROWS` rows high, thinner at the borders. Every second rod
    runs backwards, and so does every second layer of rods: where one ends, the next begins beside it.

    Returns:
        [L] int32, the token at every place.
    """
    sizes = layout.frames, layout.height, layout.width
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    lanes = -(-layout.height // ROWS)
    band, lane = t // FRAMES, h // ROWS
    lane = torch.where(band % 2 == 1, lanes - 1 - lane, lane)
    rod = band * lanes + lane
    across = torch.where(rod % 2 == 1, layout.width - 1 - w, w)
    place = ((rod * layout.width + across) * FRAMES + t % FRAMES) * ROWS + h % ROWS
    video = layout.before + place.flatten().argsort()
    before = torch.arange(layout.before)
    after = torch.arange(layout.before + layout.video, layout.tokens)
    return torch.cat([video, before, after]).to(device, torch.int32)


def is_shared(order: torch.Tensor) -> bool:
    """Whether the heads of `order` [B, H, L] share the memory of one, so that it costs nothing."""
    return order.untyped_storage().nbytes() < order.nbytes
