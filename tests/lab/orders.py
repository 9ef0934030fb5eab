"""Orders of the video tokens in which a block of consecutive tokens is a compact piece of video.

Every function takes a (T, H, W) grid and returns its token numbers, first to last; `order[i]` is
the raster number of the token at place i.
"""

import math

import torch


def coordinates(grid):
    return torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")


def rods(grid) -> torch.Tensor:
    """Rods of four frames and four rows along the width, there and back again.

    Any 64 consecutive tokens of a rod are four columns: a 4x4x4 cube, also where the width is no
    multiple of four, and at the end of a rod the block bends into the next one.
    """
    t, h, w = coordinates(grid)
    columns = -(-grid[1] // 4)
    band, lane = t // 4, h // 4
    lane = torch.where(band % 2 == 1, columns - 1 - lane, lane)
    rod = band * columns + lane
    across = torch.where(rod % 2 == 1, grid[2] - 1 - w, w)
    key = ((rod * grid[2] + across) * 4 + t % 4) * 4 + h % 4
    return key.flatten().argsort()


def hilbert(grid) -> torch.Tensor:
    """The tokens of the grid along the Hilbert curve of the smallest cube around it.

    Skilling, "Programming the Hilbert curve", AIP 2004: coordinates to the transposed index.
    """
    bits = max(1, (max(grid) - 1).bit_length())
    x = [a.flatten().clone() for a in coordinates(grid)]
    q = 1 << (bits - 1)
    while q > 1:
        p = q - 1
        for i in range(3):
            high = (x[i] & q) != 0
            swap = torch.where(high, 0, (x[0] ^ x[i]) & p)
            x[0] = torch.where(high, x[0] ^ p, x[0] ^ swap)
            x[i] = x[i] ^ swap
        q >>= 1
    for i in (1, 2):
        x[i] = x[i] ^ x[i - 1]
    turn = torch.zeros_like(x[0])
    q = 1 << (bits - 1)
    while q > 1:
        turn = torch.where((x[2] & q) != 0, turn ^ (q - 1), turn)
        q >>= 1
    key = torch.zeros_like(turn)
    for bit in range(bits - 1, -1, -1):
        for i in range(3):
            key = key * 2 + (((x[i] ^ turn) >> bit) & 1)
    return key.argsort()


def cubes(grid, sides) -> torch.Tensor:
    """Cubes of `sides` in raster order, raster order inside; the grid's border cuts them off.

    So blocks of as many tokens are cubes only where the sides divide the grid.
    """
    inside, cube = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    for place, n, side in zip(coordinates(grid), grid, sides, strict=True):
        cube = cube * -(-n // side) + place // side
        inside = inside * side + place % side
    return (cube * math.prod(sides) + inside).flatten().argsort()


def order_of(name: str, layout) -> torch.Tensor | None:
    """Order of a whole sequence, the same in every head; None is raster order, text where it is.

    Any other order moves text behind the video, so that blocks start where rods start.

    Args:
        name: "raster", "hilbert", "rods" or "cubes TxHxW".
        layout: a `TokenLayout`.
    """
    if name == "raster":
        return None
    grid = (layout.frames, layout.height, layout.width)
    if name.startswith("cubes "):
        video = cubes(grid, [int(side) for side in name.split()[1].split("x")])
    else:
        video = {"hilbert": hilbert, "rods": rods}[name](grid)
    before = torch.arange(layout.before)
    after = torch.arange(layout.before + layout.video, layout.tokens)
    return torch.cat([video + layout.before, before, after])


def arranged(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """[B, H, L, D] in an order of all heads, [L], or of every head, [B, H, L]."""
    if order is None:
        return x
    if order.ndim == 1:
        return x[:, :, order]
    return x.gather(2, order[..., None].expand(*order.shape, x.shape[-1]))


def put_back(out: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """The inverse of `arranged`."""
    if order is None:
        return out
    if order.ndim == 1:
        return torch.empty_like(out).index_copy_(2, order, out)
    return torch.empty_like(out).scatter_(2, order[..., None].expand_as(out), out)


def text_blocks(layout, order, block: int) -> torch.Tensor:
    """[N] bool: blocks that hold a token outside the video."""
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[layout.before : layout.before + layout.video] = False
    text = text if order is None else text[order]
    pad = torch.zeros(-len(text) % block, dtype=torch.bool)
    return torch.cat([text, pad]).unflatten(0, (-1, block)).any(1)


def places(layout, order, block: int) -> torch.Tensor:
    """Mean (t, h, w) of the video tokens of every block, [N, 3]; NaN for a block without any."""
    grid = (layout.frames, layout.height, layout.width)
    video = torch.stack([a.flatten().float() for a in coordinates(grid)], -1)
    nowhere = torch.full((1, 3), float("nan"))
    spots = torch.cat([nowhere.expand(layout.before, 3), video, nowhere.expand(layout.after, 3)])
    spots = spots if order is None else spots[order]
    pad = -len(spots) % block
    return torch.cat([spots, nowhere.expand(pad, 3)]).unflatten(0, (-1, block)).nanmean(1)
