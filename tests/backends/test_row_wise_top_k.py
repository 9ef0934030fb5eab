import pytest
import torch

from sparse_attn.backends import reference
from sparse_attn.backends.torch import row_wise_top_k as module
from sparse_attn.block_mask import recall


def chosen(scores, budgets, largest_budget, sink):
    """What is kept; the mass is the score, and the recall that of what is kept."""
    keep, held = module.row_wise_top_k(scores, scores, budgets, largest_budget, sink, sink)
    torch.testing.assert_close(held, recall(scores, keep), equal_nan=True)
    return keep


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
    keep = chosen(scores, budgets, 13, sink)
    assert torch.equal(keep, reference.row_wise_top_k(scores, budgets.tolist(), sink))


def test_every_video_row_keeps_exactly_its_heads_budget_and_sinks_everything():
    sink = torch.zeros(13, dtype=torch.bool)
    sink[[0, 12]] = True
    budgets = torch.tensor([[3, 5, 9], [12, 4, 3]])
    keep = chosen(random_scores(), budgets, 12, sink)
    counts = keep.sum(-1)
    assert (counts[:, :, ~sink] == budgets[..., None]).all()
    assert (counts[:, :, sink] == 13).all()
    assert keep[..., sink].all()


def test_keeps_the_largest_mass_possible_for_the_count():
    masses = random_scores(1, 2, 9, seed=4) ** 4
    budgets = torch.tensor([[3, 5]])
    keep = chosen(masses, budgets, 5, torch.zeros(9, dtype=torch.bool))
    for h in range(2):
        best = masses[0, h].sort(-1, descending=True).values[:, : budgets[0, h]].sum()
        torch.testing.assert_close((masses[0, h] * keep[0, h]).sum(), best)


def test_ties_do_not_change_the_counts():
    scores = torch.zeros(1, 2, 13, 13)
    scores[..., 3] = 1.0
    sink = torch.zeros(13, dtype=torch.bool)
    sink[7] = True
    keep = chosen(scores, torch.tensor([[4, 2]]), 4, sink)
    assert (keep.sum(-1)[:, :, ~sink] == torch.tensor([[[4], [2]]])).all()
    assert keep[..., 3].all() and keep[..., 7].all()


def test_nan_does_not_change_the_counts():
    scores = random_scores()
    scores[0, 0, 2, 5] = float("nan")
    scores[1, 1] = float("nan")
    budgets = torch.full((2, 3), 4)
    keep = chosen(scores, budgets, 4, torch.zeros(13, dtype=torch.bool))
    assert (keep.sum(-1) == 4).all()


def test_close_scores_are_told_apart_in_float32():
    # in bfloat16 all of these would tie
    scores = 1 + torch.arange(13.0).flip(0) * 1e-4
    keep = chosen(
        scores.expand(1, 1, 13, 13), torch.tensor([[3]]), 3, torch.zeros(13, dtype=torch.bool)
    )
    assert keep[..., :3].all() and not keep[..., 3:].any()


def test_a_few_heads_at_a_time_choose_the_same(monkeypatch):
    scores, sink = random_scores(H=5), torch.zeros(13, dtype=torch.bool)
    budgets = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    whole = chosen(scores, budgets, 5, sink)
    # room for two heads of five
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 2 * 20 * 2 * 13 * 13)
    assert torch.equal(chosen(scores, budgets, 5, sink), whole)
