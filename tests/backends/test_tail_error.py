import pytest
import torch
from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.backends.choice import plain_torch
from sparse_attn.backends.torch import tail_error as module
from sparse_attn.backends.torch.tail_error import deviation, tail_error
from sparse_attn.orders.position import rods
from sparse_attn.token_layout import TokenLayout

TORCH = plain_torch()
CPU, SCALE = torch.device("cpu"), 0.25
LAYOUTS = [TokenLayout(20, 4, 5, 15, 24), TokenLayout(0, 4, 8, 10), TokenLayout(0, 1, 2, 5)]


def found_by(layout, block_q, dtype=torch.float32):
    """Masses, pooled masses and permuted tokens, and the permuted tokens in float64."""
    q, k, v = torch.randn(3, 2, 3, layout.tokens, 16).to(dtype)
    # a few keys stand out, so that means miss much
    k[:, :, ::29] *= 4
    moved = TORCH.permute(q, k, v, rods(layout, CPU).expand(2, 3, -1))
    inputs = [x.double() for x in (moved.q, moved.k, moved.v)]
    lse = reference.scaled_logits(*inputs[:2], SCALE).logsumexp(-1)
    options = {"block_q": block_q, "scale": SCALE}
    masses = TORCH.block_masses(moved.q, moved.k, lse.float(), block_k=64, **options)
    pooled = TORCH.pooled_masses(
        moved.q, moved.pooled.k_mean, moved.pooled.log_sizes, lse.float(), **options
    )
    return masses, pooled, moved, inputs, lse


def for_kernel(layout, block_q, dim, dtype, device):
    """What the kernel takes; the last mean key stands for more than its keys weigh."""
    v = torch.randn(2, layout.tokens, 3, dim).add(0.5).to(dtype).transpose(1, 2)
    moved = TORCH.permute(v, v, v, rods(layout, CPU).expand(2, 3, -1))
    masses = torch.randn(2, 3, layout.num_blocks(block_q), layout.num_blocks(64)).exp()
    pooled = masses * torch.rand_like(masses)
    pooled[..., -1] *= 3
    return tuple(x.to(device) for x in (masses, pooled, moved.v, moved.pooled.v_mean))


def kernel(*tensors):
    return pytest.importorskip("sparse_attn.backends.triton.tail_error").tail_error(*tensors)


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.describe())
@pytest.mark.parametrize("workspace", [1, 256 << 20], ids=["a head at a time", "all heads"])
def test_matches_the_definition_in_float64(layout, block_q, workspace, monkeypatch):
    monkeypatch.setattr(module, "WORKSPACE_BYTES", workspace)
    masses, pooled, moved, inputs, lse = found_by(layout, block_q)
    before = masses.clone()
    scores = tail_error(masses, pooled, moved.v, moved.pooled.v_mean)
    exact = reference.tail_error(*inputs, lse, block_q=block_q, block_k=64, scale=SCALE)
    # where masses agree to rounding, the root of their difference is all rounding
    assert_within("scores", scores, exact, 5e-3 * exact.max().item())
    assert scores.data_ptr() == pooled.data_ptr(), "takes the memory of the pooled masses"
    assert torch.equal(masses, before)


def test_half_precision_scores_rank_alike():
    layout = LAYOUTS[1]
    masses, pooled, moved, inputs, lse = found_by(layout, 64, torch.bfloat16)
    scores = tail_error(masses, pooled, moved.v, moved.pooled.v_mean)
    exact = reference.tail_error(*inputs, lse, block_q=64, block_k=64, scale=SCALE)
    assert_within("scores", scores, exact, 0.05 * exact.max().item())


def test_equal_keys_leave_no_error():
    layout = TokenLayout(0, 4, 8, 8)
    q, v = torch.randn(2, 1, 1, layout.tokens, 16)
    # each block of 64 keys is one key 64 times
    order = rods(layout, CPU)
    k = torch.empty_like(q)
    k[:, :, order] = torch.randn(1, 1, layout.num_blocks(64), 16).repeat_interleave(64, 2)
    moved = TORCH.permute(q, k, v, order.expand(1, 1, -1))
    lse = TORCH.attention(moved.q, moved.k, moved.v, scale=SCALE)[1]
    masses = TORCH.block_masses(moved.q, moved.k, lse, block_q=64, block_k=64, scale=SCALE)
    pooled = TORCH.pooled_masses(
        moved.q, moved.pooled.k_mean, moved.pooled.log_sizes, lse, block_q=64, scale=SCALE
    )
    assert_within("pooled", pooled, masses.double(), 1e-3)
    scores = tail_error(masses, pooled, moved.v, moved.pooled.v_mean)
    # sqrt(64 * 1e-4) of rounding times a deviation of about 4
    assert scores.max() < 0.5 and scores.max() < 0.02 * masses.max()


def test_a_stand_in_that_is_hidden_costs_the_whole_block():
    masses, pooled, moved, _, _ = found_by(LAYOUTS[1], 64)
    pooled.zero_()
    scores = tail_error(masses, pooled, moved.v, moved.pooled.v_mean)
    spread = deviation(moved.v[0], moved.pooled.v_mean[0].float())
    assert (scores[0] >= masses[0] * spread[:, None] * (1 - 1e-5)).all()


def test_nan_stays_in_its_head():
    masses, pooled, moved, _, _ = found_by(LAYOUTS[0], 64)
    masses[1, 2, 3, 1] = float("nan")
    scores = tail_error(masses, pooled, moved.v, moved.pooled.v_mean)
    assert scores[1, 2, 3].isnan().any()
    scores[1, 2] = 0
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_q, dim", [(64, 128), (128, 64)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.describe())
def test_the_kernel_matches_plain_torch(layout, block_q, dim, dtype, device):
    masses, pooled, v, v_mean = for_kernel(layout, block_q, dim, dtype, device)
    before, given = masses.clone(), pooled.clone()
    plain = tail_error(masses.cpu(), pooled.cpu(), v.cpu(), v_mean.cpu())
    scores = kernel(masses, given, v, v_mean)
    # both subtract squares of distances, about 64 of them, in float32
    assert_within("scores", scores.cpu(), plain.double(), 1e-3 * plain.max().item())
    assert scores.data_ptr() == given.data_ptr() and torch.equal(masses, before)


def test_nan_stays_in_its_row_in_the_kernel(device):
    masses, pooled, v, v_mean = for_kernel(LAYOUTS[0], 64, 64, torch.bfloat16, device)
    masses[1, 2, 3, 1] = float("nan")
    scores = kernel(masses, pooled, v, v_mean)
    assert scores[1, 2, 3].isnan().all()
    scores[1, 2, 3] = 0
    assert torch.isfinite(scores).all()


def test_the_kernel_refuses_maps_it_cannot_write_to(device):
    masses, pooled, v, v_mean = for_kernel(LAYOUTS[0], 64, 64, torch.bfloat16, device)
    with pytest.raises(ValueError, match="needs float32 masses, and contiguous pooled ones"):
        kernel(masses, pooled[..., ::2], v, v_mean)


def test_deviation_is_that_of_the_values_in_a_block():
    v = torch.randn(2, 150, 16) + 100
    means = reference.block_means(v[None].double(), 64)[0]
    exact = torch.stack(
        [part.double().var(-2, correction=0).sum(-1).sqrt() for part in v.split(64, -2)], -1
    )
    assert_within("deviation", deviation(v, means.float()), exact, 1e-3)
