import pytest
import torch

from sparse_attn.method.head_adaptive import budget_shift, moved_heads
from tests.method import truth

RECALLS = [
    ([0.9, 0.7, 0.95, 0.3], "two above, two give to two"),
    ([0.9, 0.91, 0.92, 0.93], "all above, half of them give"),
    ([0.1, 0.2, 0.3, 0.4], "none above, nothing moves"),
    ([0.9, 0.85, 0.99, 0.2, 0.81], "four above of five: two give, one stays"),
    ([0.9], "a single head has no partner"),
    ([0.8, 0.8, 0.8001, 0.1], "exactly 0.8 is not above"),
    ([0.9, 0.9, 0.9, 0.9, 0.1, 0.1], "ties"),
]


def head_budgets(recall, budget, shift):
    """[B, H], key blocks per row of every head."""
    return budget + shift * moved_heads(recall)


@pytest.mark.parametrize("recalls, why", RECALLS, ids=lambda x: str(x)[:30])
@pytest.mark.parametrize("sparsity", [0.8, 0.5, 0.9, 1 / 3])
@pytest.mark.parametrize("num_k", [130, 67])
def test_is_the_papers_formula_within_a_block(recalls, why, sparsity, num_k):
    budget = round((1 - sparsity) * num_k)
    shift = budget_shift(budget, num_k, 0)
    found = head_budgets(torch.tensor([recalls]), budget, shift)[0].tolist()
    exact = [(1 - s) * num_k for s in truth.head_sparsities(recalls, sparsity)]
    assert all(abs(f - e) <= 1.5 for f, e in zip(found, exact, strict=True)), (found, exact)
    assert sum(found) == len(recalls) * budget


@pytest.mark.parametrize("heads", [1, 2, 3, 24])
@pytest.mark.parametrize("seed", range(4))
def test_sum_over_heads_never_changes(heads, seed):
    generator = torch.Generator().manual_seed(seed)
    recalls = torch.rand(3, heads, generator=generator) * 0.5 + 0.5
    budgets = head_budgets(recalls, 26, 13)
    assert budgets.dtype == torch.int64
    assert (budgets.sum(-1) == heads * 26).all()


def test_concentrated_heads_give_to_scattered_ones():
    budgets = head_budgets(torch.tensor([[0.9, 0.7, 0.95, 0.3]]), 26, 13)
    assert budgets.tolist() == [[13, 39, 13, 39]]


def test_every_row_of_the_batch_has_its_own_order():
    budgets = head_budgets(torch.tensor([[0.9, 0.1], [0.1, 0.9]]), 10, 5)
    assert budgets.tolist() == [[5, 15], [15, 5]]


@pytest.mark.parametrize("num_k", [1, 5, 40, 130])
@pytest.mark.parametrize("num_sinks", [0, 1, 4, 39])
def test_budgets_stay_between_the_sinks_and_all_blocks(num_k, num_sinks):
    for budget in range(min(num_k, num_sinks + 1), num_k + 1):
        shift = budget_shift(budget, num_k, num_sinks)
        assert shift >= 0
        assert budget + shift <= num_k
        assert budget - shift >= min(num_k, num_sinks + 1)


def test_a_head_moves_by_half_of_its_blocks_where_there_is_room():
    assert budget_shift(26, 130, 0) == 13
    assert budget_shift(26, 130, 4) == 13
    assert budget_shift(26, 130, 20) == 5  # the sinks and one more stay
    assert budget_shift(26, 30, 0) == 4  # no more than all blocks


def test_nan_recall_moves_nothing_out_of_range():
    budgets = head_budgets(torch.tensor([[float("nan"), 0.9, 0.95, 0.2]]), 26, 13)
    assert budgets.sum() == 4 * 26 and ((budgets >= 13) & (budgets <= 39)).all()
