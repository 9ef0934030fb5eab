"""What a block's mean key, weighted by the block's size, gets of the softmax."""

import pytest
import torch

from sparse_attn.backends import reference
from tests.backends import inputs
from tests.backends.implementations import implementations

POOLED = pytest.mark.parametrize(
    "pooled_masses", implementations("pooled_masses", "torch", "triton")
)
# B, H, Lq, Nk, D, block_q
CASES = [
    (1, 1, 1, 1, 64, 64),  # one row, one mean
    (2, 3, 200, 70, 64, 64),  # ragged rows and means; batch
    (1, 2, 300, 64, 128, 128),
    (1, 2, 70, 65, 64, 16),  # rows sampled of a block
    (1, 1, 70, 65, 128, 32),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-L{}-N{}-D{}-q{}".format(*c))
@POOLED
def test_matches_float64(pooled_masses, case, device):
    B, H, Lq, Nk, D, block_q = case
    q, k_mean, _ = inputs.make(B, H, Lq, Nk, D, torch.bfloat16, device)
    log_sizes = torch.rand(B, Nk, device=device) * 4
    log_sizes[:, Nk // 2] = float("-inf") if Nk > 1 else 1.0
    lse = torch.randn(B, H, Lq, device=device) + 5
    options = {"block_q": block_q, "scale": D**-0.5}
    masses = pooled_masses(q, k_mean, log_sizes, lse, **options)
    exact = reference.pooled_masses(
        q.double(), k_mean.double(), log_sizes.double(), lse.double(), **options
    )
    assert (masses - exact).norm() <= 1e-5 * exact.norm()
    if Nk > 1:
        assert not masses[..., Nk // 2].any()


@POOLED
def test_is_at_most_the_exact_mass(pooled_masses, device):
    """Jensen's inequality; equal where all keys of a block are."""
    q, k, _ = inputs.make(1, 2, 192, 192, 64, torch.float16, device)
    k[:, :, :64] = k[:, :, :1]
    _, lse = inputs.exact_attention(q, k, k, 0.125)
    exact = inputs.exact_masses(q, k, lse, 0.125, 64, 64)
    k_mean = reference.block_means(k.float()).half()
    sizes = torch.full((1, 3), 64.0, device=device).log()
    pooled = pooled_masses(q, k_mean, sizes, lse.float(), block_q=64, scale=0.125)
    assert (pooled <= exact * 1.001).all()
    assert torch.allclose(pooled[..., 0].double(), exact[..., 0], rtol=1e-3)
    assert (pooled[..., 1:] < 0.9 * exact[..., 1:]).all()


@POOLED
def test_a_row_without_a_key_has_no_mass(pooled_masses, device):
    q, k_mean, _ = inputs.make(1, 1, 64, 8, 64, torch.bfloat16, device)
    lse = torch.full((1, 1, 64), float("-inf"), device=device)
    sizes = torch.zeros(1, 8, device=device)
    assert not pooled_masses(q, k_mean, sizes, lse, block_q=64, scale=0.1).any()
