import pytest
import torch

from tests.backends import kernel_reference as reference

pytest.importorskip("triton")

from sparse_attn.backends.triton.block_masses import block_masses
from sparse_attn.backends.triton.pooled_masses import pooled_masses

# B, H, Lq, Nk, D, block_q
CASES = [
    (1, 1, 1, 1, 64, 64),  # one row, one mean
    (2, 3, 200, 70, 64, 64),  # ragged rows and means; batch
    (1, 2, 300, 64, 128, 128),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-L{}-N{}-D{}-q{}".format(*c))
def test_matches_float64(case, device):
    B, H, Lq, Nk, D, block_q = case
    q, k_mean, _ = reference.make(B, H, Lq, Nk, D, torch.bfloat16, device)
    log_sizes = torch.rand(B, Nk, device=device) * 4
    log_sizes[:, Nk // 2] = float("-inf") if Nk > 1 else 1.0
    lse = torch.randn(B, H, Lq, device=device) + 5
    masses = pooled_masses(q, k_mean, log_sizes, lse, block_q=block_q, scale=D**-0.5)
    logits = q.double() @ k_mean.double().mT * D**-0.5 + log_sizes.double()[:, None, None]
    exact = (logits - lse.double()[..., None]).exp()
    exact = torch.nn.functional.pad(exact, (0, 0, 0, -Lq % block_q))
    exact = exact.unflatten(2, (-1, block_q)).sum(3)
    assert (masses - exact).norm() <= 1e-5 * exact.norm()
    if Nk > 1:
        assert not masses[..., Nk // 2].any()


def test_is_at_most_the_exact_mass(device):
    """Jensen's inequality; equal where all keys of a block are."""
    L, D = 192, 64
    q, k, _ = reference.make(1, 2, L, L, D, torch.float16, device)
    k[:, :, :64] = k[:, :, :1]
    _, lse = reference.attention(q, k, k, D**-0.5)
    lse = lse.float()
    exact = block_masses(q, k, lse, block_q=64, block_k=64, scale=D**-0.5, renormalise=False)
    k_mean = k.float().unflatten(2, (-1, 64)).mean(3).half()
    sizes = torch.full((1, 3), 64.0, device=device).log()
    pooled = pooled_masses(q, k_mean, sizes, lse, block_q=64, scale=D**-0.5)
    assert (pooled <= exact * 1.001).all()
    assert torch.allclose(pooled[..., 0], exact[..., 0], rtol=1e-3)
    assert (pooled[..., 1:] < 0.9 * exact[..., 1:]).all()


def test_a_row_without_a_key_has_no_mass(device):
    q, k_mean, _ = reference.make(1, 1, 64, 8, 64, torch.bfloat16, device)
    lse = torch.full((1, 1, 64), float("-inf"), device=device)
    sizes = torch.zeros(1, 8, device=device)
    assert not pooled_masses(q, k_mean, sizes, lse, block_q=64, scale=0.1).any()
