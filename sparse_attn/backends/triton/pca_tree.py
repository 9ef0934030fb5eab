"""Halve: tokens in two halves along the direction in which they differ most, and so on to a block.

A node is a range of places in the order. Per level one kernel finds the direction of every node in
a sample of it, one measures the node's tokens along it, and the node is sorted: by torch while it
is large, on chip as soon as it fits one program.
"""

import torch
import triton
import triton.language as tl

from . import launch as inputs

BLOCK = 64
SAMPLES = 128
POWER_STEPS = 8
TILE = 128
# tokens that one program sorts
SORTED = 2048
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
    order, turns, taken, V, depth, most, BLOCK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    i_node, i_h = tl.program_id(0) // tl.cdiv(most, TILE), tl.program_id(1).to(tl.int64)
    first, size = _node(i_node, depth, V, BLOCK)
    o_t = tl.program_id(0) % tl.cdiv(most, TILE) * TILE + tl.arange(0, TILE)
    m_t = o_t < size
    o_from = tl.load(turns + ((i_h << depth) + i_node) * most + o_t, mask=m_t, other=0)
    b_order = tl.load(order + i_h * V + first + o_from, mask=m_t, other=0)
    tl.store(taken + i_h * V + first + o_t, b_order, mask=m_t)


def pca_tree(features: torch.Tensor) -> torch.Tensor:
    """Order tokens so that every block of 64 holds alike ones.

    Args:
        features: [h, V, F] float32, finite; at most 64 features.

    Returns:
        [h, V] int32, the token at every place.
    """
    inputs.refuse(why_not(features))
    features = features.contiguous()
    h, V, F = features.shape
    width = triton.next_power_of_2(F)
    order = torch.arange(V, device=features.device, dtype=torch.int32).repeat(h, 1)
    # nodes of a level differ by at most one block; `most` is the largest
    blocks, depth = triton.cdiv(V, BLOCK), 0
    with inputs.on_device(features):
        while blocks > 1:
            nodes, most = 1 << depth, blocks * BLOCK
            directions = torch.empty((h, nodes, width), device=features.device)
            along = torch.empty((h, nodes, most), device=features.device)
            tiles = (nodes * triton.cdiv(most, TILE), h)
            of_node = {"BLOCK": BLOCK}
            _direction_kernel[(nodes, h)](
                features, order, directions, V, depth,
                F=F, WIDTH=width, SAMPLES=SAMPLES, STEPS=POWER_STEPS, num_warps=4, **of_node,
            )  # fmt: skip
            _along_kernel[tiles](
                features, order, directions, along, V, depth, most,
                F=F, WIDTH=width, TILE=TILE, num_warps=4, **of_node,
            )  # fmt: skip
            if most <= SORTED:
                size = triton.next_power_of_2(most)
                _sort_kernel[(nodes, h)](
                    along, order, V, depth, most,
                    SIZE=size, num_warps=max(1, size // 256), **of_node,
                )  # fmt: skip
            else:
                turns, before = along.sort(dim=-1, stable=True).indices, order
                order = torch.empty_like(before)
                _take_kernel[tiles](
                    before, turns, order, V, depth, most, TILE=TILE, num_warps=4, **of_node
                )  # fmt: skip
            blocks, depth = triton.cdiv(blocks, 2), depth + 1
    return order


def why_not(features: torch.Tensor) -> str | None:
    """Reason why this kernel cannot serve the call, or None."""
    if features.dtype != torch.float32 or features.ndim != 3:
        return (
            f"needs float32 features [h, V, F], got {features.dtype} of {features.ndim} dimensions"
        )
    if features.shape[-1] > MAX_FEATURES:
        return f"needs at most {MAX_FEATURES} features, got {features.shape[-1]}"
    return inputs.why_not_device(features)
