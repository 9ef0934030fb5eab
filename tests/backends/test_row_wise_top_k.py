"""Every row of blocks keeps as many blocks as its head may, the best ones."""

import pytest
import torch

from sparse_attn.backends import reference
from sparse_attn.backends.torch import row_wise_top_k as module
from tests.backends.implementations import implementations

TOP_K = pytest.mark.parametrize(
    "row_wise_top_k", implementations("row_wise_top_k", "torch", "triton")
)


def scores_of(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def marked(count, *places):
    sink = torch.zeros(count, dtype=torch.bool)
    sink[list(places)] = True
    return sink


def chosen(row_wise_top_k, scores, budgets, sink_k=(), sink_q=(), masses=None, device="cpu"):
    masses = scores.abs() if masses is None else masses
    sinks = marked(scores.shape[3], *sink_k), marked(scores.shape[2], *sink_q)
    budgets = torch.tensor(budgets)
    largest = int(budgets.max())
    scores, masses, budgets, *sinks = (x.to(device) for x in (scores, masses, budgets, *sinks))
    keep, recall = row_wise_top_k(scores, masses, budgets, largest, *sinks)
    assert keep.dtype == torch.bool and keep.shape == scores.shape
    return keep.cpu(), recall.cpu()


# B, H, Nq, Nk
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 70), (1, 2, 4, 1024), (1, 1, 3, 1500)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@TOP_K
def test_matches_one_row_at_a_time(row_wise_top_k, shape, density, device):
    B, H, Nq, Nk = shape
    scores, masses = scores_of(shape), scores_of(shape, 1).exp()
    sink_k, sink_q = sorted({0, Nk - 1}), [Nq - 1]
    least = len(sink_k)
    budgets = [[max(least, round(density * Nk) - h) for h in range(H)] for _ in range(B)]
    keep, recall = chosen(row_wise_top_k, scores, budgets, sink_k, sink_q, masses, device)
    sinks = marked(Nk, *sink_k), marked(Nq, *sink_q)
    expected, held = reference.row_wise_top_k(scores, masses.double(), budgets, None, *sinks)
    assert torch.equal(keep, expected)
    torch.testing.assert_close(recall.double(), held, atol=1e-6, rtol=0)


@TOP_K
def test_keeps_the_largest_mass_possible_for_the_count(row_wise_top_k, device):
    masses = scores_of((1, 2, 9, 9), seed=4).exp()
    keep, _ = chosen(row_wise_top_k, masses, [[3, 5]], device=device)
    for h, budget in enumerate((3, 5)):
        best = masses[0, h].sort(-1, descending=True).values[:, :budget].sum()
        torch.testing.assert_close((masses[0, h] * keep[0, h]).sum(), best)


@TOP_K
def test_close_scores_are_told_apart(row_wise_top_k, device):
    # in bfloat16 all of these would tie
    scores = 1 + torch.arange(40).flip(0) * 2.0**-23
    keep, _ = chosen(row_wise_top_k, scores.expand(1, 1, 2, 40), [[7]], device=device)
    assert keep[..., :7].all() and not keep[..., 7:].any()


@TOP_K
def test_ties_do_not_change_the_counts(row_wise_top_k, device):
    scores = torch.zeros(1, 2, 3, 50)
    scores[..., 30] = 1.0
    keep, _ = chosen(row_wise_top_k, scores, [[4, 2]], [7], device=device)
    assert (keep.sum(-1) == torch.tensor([[[4], [2]]])).all()
    assert keep[..., 30].all() and keep[..., 7].all()


@pytest.mark.parametrize("row_wise_top_k", implementations("row_wise_top_k", "triton"))
def test_of_equal_scores_the_first_are_kept(row_wise_top_k, device):
    scores = torch.zeros(1, 2, 3, 50)
    scores[..., 30] = 1.0
    keep, _ = chosen(row_wise_top_k, scores, [[4, 2]], [7], device=device)
    assert keep[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 7, 30]
    assert keep[0, 1, 0].nonzero().flatten().tolist() == [7, 30]


@TOP_K
def test_nan_changes_no_count_and_shows_in_its_heads_recall(row_wise_top_k, device):
    scores = scores_of((1, 3, 4, 40))
    scores[0, 1, 2, 5] = float("nan")
    keep, recall = chosen(row_wise_top_k, scores, [[6, 6, 6]], [39], device=device)
    assert (keep.sum(-1) == 6).all() and keep[..., 39].all()
    assert recall.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@TOP_K
def test_nothing_goes_before_a_sink(row_wise_top_k, value, device):
    scores = scores_of((1, 1, 4, 40))
    scores[..., 5:20] = value
    keep, _ = chosen(row_wise_top_k, scores, [[6]], [0, 39], device=device)
    assert (keep.sum(-1) == 6).all() and keep[..., [0, 39]].all() and keep[..., 5:20].any()


@TOP_K
def test_reads_scores_that_do_not_lie_in_order(row_wise_top_k, device):
    scores = scores_of((1, 2, 60, 60))
    keep, _ = chosen(row_wise_top_k, scores.mT, [[9, 9]], device=device)
    plain, _ = chosen(row_wise_top_k, scores.mT.contiguous(), [[9, 9]], device=device)
    assert torch.equal(keep, plain)


def test_a_few_heads_at_a_time_choose_the_same(monkeypatch):
    scores, budgets = scores_of((2, 5, 13, 13)), [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]
    whole, _ = chosen(module.row_wise_top_k, scores, budgets)
    # room for two heads of five
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 2 * 20 * 2 * 13 * 13)
    assert torch.equal(chosen(module.row_wise_top_k, scores, budgets)[0], whole)


def test_the_kernel_leaves_rows_too_long_to_hold(device):
    why_not = pytest.importorskip("sparse_attn.backends.triton.row_wise_top_k").why_not
    assert why_not(torch.zeros(1, 1, 1, 8192, device=device)) is None
    said = "needs at most 8192 key blocks, got 8193"
    assert why_not(torch.zeros(1, 1, 1, 8193, device=device)) == said
    assert "needs float32 scores" in why_not(torch.zeros(1, 1, 1, 8, device=device).half())
