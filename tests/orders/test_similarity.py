"""Similar order: a permutation that leaves extra tokens alone, balanced, stable and good."""

from dataclasses import replace

import pytest
import torch

from sparse_attn.backends.choice import choose, plain_torch
from sparse_attn.backends.torch.features import features as torch_features
from sparse_attn.backends.torch.pca_tree import pca_tree as torch_pca_tree
from sparse_attn.orders import similarity as module
from sparse_attn.orders.similarity import similar_order
from sparse_attn.token_layout import TokenLayout

TORCH = plain_torch()
LAYOUT = TokenLayout(before=5, frames=5, height=9, width=14, after=20)


def tensors(layout, heads=3, batch=2, dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, heads, layout.tokens, dim
    return (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


def clustered(layout, kinds: int, seed=0):
    """q and k of tokens of `kinds` kinds, the kinds strewn over the video, and the kinds."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(layout.tokens) % kinds
    kind = kind[torch.randperm(layout.tokens, generator=generator)]
    sides = []
    for _ in range(2):
        centres = torch.randn(1, 1, kinds, 32, generator=generator)
        noise = torch.randn(1, 1, layout.tokens, 32, generator=generator)
        sides.append(centres[:, :, kind] + 0.05 * noise)
    return *sides, kind


@pytest.mark.parametrize(
    "layout",
    [LAYOUT, TokenLayout(0, 4, 8, 8), TokenLayout(0, 1, 3, 5), TokenLayout(64, 3, 7, 7, 64)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_token_has_one_place_and_extra_tokens_lie_behind(layout, dtype):
    q, k = (x.to(dtype) for x in tensors(layout))
    order = similar_order(TORCH, q, k, layout)
    assert order.shape == q.shape[:3] and order.dtype == torch.int32
    everything = torch.arange(layout.tokens, dtype=torch.int32).expand_as(order)
    assert torch.equal(order.sort(-1).values, everything)
    after = layout.before + layout.video
    extra = [*range(layout.before), *range(after, layout.tokens)]
    assert order[..., layout.video :].flatten(0, 1).tolist() == [extra] * 6


def test_a_block_holds_tokens_of_one_kind():
    layout = TokenLayout(0, 8, 8, 16)
    q, k, kind = clustered(layout, kinds=16)
    blocks = kind[similar_order(TORCH, q, k, layout)[0, 0].long()].unflatten(0, (-1, 64))
    assert (blocks == blocks.mode(-1, keepdim=True).values).float().mean() > 0.75


def test_heads_are_ordered_one_by_one(monkeypatch):
    # room for one head: batched products promise no equal bits at other places of the batch
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 1)
    layout = TokenLayout(0, 4, 8, 16)
    q, k = tensors(layout, heads=4, batch=1)
    order = similar_order(TORCH, q, k, layout)
    assert torch.equal(similar_order(TORCH, q.flip(1), k.flip(1), layout), order.flip(1))
    assert not torch.equal(order[:, 0], order[:, 1])


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_as_many_heads_are_ordered_at_once_as_the_workspace_holds(heads, monkeypatch):
    """By one feature, a token's number in some order: no rounding can change who is larger."""
    numbers = torch.rand(2, 3, LAYOUT.tokens, 1).argsort(2).float()
    asked = []

    def features(backend, q, k, places):
        asked.append(q.shape[1])
        return q

    monkeypatch.setattr(module, "_features", features)
    columns = 2 * module.DIRECTIONS + module.PLACE_COLUMNS
    monkeypatch.setattr(module, "WORKSPACE_BYTES", heads * LAYOUT.video * columns * 4)
    order = similar_order(TORCH, numbers, numbers, LAYOUT)
    video = slice(LAYOUT.before, LAYOUT.before + LAYOUT.video)
    expected = numbers[:, :, video, 0].argsort(-1) + LAYOUT.before
    assert torch.equal(order[..., : LAYOUT.video], expected.int())
    assert asked == 2 * {1: [1, 1, 1], 2: [2, 1], 3: [3]}[heads]


def test_an_offset_that_all_keys_share_changes_little():
    layout = TokenLayout(0, 8, 8, 16)
    q, k, kind = clustered(layout, kinds=16)
    order = similar_order(TORCH, q, k + 50.0, layout)
    blocks = kind[order[0, 0].long()].unflatten(0, (-1, 64))
    assert (blocks == blocks.mode(-1, keepdim=True).values).float().mean() > 0.75


def test_place_decides_between_equal_tokens():
    layout = TokenLayout(0, 8, 8, 16)
    q, k = (torch.ones(1, 1, layout.tokens, 32) for _ in range(2))
    frames = similar_order(TORCH, q, k, layout)[0, 0].unflatten(0, (-1, 64)).long() // 128
    columns = similar_order(TORCH, q, k, layout)[0, 0].unflatten(0, (-1, 64)).long() % 16
    assert float(frames.float().std(-1).mean()) < 1.5
    assert float(columns.float().std(-1).mean()) < 3.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_bad_numbers_still_give_every_token_a_place(bad):
    q, k = tensors(LAYOUT, batch=1)
    k[0, 1] = bad
    q[0, 2, 7, 3] = bad
    order = similar_order(TORCH, q, k, LAYOUT)
    everything = torch.arange(LAYOUT.tokens, dtype=torch.int32).expand_as(order)
    assert torch.equal(order.sort(-1).values, everything)


def apart(x, order):
    """Mean square distance of tokens from the mean of their block."""
    blocks = x.gather(2, order.long()[..., None].expand_as(x)).unflatten(2, (-1, 64)).float()
    return float((blocks - blocks.mean(-2, keepdim=True)).square().sum(-1).mean())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_find_blocks_as_alike_as_plain_torch_does(dim):
    layout = TokenLayout(0, 8, 16, 64)
    kind = torch.randint(0, 32, (layout.tokens,))
    q, k = (
        (torch.randn(1, 4, 32, dim)[:, :, kind] + torch.randn(1, 4, layout.tokens, dim) / 2)
        .bfloat16()
        .cuda()
        for _ in range(2)
    )
    backend, _ = choose(q, k, k, 64, 64)
    assert backend.name == "Triton kernels"
    order = similar_order(backend, q, k, layout)
    plain = similar_order(
        replace(backend, features=torch_features, pca_tree=torch_pca_tree), q, k, layout
    )
    # rounding tells near ties apart otherwise, and the next halves differ
    assert apart(k, order) == pytest.approx(apart(k, plain), rel=0.02)
    assert apart(q, order) == pytest.approx(apart(q, plain), rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_runs_on_a_gpu_agree():
    q, k = (x.cuda().bfloat16() for x in tensors(TokenLayout(0, 9, 30, 40), heads=8, dim=64))
    order = similar_order(TORCH, q, k, TokenLayout(0, 9, 30, 40))
    assert torch.equal(order, similar_order(TORCH, q, k, TokenLayout(0, 9, 30, 40)))
