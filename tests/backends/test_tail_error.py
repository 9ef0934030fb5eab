"""What a pooled tail gets wrong about a block that a row does not keep."""

import pytest
import torch
from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.backends.torch import tail_error as module
from sparse_attn.backends.torch.tail_error import deviation
from tests.backends import inputs
from tests.backends.implementations import implementations

TAIL_ERROR = pytest.mark.parametrize("tail_error", implementations("tail_error", "torch", "triton"))
SCALE = 0.25
# tokens: a short last block, whole blocks only, less than a block
LENGTHS = [344, 320, 10]


def found_by(tokens, block_q, dtype=torch.bfloat16, dim=64, device="cpu"):
    """Masses, pooled masses, values and their means of random tokens."""
    q, k, v = torch.randn(3, 2, 3, tokens, dim, device=device).to(dtype)
    # a few keys stand out, so that means miss much
    k[:, :, ::29] *= 4
    means = reference.permute(q, k, v, inputs.random_orders(2, 3, tokens, device))
    q, k, v, pooled = means.q, means.k, means.v, means.pooled
    _, lse = inputs.exact_attention(q, k, v, SCALE)
    masses = inputs.exact_masses(q, k, lse, SCALE, block_q, 64)
    pooled_masses = reference.pooled_masses(
        q.double(), pooled.k_mean.double(), pooled.log_sizes.double(), lse,
        block_q=block_q, scale=SCALE,
    )  # fmt: skip
    # the last mean key stands for more than its keys weigh
    pooled_masses[:, 0, :, -1] *= 3
    return masses.float(), pooled_masses.float(), v, pooled.v_mean


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_q, dim", [(64, 128), (128, 64)])
@pytest.mark.parametrize("tokens", LENGTHS)
@TAIL_ERROR
def test_matches_the_definition_in_float64(tail_error, tokens, block_q, dim, dtype, device):
    masses, pooled, v, v_mean = found_by(tokens, block_q, dtype, dim, device)
    exact = reference.tail_error(*(x.double() for x in (masses, pooled, v, v_mean)))
    before, given = masses.clone(), pooled.clone()
    scores = tail_error(masses, given, v, v_mean)
    # distances of mean values are roots of differences of squares, in float32
    assert_within("scores", scores, exact, 1e-3 * exact.max().item())
    assert scores.data_ptr() == given.data_ptr(), "takes the memory of the pooled masses"
    assert torch.equal(masses, before)


def test_a_few_heads_at_a_time_score_the_same(monkeypatch):
    masses, pooled, v, v_mean = found_by(LENGTHS[0], 64)
    whole = module.tail_error(masses, pooled.clone(), v, v_mean)
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 1)
    some = module.tail_error(masses, pooled.clone(), v, v_mean)
    assert_within("scores", some, whole.double(), 1e-4 * whole.max().item())


@TAIL_ERROR
def test_equal_keys_leave_no_error(tail_error, device):
    # each block of 64 keys is one key 64 times
    q, v = torch.randn(2, 1, 1, 256, 64, device=device)
    k = torch.randn(1, 1, 4, 64, device=device).repeat_interleave(64, 2)
    _, lse = inputs.exact_attention(q, k, v, SCALE)
    masses = inputs.exact_masses(q, k, lse, SCALE, 64, 64).float()
    v = v.bfloat16()
    scores = tail_error(masses, masses.clone(), v, reference.block_means(v.float()).bfloat16())
    assert (scores == 0).all()


@TAIL_ERROR
def test_a_mean_that_is_hidden_costs_the_whole_block(tail_error, device):
    masses, pooled, v, v_mean = found_by(LENGTHS[1], 64, device=device)
    scores = tail_error(masses, pooled.zero_(), v, v_mean)
    spread = deviation(v[0].float(), v_mean[0].float())
    assert (scores[0] >= masses[0] * spread[:, None] * (1 - 1e-4)).all()


@TAIL_ERROR
def test_nan_stays_in_its_row(tail_error, device):
    masses, pooled, v, v_mean = found_by(LENGTHS[0], 64, device=device)
    masses[1, 2, 3, 1] = float("nan")
    scores = tail_error(masses, pooled, v, v_mean)
    assert scores[1, 2, 3].isnan().all()
    scores[1, 2, 3] = 0
    assert torch.isfinite(scores).all()


def test_the_kernel_leaves_maps_that_it_cannot_write_to(device):
    why_not = pytest.importorskip("sparse_attn.backends.triton.tail_error").why_not
    masses, pooled, v, v_mean = found_by(LENGTHS[0], 64, device=device)
    assert why_not(masses, pooled, v, v_mean) is None
    said = "needs float32 masses, and contiguous pooled ones"
    assert why_not(masses, pooled[..., ::2], v, v_mean) == said
    assert "float16 or bfloat16" in why_not(masses, pooled, v.float(), v_mean.float())


def test_deviation_is_that_of_the_values_in_a_block():
    v = torch.randn(2, 150, 16) + 100
    means = reference.block_means(v[None].double())[0]
    exact = torch.stack(
        [part.double().var(-2, correction=0).sum(-1).sqrt() for part in v.split(64, -2)], -1
    )
    assert_within("deviation", deviation(v, means.float()), exact, 1e-3)
