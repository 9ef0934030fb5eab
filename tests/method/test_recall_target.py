"""A recall asked for, against trying every budget in float64."""

import pytest
import torch

from sparse_attn.backends import reference
from sparse_attn.backends.choice import plain_torch
from sparse_attn.block_mask import recall
from sparse_attn.config import BLOCK_SIZES, AdaSpaConfig
from sparse_attn.method import recall_target as row_wise_recall
from sparse_attn.token_layout import TokenLayout
from tests.method import truth
from tests.method.chosen import chosen

TORCH = plain_torch()
LAYOUTS = [
    TokenLayout(0, 4, 8, 32),  # no text
    TokenLayout(77, 4, 8, 30),  # text first, ragged
    TokenLayout(70, 4, 8, 30, 70),  # text on both sides
    TokenLayout(0, 1, 3, 5),  # less than a block
]


def masses_of(layout, block="64", heads=4, batch=2):
    """Masses with heads from scattered to concentrated, renormalised by row."""
    block_q, block_k = BLOCK_SIZES[block]
    shape = batch, heads, layout.num_blocks(block_q), layout.num_blocks(block_k)
    sharpness = torch.linspace(0.3, 4, heads)[:, None, None]
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(sharpness).exp()
    return reference.renormalised(weights, layout.tokens, block_q)


def held_by(masses, keep):
    return (masses.double() * keep).sum((-1, -2)) / masses.double().sum((-1, -2))


def fewest(head, request, sink_q, sink_k):
    """(budget, blocks) of the head's rows: one block more in every row, then in as few as needed."""
    head, Nk = head[None, None].double(), head.shape[-1]
    least, before = min(sum(sink_k) + 1, Nk), None
    for budget in range(least, Nk + 1):
        keep, _ = reference.row_wise_top_k(head, head, [[budget]], None, sink_k, sink_q)
        if held_by(head, keep) >= request or budget == Nk:
            break
        before = keep
    if budget == least:
        return budget, keep.sum().item()
    added = sorted((head * (keep & ~before)).sum(-1).flatten().tolist(), reverse=True)
    held, blocks = (head * before).sum().item(), before.sum().item()
    while held < request * head.sum().item():
        held, blocks = held + added.pop(0), blocks + 1
    return budget, blocks


@pytest.mark.parametrize("request_", [0.1, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.describe())
def test_every_head_gets_the_fewest_blocks_that_hold_the_recall(layout, block, request_):
    config = AdaSpaConfig(recall=request_, block_size=block)
    masses = masses_of(layout, block)
    sink_q = truth.sink_blocks(layout, config.block_q)
    sink_k = truth.sink_blocks(layout, config.block_k)
    keep, held = chosen(masses, layout, config)
    assert (held_by(masses, keep) >= request_).all()
    video = [not s for s in sink_q]
    for b in range(2):
        for h in range(4):
            budget, blocks = fewest(masses[b, h], request_, sink_q, sink_k)
            rows = keep[b, h].sum(-1)[video]
            assert ((rows == budget) | (rows == budget - 1)).all()
            # rounding may cost a block
            assert 0 <= keep[b, h].sum() - blocks <= 1
            head = masses[b : b + 1, h : h + 1]
            uniform, _ = reference.row_wise_top_k(head, head, [[budget]], None, sink_k, sink_q)
            assert not (keep[b, h] & ~uniform[0, 0]).any()
    torch.testing.assert_close(held.double(), held_by(masses, keep), atol=1e-6, rtol=0)
    assert keep[..., sink_k].all() and keep[..., sink_q, :].all()


def test_at_many_blocks_the_recall_is_at_most_a_hundredth_above_the_request():
    layout = TokenLayout(226, 13, 30, 45)
    masses = masses_of(layout, batch=1)
    for request in (0.8, 0.9, 0.95):
        keep, held = chosen(masses, layout, AdaSpaConfig(recall=request))
        assert (held >= request).all() and (held <= request + 0.001).all()
        # concentrated heads need fewer blocks
        assert (keep[0].sum((-1, -2)).diff() < 0).all()


def test_nan_in_one_head_shows_in_its_recall_alone():
    layout = LAYOUTS[0]
    masses = masses_of(layout)
    clean, _ = chosen(masses, layout, AdaSpaConfig(recall=0.9))
    masses[1, 2, 3, 4] = float("nan")
    keep, held = chosen(masses, layout, AdaSpaConfig(recall=0.9))
    assert held.isnan().nonzero().tolist() == [[1, 2]]
    sound = ~held.isnan()
    assert torch.equal(keep[sound], clean[sound])


def test_a_few_heads_at_a_time_choose_the_same(monkeypatch):
    # whole numbers, all different: their sums are exact in any order
    masses = torch.randperm(2 * 5 * 16 * 16).float().view(2, 5, 16, 16)
    nothing = torch.zeros(16, dtype=torch.bool)
    whole = row_wise_recall.row_wise_recall(masses, 0.9, 1, nothing, nothing)
    # room for two heads of five
    monkeypatch.setattr(row_wise_recall, "WORKSPACE_BYTES", 2 * 32 * 2 * 16 * 16)
    parts = row_wise_recall.row_wise_recall(masses, 0.9, 1, nothing, nothing)
    assert torch.equal(parts, whole)


def test_equal_masses_keep_the_share_that_was_asked_for():
    masses, nothing = torch.ones(1, 2, 20, 20), torch.zeros(20, dtype=torch.bool)
    keep = row_wise_recall.row_wise_recall(masses, 0.6, 1, nothing, nothing)
    # 12 of 20 hold 0.6 exactly, which rounding may take for a little less
    assert (keep.sum((-1, -2)) - 240 <= 1).all()
    assert (recall(masses, keep) >= 0.6 - 1e-6).all()
