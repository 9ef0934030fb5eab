import pytest
import torch

from sparse_attn.backends import reference
from sparse_attn.block_mask import BlockMask, recall
from sparse_attn.call import Call
from sparse_attn.method.recall import sample_rows, sampled_recall
from tests.method import truth


@pytest.mark.parametrize("length, block", [(256, 64), (200, 64), (300, 128)])
def test_equals_the_token_by_token_share(length, block):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, length, 16, dtype=torch.float64)
    n = -(-length // block)
    keep = torch.rand(2, 3, n, n) < 0.5
    options = {"block_q": block, "block_k": block, "scale": 0.25}
    lse = reference.scaled_logits(q, k, 0.25).logsumexp(-1)
    masses = reference.block_masses(q, k, lse, **options).float()
    exact = truth.recall(q, k, keep, **options)
    torch.testing.assert_close(recall(masses, keep).double(), exact, atol=1e-6, rtol=0)


def test_all_blocks_recall_everything_and_none_nothing():
    masses = torch.rand(1, 2, 5, 5)
    keep = torch.zeros(1, 2, 5, 5, dtype=torch.bool)
    keep[:, 1] = True
    torch.testing.assert_close(recall(masses, keep), torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("ordered", [False, True], ids=["as it came", "in another order"])
def test_a_sample_of_all_rows_is_the_recall(ordered):
    q, k = torch.randn(2, 2, 3, 200, 16)
    bias = torch.randn(2, 200)
    bias[1, 150:] = -1e30
    keep = torch.rand(2, 3, 4, 4) < 0.5
    mask = BlockMask.from_dense(keep, block_q=64, block_k=64)
    order = torch.rand(2, 3, 200).argsort(-1).int() if ordered else None
    if ordered:
        bias.zero_()
    call = Call(q, k, None, 0.25, None, step=0, dense=None, key_bias=bias)
    found = sampled_recall(call, mask, list(range(200)), order)
    if ordered:
        q, k = (reference.in_order(x, order) for x in (q, k))
    exact = truth.recall(
        q.double(), k.double(), keep, block_q=64, block_k=64, scale=0.25, key_bias=bias.double()
    )
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)
    assert len(sample_rows(200, 64)) == 64


def test_nan_is_not_hidden_by_a_dropped_block():
    masses = torch.ones(1, 2, 3, 3)
    masses[0, 0, 1, 1] = float("nan")
    keep = torch.eye(3, dtype=torch.bool).logical_not().expand(1, 2, 3, 3)
    held = recall(masses, keep)
    assert held[0, 0].isnan() and held[0, 1] == pytest.approx(2 / 3)


def test_a_sample_reaches_the_whole_video_and_keeps_no_step_with_its_lines():
    rows = sample_rows(75_600, 64)
    assert len(rows) == 64 and rows == sorted(set(rows))
    gaps = [b - a for a, b in zip([0, *rows], [*rows, 75_600], strict=True)]
    assert max(gaps) < 2 * 75_600 / 64
    # lines of 80 tokens: even steps of 1,280 would meet one column of them
    assert len({row % 80 for row in sample_rows(64 * 1280, 64)}) > 15
    assert sample_rows(10, 64)[-1] < 10
