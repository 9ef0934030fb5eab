"""PCA tree: median splits of tokens along their first principal component, down to a block.

A node is a range of places in the order. Per level one kernel finds the direction of every node in
a sample of it, one measures the node's tokens along it, and the node is sorted: by torch while it
is large, on chip as soon as it fits one program.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..permuted import BLOCK
from . import launch

# power iterations towards a node's first principal component
POWER_STEPS = 8
MAX_FEATURES = 64
SIZES = ["V", "depth", "most"]
UNALIGNED = {"do_not_specialize": SIZES, "do_not_specialize_on_alignment": ["order", "taken"]}


@triton.jit
def _node(i_node, depth, V, BLOCK: tl.constexpr):
    """First place and number of places of a node; nodes of a level may be empty."""
    first = i_node * 0
    last = first + tl.cdiv(V, BLOCK)
    for level in range(depth):
        middle = (first + last + 1) // 2
        right = (i_node >> (depth - 1 - level)) % 2 == 1
        first, last = tl.where(right, middle, first), tl.where(right, last, middle)
    return first * BLOCK, tl.minimum(last * BLOCK, V) - tl.minimum(first * BLOCK, V)


@triton.jit(**UNALIGNED)
def _direction_kernel(
    features, order, directions, V, depth,
    F: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SAMPLES: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    i_node, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, size = _node(i_node, depth, V, BLOCK)
    if size == 0:
        return
    o_f = tl.arange(0, WIDTH)
    o_place = first + tl.arange(0, SAMPLES) * size // SAMPLES
    o_token = tl.load(order + i_h * V + o_place)
    p_x = features + (i_h * V + o_token)[:, None] * F + o_f[None, :]
    # [SAMPLES, WIDTH]
    b_x = tl.load(p_x, mask=(o_f < F)[None, :], other=0.0)
    b_x -= (tl.sum(b_x, 0) / SAMPLES)[None, :]
    b_direction = tl.sqrt(tl.sum(b_x * b_x, 0))
    for _ in range(STEPS):
        b_along = tl.sum(b_x * b_direction[None, :], 1)
        b_direction = tl.sum(b_x * b_along[:, None], 0)
        norm = tl.sqrt(tl.sum(b_direction * b_direction, 0))
        b_direction = b_direction / tl.maximum(norm, 1e-20)
    p_direction = directions + (i_h * tl.num_programs(0) + i_node) * WIDTH
    tl.store(p_direction + o_f, b_direction)


@triton.jit(**UNALIGNED)
def _along_kernel(
    features, order, directions, along, V, depth, most,
    F: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i_node, i_h = tl.program_id(0) // tl.cdiv(most, TILE), tl.program_id(1).to(tl.int64)
    i_tile = tl.program_id(0) % tl.cdiv(most, TILE)
    first, size = _node(i_node, depth, V, BLOCK)
    nodes = 1 << depth
    o_f, o_t = tl.arange(0, WIDTH), i_tile * TILE + tl.arange(0, TILE)
    m_t = o_t < size
    o_token = tl.load(order + i_h * V + first + o_t, mask=m_t, other=0)
    p_x = features + (i_h * V + o_token)[:, None] * F + o_f[None, :]
    b_x = tl.load(p_x, mask=m_t[:, None] & (o_f < F)[None, :], other=0.0)
    b_direction = tl.load(directions + (i_h * nodes + i_node) * WIDTH + o_f)
    b_along = tl.sum(b_x * b_direction[None, :], 1)
    # what overflowed still gets a place before those that only pad
    b_along = tl.where(tl.abs(b_along) < 3e38, b_along, 0.0)
    b_along = tl.where(m_t, b_along, float("inf"))
    tl.store(along + (i_h * nodes + i_node) * most + o_t, b_along, mask=o_t < most)


@triton.jit(**UNALIGNED)
def _sort_kernel(
    along, order, V, depth, most, BLOCK: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    i_node, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, size = _node(i_node, depth, V, BLOCK)
    o_i = tl.arange(0, SIZE)
    m_i = o_i < size
    p_along = along + (i_h * tl.num_programs(0) + i_node) * most
    # integers in the order of the numbers, no two alike: equal numbers keep their order
    b_int = (tl.load(p_along + o_i, mask=m_i, other=0.0) + 0.0).to(tl.int32, bitcast=True)
    b_int = tl.where(b_int < 0, b_int ^ 0x7FFFFFFF, b_int)
    b_key = tl.where(m_i, (b_int.to(tl.int64) << 32) + o_i, 0x7FFFFFFFFFFFFFFF)
    o_from = (tl.sort(b_key) & 0xFFFFFFFF).to(tl.int32)
    p_order = order + i_h * V + first
    b_order = tl.load(p_order + o_from, mask=m_i, other=0)
    tl.debug_barrier()
    tl.store(p_order + o_i, b_order, mask=m_i)


@triton.jit(**UNALIGNED)
def _take_kernel(
    order, permutation, taken, V, depth, most, BLOCK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    i_node, i_h = tl.program_id(0) // tl.cdiv(most, TILE), tl.program_id(1).to(tl.int64)
    first, size = _node(i_node, depth, V, BLOCK)
    o_t = tl.program_id(0) % tl.cdiv(most, TILE) * TILE + tl.arange(0, TILE)
    m_t = o_t < size
    o_from = tl.load(permutation + ((i_h << depth) + i_node) * most + o_t, mask=m_t, other=0)
    b_order = tl.load(order + i_h * V + first + o_from, mask=m_t, other=0)
    tl.store(taken + i_h * V + first + o_t, b_order, mask=m_t)


def pca_tree(features: torch.Tensor) -> torch.Tensor:
    """Order tokens so that every block of 64 holds alike ones.

    Args:
        features: [h, V, F] float32, finite; at most 64 features.

    Returns:
        [h, V] int32, the token at every place.
    """
    features = features.contiguous()
    h, V, _ = features.shape
    order = torch.arange(V, device=features.device, dtype=torch.int32).repeat(h, 1)
    # nodes of a level differ by at most one block; `most` is the largest
    blocks, depth = triton.cdiv(V, BLOCK), 0
    with launch.on_device(features):
        while blocks > 1:
            order = _split(features, order, depth, blocks * BLOCK)
            blocks, depth = triton.cdiv(blocks, 2), depth + 1
    return order


def _split(features, order, depth: int, most: int):
    """Sort the tokens of every node of a level, of `most` tokens at most, along its direction."""
    (h, V, F), nodes = features.shape, 1 << depth
    width = triton.next_power_of_2(F)
    directions = torch.empty((h, nodes, width), device=features.device)
    along = torch.empty((h, nodes, most), device=features.device)
    _direction_kernel[(nodes, h)](
        features, order, directions, V, depth,
        F=F, WIDTH=width, BLOCK=BLOCK, SAMPLES=tiles.PCA_DIRECTION.tile_q, STEPS=POWER_STEPS,
        **tiles.PCA_DIRECTION.options,
    )  # fmt: skip
    tile = tiles.PCA_ALONG
    _along_kernel[(nodes * triton.cdiv(most, tile.tile_q), h)](
        features, order, directions, along, V, depth, most,
        F=F, WIDTH=width, BLOCK=BLOCK, TILE=tile.tile_q, **tile.options,
    )  # fmt: skip
    if most <= tiles.PCA_SORTED:
        tile = tiles.pca_sort(most)
        _sort_kernel[(nodes, h)](
            along, order, V, depth, most, BLOCK=BLOCK, SIZE=tile.tile_k, **tile.options
        )  # fmt: skip
        return order
    tile, permutation = tiles.PCA_TAKE, along.sort(dim=-1, stable=True).indices
    taken = torch.empty_like(order)
    _take_kernel[(nodes * triton.cdiv(most, tile.tile_q), h)](
        order, permutation, taken, V, depth, most, BLOCK=BLOCK, TILE=tile.tile_q, **tile.options
    )  # fmt: skip
    return taken


def why_not(features: torch.Tensor) -> str | None:
    """Reason why this kernel cannot serve the call, or None."""
    if features.dtype != torch.float32 or features.ndim != 3:
        return (
            f"needs float32 features [h, V, F], got {features.dtype} of {features.ndim} dimensions"
        )
    if features.shape[-1] > MAX_FEATURES:
        return f"needs at most {MAX_FEATURES} features, got {features.shape[-1]}"
    return launch.why_not_device(features)
