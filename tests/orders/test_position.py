import pytest
import torch

from sparse_attn.backends.permuted import put_in_raster
from sparse_attn.backends.reference import in_order
from sparse_attn.orders.position import is_shared, serpentine_order, video_first
from sparse_attn.token_layout import TokenLayout

CPU = torch.device("cpu")
LAYOUTS = [
    TokenLayout(0, 8, 8, 16),
    TokenLayout(20, 5, 6, 31, 7),  # no side that rods divide, text on both sides
    TokenLayout(3, 2, 3, 40),  # thinner than a rod
    TokenLayout(0, 9, 4, 1, 5),
]


def places(layout):
    """(t, h, w) of the video token at every place."""
    order = serpentine_order(layout, CPU)[: layout.video].long() - layout.before
    plane = layout.height * layout.width
    rest = order % plane
    return torch.stack([order // plane, rest // layout.width, rest % layout.width], -1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.describe())
def test_every_token_has_one_place_and_extra_tokens_lie_behind(layout):
    order = serpentine_order(layout, CPU)
    assert order.dtype == torch.int32
    assert sorted(order.tolist()) == list(range(layout.tokens))
    end = layout.before + layout.video
    extra = [*range(layout.before), *range(end, layout.tokens)]
    assert order[layout.video :].tolist() == extra
    moved = video_first(layout)
    assert (moved.before, moved.after) == (0, len(extra))
    assert (moved.tokens, moved.video) == (layout.tokens, layout.video)


def test_blocks_are_cubes_where_rods_divide_the_video():
    layout = LAYOUTS[0]
    for block in places(layout).split(64):
        assert (block.amax(0) - block.amin(0)).tolist() == [3, 3, 3]


def test_the_end_of_a_rod_goes_on_in_its_neighbour():
    """Any 64 tokens in a row stay together, also across the ends of rods and bands."""
    layout = TokenLayout(0, 8, 12, 18)
    for start in range(layout.video - 64):
        block = places(layout)[start : start + 64]
        assert ((block.amax(0) - block.amin(0)) <= torch.tensor([7, 7, 5])).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.describe())
def test_the_order_is_undone(layout):
    x = torch.randn(2, layout.tokens, 3, 4).transpose(1, 2)
    shared = serpentine_order(layout, CPU).expand(2, 3, -1)
    own = torch.rand(shared.shape).argsort(-1).int()
    for order in (shared, own):
        for tokens in (x, x[..., 0]):
            out = torch.full_like(tokens, float("nan"))
            arranged = in_order(x, order) if tokens is x else tokens.gather(-1, order.long())
            put_in_raster(out, arranged, order)
            assert torch.equal(out, tokens)
    assert is_shared(shared) and not is_shared(own)
