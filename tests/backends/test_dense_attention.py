import pytest
import torch

pytest.importorskip("triton")

from close import assert_as_accurate_as, assert_within

from sparse_attn.backends.triton.dense_attention import dense_attention
from tests.backends import kernel_reference as reference

# B, H, Lq, Lk, D, block_q, block_k
CASES = [
    (1, 1, 64, 64, 64, 64, 64),  # fewer keys than one pair of tiles
    (2, 1, 200, 331, 64, 64, 64),  # ragged query block, ragged key block, batch
    (1, 2, 256, 256, 128, 64, 64),  # nothing ragged
    (1, 1, 300, 200, 128, 128, 64),  # masses of tall blocks
    (1, 1, 130, 330, 64, 64, 128),  # masses of wide blocks
    (1, 1, 260, 449, 128, 128, 128),  # one key in the last tile
]
LSE_TOLERANCE = 2e-5
# of a mass; the largest possible one is block_q
MASS_TOLERANCE = 1e-3


def name(case):
    return "B{}-H{}-Lq{}-Lk{}-D{}-q{}-k{}".format(*case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_matches_reference(case, dtype, device):
    B, H, Lq, Lk, D, block_q, block_k = case
    q, k, v = reference.make(B, H, Lq, Lk, D, dtype, device)
    scale = D**-0.5
    exact, exact_lse = reference.attention(q, k, v, scale)
    same_dtype = reference.torch_attention(q, k, v, scale)
    blocks = {"block_q": block_q, "block_k": block_k}
    out, lse, masses = dense_attention(q, k, v, scale=scale, **blocks)
    assert masses is None and out.transpose(1, 2).is_contiguous()
    assert_as_accurate_as("out", out, same_dtype, exact)
    assert_within("lse", lse, exact_lse, LSE_TOLERANCE)

    searched, searched_lse, masses = dense_attention(
        q, k, v, scale=scale, previous_lse=exact_lse.float(), **blocks
    )
    assert_as_accurate_as("searched", searched, same_dtype, exact)
    assert_within("searched lse", searched_lse, exact_lse, LSE_TOLERANCE)
    exact_masses = reference.block_masses(q, k, exact_lse, scale, block_q, block_k)
    assert_within("masses", masses, exact_masses, MASS_TOLERANCE)


def test_masses_of_a_drifted_lse_sum_to_their_rows(device):
    q, k, v = reference.make(1, 2, 200, 256, 64, torch.bfloat16, device)
    _, lse = reference.attention(q, k, v, 0.125)
    drifted = lse.float() + 0.5 * torch.rand_like(lse.float())
    _, _, masses = dense_attention(q, k, v, scale=0.125, previous_lse=drifted)
    rows = torch.tensor([64.0, 64, 64, 8], device=device).expand(1, 2, 4)
    torch.testing.assert_close(masses.sum(-1), rows)
    exact = reference.block_masses(q, k, lse, 0.125, 64, 64)
    weighted = reference.block_masses(q, k, drifted, 0.125, 64, 64)
    assert_within("masses", masses, weighted * (rows / weighted.sum(-1))[..., None], 1e-3)
    # unequal drift only reweights rows: far closer than the drift itself
    assert (masses - exact).abs().max() < 0.2 * (weighted - exact).abs().max()


def test_a_row_far_from_its_previous_lse_stays_finite(device):
    q, k, v = reference.make(1, 1, 128, 256, 64, torch.bfloat16, device)
    _, lse = reference.attention(q, k, v, 0.125)
    lse = lse.float()
    lse[0, 0, 3] = -200.0
    lse[0, 0, 70] = float("-inf")
    _, _, masses = dense_attention(q, k, v, scale=0.125, previous_lse=lse)
    assert torch.isfinite(masses).all()
    torch.testing.assert_close(masses.sum(-1), torch.full((1, 1, 2), 64.0, device=device))


@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min])
def test_key_bias_hides_padding(value, device):
    q, k, v = reference.make(2, 1, 70, 300, 64, torch.bfloat16, device)
    bias = torch.randn(2, 300, device=device)
    # a whole first pair of tiles is hidden, so the maximum stays at -inf for a while
    bias[0, :140] = value
    bias[1, 100:] = value
    exact, exact_lse = reference.attention(q, k, v, 0.125, bias)
    wide = bias.clamp_min(torch.finfo(torch.bfloat16).min)
    out, lse, masses = dense_attention(
        q, k, v, scale=0.125, key_bias=bias, previous_lse=exact_lse.float()
    )
    same_dtype = reference.torch_attention(q, k, v, 0.125, wide)
    assert_as_accurate_as("out", out, same_dtype, exact)
    assert_within("lse", lse, exact_lse, LSE_TOLERANCE)
    exact_masses = reference.block_masses(q, k, exact_lse, 0.125, 64, 64, bias)
    assert_within("masses", masses, exact_masses, MASS_TOLERANCE)


def test_a_bias_of_a_few_keys_reaches_those_alone(device):
    q, k, v = reference.make(2, 1, 70, 500, 64, torch.bfloat16, device)
    bias = reference.few_biased_keys(2, 500, device)
    exact, exact_lse = reference.attention(q, k, v, 0.125, bias)
    out, lse, masses = dense_attention(
        q, k, v, scale=0.125, key_bias=bias, previous_lse=exact_lse.float()
    )
    same_dtype = reference.torch_attention(q, k, v, 0.125, bias)
    assert_as_accurate_as("out", out, same_dtype, exact)
    assert_within("lse", lse, exact_lse, LSE_TOLERANCE)
    exact_masses = reference.block_masses(q, k, exact_lse, 0.125, 64, 64, bias)
    assert_within("masses", masses, exact_masses, MASS_TOLERANCE)


def test_hidden_keys_everywhere_give_zero(device):
    q, k, v = reference.make(2, 1, 64, 130, 64, torch.bfloat16, device)
    bias = torch.zeros(2, 130, device=device)
    bias[0] = float("-inf")
    previous = torch.zeros(2, 1, 64, device=device)
    out, lse, masses = dense_attention(q, k, v, scale=0.125, key_bias=bias, previous_lse=previous)
    assert (out[0] == 0).all() and (lse[0] == float("-inf")).all() and (masses[0] == 0).all()
    assert torch.isfinite(out[1]).all() and torch.isfinite(masses[1]).all()


@pytest.mark.parametrize("layout", ["BLHD", "packed"])
def test_reads_strided_inputs_in_place(layout, device):
    q, k, v = reference.make(2, 2, 150, 150, 128, torch.bfloat16, device, layout)
    exact, _ = reference.attention(q, k, v, 0.09)
    out, _, _ = dense_attention(q, k, v, scale=0.09)
    assert_as_accurate_as("out", out, reference.torch_attention(q, k, v, 0.09), exact)


def test_two_runs_are_bit_equal(device):
    q, k, v = reference.make(1, 2, 200, 200, 64, torch.bfloat16, device)
    lse = torch.zeros(1, 2, 200, device=device)
    first, second = (dense_attention(q, k, v, scale=0.1, previous_lse=lse) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_nan_in_a_query_stays_in_its_row(device):
    q, k, v = reference.make(1, 1, 128, 128, 64, torch.bfloat16, device)
    q[0, 0, 9, 0] = float("nan")
    out, lse, _ = dense_attention(q, k, v, scale=0.125)
    bad = torch.arange(128, device=device) == 9
    assert torch.equal(out.isnan().all(-1)[0, 0], bad) and torch.equal(lse.isnan()[0, 0], bad)


def test_refuses_an_lse_of_another_shape(device):
    q, k, v = reference.make(1, 1, 64, 64, 64, torch.bfloat16, device)
    with pytest.raises(ValueError, match="The LSE must be"):
        dense_attention(q, k, v, scale=0.1, previous_lse=torch.zeros(1, 1, 63, device=device))
