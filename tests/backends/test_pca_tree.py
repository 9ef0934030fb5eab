"""Median splits along the first principal component: blocks of tokens that are alike."""

import pytest
import torch

from sparse_attn.backends import reference, tiles
from sparse_attn.backends.torch import pca_tree as plain
from tests.backends.implementations import implementations

PCA_TREE = pytest.mark.parametrize("pca_tree", implementations("pca_tree", "torch", "triton"))

CASES = [
    # heads, tokens, features
    (2, 64, 35),  # one block: nothing to split
    (1, 150, 40),  # ragged; a node of one block beside a node of two
    (2, 64 * 4, 3),  # nothing ragged
]


def made(heads, tokens, number, device="cpu"):
    """Features that fall off, so that nodes have one leading direction."""
    return (torch.randn(heads, tokens, number) * 0.9 ** torch.arange(number)).to(device)


def everything(order):
    return torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand_as(order)


def spread(features, order):
    """Mean square distance of features from their block's mean."""
    moved = features.gather(1, order.long()[..., None].expand_as(features))
    apart = [x - x.mean(1, keepdim=True) for x in moved.split(64, 1)]
    return torch.cat(apart, 1).square().sum(-1).mean()


def agree(pca_tree, features):
    """With float64: equal but for numbers that rounding brings out of order."""
    order = pca_tree(features)
    other = reference.pca_tree(features.double().cpu()).to(order.device)
    assert order.dtype == torch.int32 and torch.equal(order.sort(-1).values, everything(order))
    assert (order == other).float().mean() > 0.97
    assert float(spread(features, order) / spread(features, other)) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "h{}-V{}-F{}".format(*c))
@PCA_TREE
def test_matches_float64(pca_tree, case, device):
    agree(pca_tree, made(*case, device))


# a sequence whose nodes differ in size at every level; torch sorts where the chip does not
@pytest.mark.parametrize("tokens", [64 * 11 + 3, 64 * 16])
@PCA_TREE
def test_matches_float64_where_nodes_are_large(pca_tree, tokens, device, monkeypatch):
    monkeypatch.setattr(tiles, "PCA_SORTED", 64)
    agree(pca_tree, made(2, tokens, 35, device))


@PCA_TREE
def test_equal_tokens_keep_their_order(pca_tree, device):
    order = pca_tree(torch.ones(1, 150, 5, device=device))
    assert torch.equal(order, everything(order))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("on_chip", [True, False])
@PCA_TREE
def test_numbers_that_overflow_still_give_every_token_a_place(
    pca_tree, on_chip, device, monkeypatch
):
    monkeypatch.setattr(tiles, "PCA_SORTED", 2048 if on_chip else 64)
    features = made(1, 150, 5, device)
    features[0, ::3] *= 1e37
    order = pca_tree(features)
    assert torch.equal(order.sort(-1).values, everything(order))


@PCA_TREE
def test_a_second_call_gives_the_same_order(pca_tree, device):
    features = made(2, 64 * 40 if device.type == "cuda" else 150, 35, device)
    assert torch.equal(pca_tree(features), pca_tree(features))


@pytest.mark.parametrize("workspace", [1, plain.WORKSPACE_BYTES], ids=["one head", "all heads"])
def test_the_workspace_changes_nothing(workspace, monkeypatch):
    """Of one feature with whole numbers the order is theirs, however products of heads round."""
    monkeypatch.setattr(plain, "WORKSPACE_BYTES", workspace)
    features = torch.rand(3, 150, 1).argsort(1).float()
    assert torch.equal(plain.pca_tree(features), features[..., 0].argsort(-1).int())


def test_the_kernel_leaves_more_features_than_a_program_holds(device):
    why_not = pytest.importorskip("sparse_attn.backends.triton.pca_tree").why_not
    assert why_not(torch.zeros(1, 70, 64, device=device)) is None
    said = "needs at most 64 features, got 65"
    assert why_not(torch.zeros(1, 70, 65, device=device)) == said
