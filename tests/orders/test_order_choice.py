"""Order choice: heads that look around themselves stay by position, others do not."""

import pytest
import torch

from sparse_attn.backends.choice import plain_torch
from sparse_attn.call import Call
from sparse_attn.config import AdaSpaConfig
from sparse_attn.orders.choice import find_order
from sparse_attn.orders.position import serpentine_order
from sparse_attn.orders.similarity import similar_order
from sparse_attn.token_layout import TokenLayout

TORCH = plain_torch()
LAYOUT = TokenLayout(before=3, frames=8, height=16, width=16, after=7)
CONFIG = AdaSpaConfig(sparsity=0.8, tail="pooled", token_order="similarity")


def call_of(qkv, key_bias=None):
    in_place = serpentine_order(LAYOUT, torch.device("cpu"))
    return Call(*qkv, 32**-0.5, LAYOUT, step=0, dense=None, key_bias=key_bias, by_position=in_place)


@pytest.fixture(scope="module")
def two_heads():
    """Head 0 looks around itself; head 1 for its kind, and the kinds are strewn over the video."""
    generator = torch.Generator().manual_seed(0)
    sizes = LAYOUT.frames, LAYOUT.height, LAYOUT.width
    axes = torch.meshgrid(*(torch.arange(n) / n for n in sizes), indexing="ij")
    waves = [
        f(a.flatten() * 6.28 * n / 2) for a in axes for n in (1, 2) for f in (torch.sin, torch.cos)
    ]
    around = torch.zeros(LAYOUT.tokens, 32)
    around[LAYOUT.before :][: LAYOUT.video, :12] = 4.5 * torch.stack(waves, -1)
    kind = torch.randint(0, 32, (LAYOUT.tokens,), generator=generator)
    like = 1.2 * torch.randn(32, 32, generator=generator)[kind]
    q = torch.stack([around, like])[None]
    q = q + 0.1 * torch.randn(q.shape, generator=generator)
    k = q + 0.1 * torch.randn(q.shape, generator=generator)
    return q, k, torch.randn(q.shape, generator=generator)


def test_every_head_gets_the_order_that_suits_it(two_heads):
    order, similar = find_order(TORCH, call_of(two_heads), CONFIG)
    assert similar.tolist() == [[False, True]]
    assert order.shape == (1, 2, LAYOUT.tokens) and order.dtype == torch.int32
    assert torch.equal(order[0, 0], serpentine_order(LAYOUT, order.device))
    assert torch.equal(order[0, 1], similar_order(TORCH, *two_heads[:2], LAYOUT)[0, 1])


def test_position_keeps_every_head_in_the_serpentine_order(two_heads):
    config = AdaSpaConfig(sparsity=0.8, tail="pooled", token_order="position")
    order, similar = find_order(TORCH, call_of(two_heads), config)
    assert not similar.any()
    assert torch.equal(order, serpentine_order(LAYOUT, order.device).expand(1, 2, -1))


@pytest.mark.parametrize(("token", "moves"), [(0, True), (LAYOUT.tokens - 1, True), (100, False)])
def test_a_bias_on_the_video_needs_one_order(two_heads, token, moves):
    bias = torch.zeros(1, LAYOUT.tokens)
    bias[0, token] = -2.0
    _, similar = find_order(TORCH, call_of(two_heads, bias), CONFIG)
    assert bool(similar.any()) is moves


def test_128_queries_to_a_block(two_heads):
    config = AdaSpaConfig(
        sparsity=0.8, tail="pooled", token_order="similarity", block_size="128x64"
    )
    _, similar = find_order(TORCH, call_of(two_heads), config)
    assert similar.tolist() == [[False, True]]
