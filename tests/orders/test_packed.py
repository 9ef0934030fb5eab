"""Packed orders come back with the tokens of every block sorted."""

import pytest
import torch

from sparse_attn.backends.permuted import BLOCK
from sparse_attn.orders.packed import pack, packed_bytes, same_blocks, unpack
from sparse_attn.orders.position import serpentine_order
from sparse_attn.token_layout import TokenLayout

LAYOUTS = [
    TokenLayout(0, 1, 8, 8),
    TokenLayout(5, 3, 5, 7, 11),
    TokenLayout(0, 1, 3, 5, 2),  # less than a block
    TokenLayout(0, 1, 1024, 64),  # the last token is 65,535
    TokenLayout(7, 1, 1024, 64, 1),
    TokenLayout(256, 11, 120, 150, 1),  # three multiples of 65,536
]


def an_order(layout, batch=2, heads=3):
    generator = torch.Generator().manual_seed(0)
    shape = batch, heads, layout.video
    video = layout.before + torch.rand(shape, generator=generator).argsort(-1)
    order = serpentine_order(layout, torch.device("cpu")).expand(batch, heads, -1).clone()
    order[..., : layout.video] = video
    return order


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.describe())
def test_every_block_keeps_its_tokens(layout):
    order = an_order(layout)
    packed = pack(order, layout)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, packed_bytes(layout))
    found = unpack(packed, layout)
    assert found.dtype == torch.int32 and found.shape == order.shape
    for some in range(0, layout.video, BLOCK):
        block = slice(some, min(some + BLOCK, layout.video))
        assert torch.equal(found[..., block], order[..., block].sort(-1).values)
    assert torch.equal(found[..., layout.video :], order[..., layout.video :])
    # packed once more, nothing changes
    assert torch.equal(pack(found, layout), packed)
    assert torch.equal(unpack(packed[:, 1:2], layout), found[:, 1:2])


def test_a_long_video_takes_half_of_four_bytes_a_token():
    layout = TokenLayout(0, 145, 45, 80, 256)
    assert layout.tokens == 522_256 and packed_bytes(layout) < 0.53 * 4 * layout.tokens


def test_orders_are_compared_by_their_blocks():
    layout = LAYOUTS[1]
    order = an_order(layout)
    other = unpack(pack(order, layout), layout)
    assert not torch.equal(other, order) and same_blocks(order, other, layout).all()
    # a token of the first block of one head goes to its second
    other[1, 2, [0, BLOCK]] = other[1, 2, [BLOCK, 0]]
    same = same_blocks(order, other, layout)
    assert not same[1, 2] and same.sum() == 5
