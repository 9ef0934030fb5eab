import pytest
import torch

from sparse_attn.backends import reference
from sparse_attn.backends.torch import row_wise_top_k
from sparse_attn.backends.torch.row_wise_top_k import row_budget

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


def random_scores(B=2, H=3, N=13, seed=0):
    return torch.rand(B, H, N, N, generator=torch.Generator().manual_seed(seed))


SINKS = [(), (0,), (12,), (0, 1, 12), tuple(range(13))]


@pytest.mark.parametrize("sinks", SINKS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_matches_one_row_at_a_time(sinks, seed):
    scores = random_scores(seed=seed)
    sink = torch.zeros(13, dtype=torch.bool)
    sink[list(sinks)] = True
    budgets = torch.tensor([[5, 6, 13], [4, 13, 7]]).clamp(min=len(sinks))
    keep = row_wise_top_k.row_wise_top_k(scores, budgets, 13, sink)
    assert torch.equal(keep, reference.row_wise_top_k(scores, budgets.tolist(), sink))


def test_every_video_row_keeps_exactly_its_heads_budget_and_sinks_everything():
    sink = torch.zeros(13, dtype=torch.bool)
    sink[[0, 12]] = True
    budgets = torch.tensor([[3, 5, 9], [12, 4, 3]])
    keep = row_wise_top_k.row_wise_top_k(random_scores(), budgets, 12, sink)
    counts = keep.sum(-1)
    assert (counts[:, :, ~sink] == budgets[..., None]).all()
    assert (counts[:, :, sink] == 13).all()
    assert keep[..., sink].all()


def test_keeps_the_largest_mass_possible_for_the_count():
    masses = random_scores(1, 2, 9, seed=4) ** 4
    budgets = torch.tensor([[3, 5]])
    keep = row_wise_top_k.row_wise_top_k(masses, budgets, 5, torch.zeros(9, dtype=torch.bool))
    for h in range(2):
        best = masses[0, h].sort(-1, descending=True).values[:, : budgets[0, h]].sum()
        torch.testing.assert_close((masses[0, h] * keep[0, h]).sum(), best)


def test_ties_do_not_change_the_counts():
    scores = torch.zeros(1, 2, 13, 13)
    scores[..., 3] = 1.0
    sink = torch.zeros(13, dtype=torch.bool)
    sink[7] = True
    keep = row_wise_top_k.row_wise_top_k(scores, torch.tensor([[4, 2]]), 4, sink)
    assert (keep.sum(-1)[:, :, ~sink] == torch.tensor([[[4], [2]]])).all()
    assert keep[..., 3].all() and keep[..., 7].all()


def test_nan_does_not_change_the_counts():
    scores = random_scores()
    scores[0, 0, 2, 5] = float("nan")
    scores[1, 1] = float("nan")
    budgets = torch.full((2, 3), 4)
    keep = row_wise_top_k.row_wise_top_k(scores, budgets, 4, torch.zeros(13, dtype=torch.bool))
    assert (keep.sum(-1) == 4).all()


def test_close_scores_are_told_apart_in_float32():
    # in bfloat16 all of these would tie
    scores = 1 + torch.arange(13.0).flip(0) * 1e-4
    keep = row_wise_top_k.row_wise_top_k(
        scores.expand(1, 1, 13, 13), torch.tensor([[3]]), 3, torch.zeros(13, dtype=torch.bool)
    )
    assert keep[..., :3].all() and not keep[..., 3:].any()


def test_a_few_heads_at_a_time_choose_the_same(monkeypatch):
    scores, sink = random_scores(H=5), torch.zeros(13, dtype=torch.bool)
    budgets = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    whole = row_wise_top_k.row_wise_top_k(scores, budgets, 5, sink)
    # room for two heads of five
    monkeypatch.setattr(row_wise_top_k, "WORKSPACE_BYTES", 2 * 20 * 2 * 13 * 13)
    assert torch.equal(row_wise_top_k.row_wise_top_k(scores, budgets, 5, sink), whole)
