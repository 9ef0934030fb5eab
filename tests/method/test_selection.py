import pytest
import torch
import torch.nn.functional as F
from close import rounding

from sparse_attn import block_mask
from sparse_attn.backends import reference
from sparse_attn.config import BLOCK_SIZES, AdaSpaConfig
from sparse_attn.method.head_adaptive import HIGH_RECALL, budget_shift
from sparse_attn.method.selection import row_budget
from sparse_attn.token_layout import TokenLayout
from tests.method import truth
from tests.method.chosen import chosen, select

LAYOUTS = [
    TokenLayout(0, 4, 8, 32),  # no text
    TokenLayout(77, 4, 8, 30),  # text first, ragged
    TokenLayout(0, 4, 8, 30, 5),  # text last
    TokenLayout(70, 4, 8, 30, 70),
    TokenLayout(0, 1, 3, 5),  # less than a block
]


def masses_of(layout, block, heads=4, batch=2, seed=0):
    """Masses with heads from concentrated to scattered, renormalised by row."""
    block_q, block_k = BLOCK_SIZES[block]
    shape = batch, heads, layout.num_blocks(block_q), layout.num_blocks(block_k)
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(1, 6, heads)[:, None, None]
    weights = torch.randn(shape, generator=generator).mul(sharpness).exp()
    return reference.renormalised(weights, layout.tokens, block_q)


def naive_select(masses, layout, config):
    """Every step in plain Python."""
    n = masses.shape[-1]
    sink_q = truth.sink_blocks(layout, config.block_q)
    sink = truth.sink_blocks(layout, config.block_k)
    budget = row_budget(config.density, n, sum(sink))
    budgets = [[budget] * masses.shape[1] for _ in masses]
    keep, _ = reference.row_wise_top_k(masses, masses, budgets, None, sink, sink_q)
    if config.head_adaptive:
        for b, video in enumerate(masses):
            held = [
                float((m * kept).sum() / m.sum()) for m, kept in zip(video, keep[b], strict=True)
            ]
            apart = [x - y for i, x in enumerate(held) for y in (*held[:i], HIGH_RECALL)]
            if budget_shift(budget, n, sum(sink)):
                # sums of masses in another order do not decide which heads give
                assert min(map(abs, apart)) > 4 * rounding(video[0].numel())
            for h, sparsity in enumerate(truth.head_sparsities(held, config.sparsity)):
                low, high = min(n, sum(sink) + 1), n
                room = min(budget // 2, budget - low, high - budget)
                moved = (sparsity < config.sparsity) - (sparsity > config.sparsity)
                budgets[b][h] = budget + moved * room
        keep, _ = reference.row_wise_top_k(masses, masses, budgets, None, sink, sink_q)
    return keep, budgets, sink_q, sink


@pytest.mark.parametrize("head_adaptive", [False, True], ids=["uniform", "head-adaptive"])
@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.describe())
def test_matches_the_naive_selection(layout, block, head_adaptive):
    masses = masses_of(layout, block)
    config = AdaSpaConfig(sparsity=0.6, block_size=block, head_adaptive=head_adaptive)
    keep, held = chosen(masses, layout, config)
    expected, budgets, sink_q, sink = naive_select(masses, layout, config)
    assert torch.equal(keep, expected)
    video = [not s for s in sink_q]
    counts = keep.sum(-1)[:, :, video]
    assert (counts == torch.tensor(budgets)[..., None]).all()
    assert keep[..., sink].all() and keep[..., sink_q, :].all()
    exact = (masses.double() * keep).sum((-1, -2)) / masses.double().sum((-1, -2))
    torch.testing.assert_close(held.double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("head_adaptive", [False, True], ids=["uniform", "head-adaptive"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.describe())
def test_scores_rank_and_masses_tell_the_recall(layout, head_adaptive):
    masses, scores = masses_of(layout, "64"), masses_of(layout, "64", seed=1)
    config = AdaSpaConfig(sparsity=0.6, head_adaptive=head_adaptive)
    keep, held = chosen(masses, layout, config, scores)
    exact = (masses.double() * keep).sum((-1, -2)) / masses.double().sum((-1, -2))
    torch.testing.assert_close(held.double(), exact, atol=1e-6, rtol=0)
    if not head_adaptive:
        # heads that share out blocks do so by the recall of their masses
        assert torch.equal(keep, chosen(scores, layout, config)[0])


@pytest.mark.parametrize("head_adaptive", [False, True], ids=["uniform", "head-adaptive"])
@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=lambda x: x.describe())
def test_blocks_are_chosen_in_twos_where_there_are_many(monkeypatch, layout, head_adaptive):
    masses = masses_of(layout, "64")
    rows = masses.shape[-1]
    summed = F.pad(masses, (0, rows % 2, 0, rows % 2))
    summed = summed.unflatten(-1, (-1, 2)).sum(-1).unflatten(-2, (-1, 2)).sum(-2)
    config = AdaSpaConfig(sparsity=0.6, head_adaptive=head_adaptive)
    twice = AdaSpaConfig(sparsity=0.6, head_adaptive=head_adaptive, block_size="128", tail="none")
    expected = naive_select(summed, layout, twice)[0]
    monkeypatch.setattr(block_mask, "MOST_PAIRS", (-(-rows // 2)) ** 2)
    keep, held = chosen(masses, layout, config)
    assert torch.equal(keep, expected)
    # scores rank, and masses tell the recall
    again, told = chosen(torch.rand_like(masses), layout, config, masses)
    assert head_adaptive or torch.equal(again, keep)
    assert not torch.equal(told, held)


def test_a_recall_asked_for_is_ranked_by_mass():
    layout, config = LAYOUTS[1], AdaSpaConfig(recall=0.8)
    masses, scores = masses_of(layout, "64"), masses_of(layout, "64", seed=1)
    keep, held = chosen(masses, layout, config, scores)
    assert torch.equal(keep, chosen(masses, layout, config)[0]) and (held >= 0.8).all()


def test_head_adaptive_moves_blocks_and_leaves_the_mean_sparsity():
    layout = TokenLayout(0, 8, 16, 40)
    masses = masses_of(layout, "64")
    uniform, _ = chosen(masses, layout, AdaSpaConfig(sparsity=0.8))
    moved, _ = chosen(masses, layout, AdaSpaConfig(sparsity=0.8, head_adaptive=True))
    assert not torch.equal(uniform, moved)
    assert uniform.sum() == moved.sum() and uniform[0].sum() == moved[0].sum()
    # the sharpest head gives, the flattest takes
    assert moved[0, 3].sum() < uniform[0, 3].sum() and moved[0, 0].sum() > uniform[0, 0].sum()


def test_zero_sparsity_keeps_every_block():
    layout = LAYOUTS[1]
    keep, held = chosen(masses_of(layout, "64"), layout, AdaSpaConfig(sparsity=0.0))
    assert keep.all()
    torch.testing.assert_close(held, torch.ones_like(held))


def test_nan_in_one_head_shows_in_its_recall_alone():
    layout = LAYOUTS[0]
    masses = masses_of(layout, "64")
    masses[1, 2, 3, 4] = float("nan")
    keep, held = chosen(masses, layout, AdaSpaConfig(sparsity=0.8))
    assert held.isnan().nonzero().tolist() == [[1, 2]]
    assert (keep.sum(-1) == keep[0, 0, 0].sum()).all()


def test_a_mask_knows_its_block_sizes():
    layout = LAYOUTS[3]
    config = AdaSpaConfig(sparsity=0.7, block_size="128x64")
    masses = masses_of(layout, "128x64")
    mask, _ = select(masses, layout, config)
    assert (mask.block_q, mask.block_k, mask.num_k) == (128, 64, masses.shape[-1])


BUDGETS = [
    # density, key blocks, sinks, budget
    (0.2, 130, 0, 26),
    (0.2, 130, 4, 26),  # the sinks count as kept
    (0.2, 130, 26, 27),  # at least one block beside the sinks
    (0.2, 130, 130, 130),
    (0.02, 10, 0, 1),  # never nothing
    (1.0, 10, 3, 10),
    (0.3, 1, 0, 1),
]


@pytest.mark.parametrize("density, num_k, sinks, budget", BUDGETS)
def test_budget_holds_the_sinks_and_one_more(density, num_k, sinks, budget):
    assert row_budget(density, num_k, sinks) == budget
