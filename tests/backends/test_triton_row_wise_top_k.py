import pytest
import torch

pytest.importorskip("triton")

from sparse_attn.backends import reference
from sparse_attn.backends.triton.row_wise_top_k import MAX_BLOCKS, row_wise_top_k


def scores_of(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def marked(count, *places):
    sink = torch.zeros(count, dtype=torch.bool)
    sink[list(places)] = True
    return sink


def chosen(scores, budgets, sink_k=(), sink_q=(), masses=None, device="cpu"):
    masses = scores.abs() if masses is None else masses
    sinks = marked(scores.shape[3], *sink_k), marked(scores.shape[2], *sink_q)
    scores, masses, budgets, *sinks = (
        x.to(device) for x in (scores, masses, torch.tensor(budgets), *sinks)
    )
    keep, recall = row_wise_top_k(scores, masses, budgets, int(budgets.max()), *sinks)
    assert keep.dtype == torch.bool and keep.shape == scores.shape
    return keep.cpu(), recall.cpu()


# B, H, Nq, Nk
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 70), (1, 2, 4, 1024), (1, 1, 3, 1500)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_matches_one_row_at_a_time(shape, density, device):
    B, H, Nq, Nk = shape
    scores, masses = scores_of(shape), scores_of(shape, 1).exp()
    sink_k, sink_q = sorted({0, Nk - 1}), [Nq - 1]
    least = len(sink_k)
    budgets = [[max(least, round(density * Nk) - h) for h in range(H)] for _ in range(B)]
    keep, recall = chosen(scores, budgets, sink_k, sink_q, masses, device)
    sinks = marked(Nk, *sink_k), marked(Nq, *sink_q)
    assert torch.equal(keep, reference.row_wise_top_k(scores, budgets, *sinks))
    exact = (masses.double() * keep).sum((-1, -2)) / masses.double().sum((-1, -2))
    torch.testing.assert_close(recall.double(), exact, atol=1e-6, rtol=0)


def test_close_scores_are_told_apart(device):
    scores = 1 + torch.arange(40).flip(0) * 2.0**-23
    keep, _ = chosen(scores.expand(1, 1, 2, 40), [[7]], device=device)
    assert keep[..., :7].all() and not keep[..., 7:].any()


def test_of_equal_scores_the_first_are_kept(device):
    scores = torch.zeros(1, 2, 3, 50)
    scores[..., 30] = 1.0
    keep, _ = chosen(scores, [[4, 2]], [7], device=device)
    assert keep[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 7, 30]
    assert keep[0, 1, 0].nonzero().flatten().tolist() == [7, 30]


def test_nan_changes_no_count_and_shows_in_its_heads_recall(device):
    scores = scores_of((1, 3, 4, 40))
    scores[0, 1, 2, 5] = float("nan")
    keep, recall = chosen(scores, [[6, 6, 6]], [39], device=device)
    assert (keep.sum(-1) == 6).all() and keep[..., 39].all()
    assert recall.isnan().tolist() == [[False, True, False]]


def test_reads_scores_that_do_not_lie_in_order(device):
    scores = scores_of((1, 2, 60, 60))
    keep, _ = chosen(scores.mT, [[9, 9]], device=device)
    assert torch.equal(keep, chosen(scores.mT.contiguous(), [[9, 9]], device=device)[0])


def test_refuses_rows_too_long_to_hold(device):
    scores = torch.zeros(1, 1, 1, MAX_BLOCKS + 1)
    with pytest.raises(ValueError, match="needs at most 8192 key blocks, got 8193"):
        chosen(scores, [[1]], device=device)
