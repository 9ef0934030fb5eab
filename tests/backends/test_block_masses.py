"""Block masses by an LSE, by every implementation, against float64."""

import pytest
import torch
from close import assert_within

from sparse_attn.backends import reference
from tests.backends import inputs
from tests.backends.implementations import implementations

MASSES = pytest.mark.parametrize(
    "block_masses", implementations("block_masses", "torch", "triton", "hopper")
)
KERNELS = pytest.mark.parametrize(
    "block_masses", implementations("block_masses", "triton", "hopper")
)

# B, H, Lq, Lk, D, block_q, block_k
CASES = [
    (1, 1, 64, 64, 64, 64, 64),  # less than one tile
    (2, 2, 200, 331, 64, 64, 64),  # ragged both ways, batch and heads
    (1, 1, 256, 256, 128, 128, 64),  # tall blocks, nothing ragged
    (1, 1, 130, 330, 128, 64, 128),  # wide blocks
    (1, 1, 300, 450, 64, 128, 128),  # large blocks, ragged
    (2, 2, 150, 331, 64, 16, 64),  # rows sampled of blocks of 64, ragged both ways
    (1, 1, 200, 130, 128, 32, 128),  # the same of 128
]
MASS_TOLERANCE = 1e-3


def name(case):
    return "B{}-H{}-Lq{}-Lk{}-D{}-q{}-k{}".format(*case)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("case", CASES, ids=name)
@MASSES
def test_matches_reference(block_masses, case, renormalise, device):
    B, H, Lq, Lk, D, block_q, block_k = case
    q, k, v = inputs.make(B, H, Lq, Lk, D, torch.bfloat16, device)
    scale = D**-0.5
    _, lse = inputs.exact_attention(q, k, v, scale)
    masses = block_masses(
        q, k, lse.float(), block_q=block_q, block_k=block_k, scale=scale, renormalise=renormalise
    )
    exact = inputs.exact_masses(q, k, lse, scale, block_q, block_k)
    assert_within("masses", masses, exact, MASS_TOLERANCE)


@pytest.mark.parametrize("int8", [False, True])
@KERNELS
def test_small_blocks_add_up_to_whole_ones(block_masses, int8, device):
    """More rows than one program has, and more tiles of keys than one strip."""
    q, k, v = inputs.make(1, 2, 400, 2400, 64, torch.bfloat16, device)
    _, lse = inputs.exact_attention(q, k, v, 0.125)
    options = {"block_k": 64, "scale": 0.125, "renormalise": False, "int8": int8}
    small, whole = (block_masses(q, k, lse.float(), block_q=n, **options) for n in (16, 64))
    assert small.shape[2] == 25
    sums = torch.nn.functional.pad(small, (0, 0, 0, 3)).unflatten(2, (-1, 4)).sum(3)
    assert_within("masses", sums, whole.double(), 1e-4)


def relative(masses, exact):
    return ((masses.double() - exact).abs().sum() / exact.sum()).item()


@pytest.mark.parametrize("case", CASES, ids=name)
@KERNELS
def test_int8_scores_err_little(block_masses, case, device):
    B, H, Lq, Lk, D, block_q, block_k = case
    q, k, v = inputs.make(B, H, Lq, Lk, D, torch.bfloat16, device)
    # an offset that the keys share is no matter, nor is a channel that stands out
    k += 2
    q[..., 5] *= 10
    scale = D**-0.5
    _, lse = inputs.exact_attention(q, k, v, scale)
    blocks = {"block_q": block_q, "block_k": block_k}
    exact = inputs.exact_masses(q, k, lse, scale, block_q, block_k)
    masses = block_masses(
        q, k, lse.float(), scale=scale, int8=True, renormalise=False, **blocks
    )  # fmt: skip
    assert 1e-6 < relative(masses, exact) < 0.02
    masses = block_masses(q, k, lse.float() + 3.0, scale=scale, int8=True, **blocks)
    assert relative(masses, exact) < 0.02


@pytest.mark.parametrize("few", [True, False])
@KERNELS
def test_int8_scores_take_a_bias(block_masses, few, device):
    q, k, v = inputs.make(2, 2, 300, 600, 64, torch.bfloat16, device)
    bias = inputs.few_biased_keys(2, 600, device)
    if not few:
        bias += torch.randn(2, 600, device=device)
        bias[0, 64:128] = float("-inf")
    _, lse = inputs.exact_attention(q, k, v, 0.125, bias)
    masses = block_masses(
        q, k, lse.float(), block_q=64, block_k=64, scale=0.125, key_bias=bias, int8=True
    )  # fmt: skip
    exact = inputs.exact_masses(q, k, lse, 0.125, 64, 64, bias)
    assert relative(masses, exact) < 0.02
    assert (masses[exact == 0] == 0).all()


@KERNELS
def test_int8_scores_leave_empty_and_stale_rows_finite(block_masses, device):
    q, k, v = inputs.make(1, 1, 200, 128, 64, torch.bfloat16, device)
    _, lse = inputs.exact_attention(q, k, v, 0.125)
    lse = lse.float()
    lse[0, 0, 5] = -300.0
    lse[0, 0, 64:128] = float("-inf")
    masses = block_masses(q, k, lse, block_q=64, block_k=64, scale=0.125, int8=True)
    assert torch.isfinite(masses).all() and (masses >= 0).all() and (masses[0, 0, 1] == 0).all()
    # queries of zeros see all keys alike
    masses = block_masses(
        torch.zeros_like(q), k, torch.full_like(lse, 128.0).log(), block_q=64, block_k=64,
        scale=0.125, int8=True,
    )  # fmt: skip
    assert_within("masses", masses[0, 0, :3], torch.full((3, 2), 32.0, device=device), 0.01)


@pytest.mark.parametrize("density", [0.2, 0.1])
@KERNELS
def test_blocks_chosen_by_int8_scores_hold_as_much(block_masses, density, device):
    L = 1024
    q, k, v = inputs.make(1, 2, L, L, 64, torch.bfloat16, device)
    # neighbours are alike, keys share an offset, channels stand out
    centres = torch.randn(2, 1, 2, L // 32, 64, device=device).repeat_interleave(32, 3)
    q, k = q + centres[0].bfloat16(), k + centres[1].bfloat16() + 3
    q[..., 5] *= 4
    k[..., 9] *= 4
    _, lse = inputs.exact_attention(q, k, v, 0.125)
    exact = inputs.exact_masses(q, k, lse, 0.125, 64, 64)
    held = []
    for int8 in (False, True):
        masses = block_masses(q, k, lse.float(), block_q=64, block_k=64, scale=0.125, int8=int8)
        keep = masses.topk(round(density * L / 64), -1).indices
        held.append(exact.gather(-1, keep).sum().item() / exact.sum().item())
    assert held[0] - held[1] < 0.002


@MASSES
def test_serves_float16_and_strided_inputs(block_masses, device):
    q, k, v = inputs.make(1, 3, 150, 150, 64, torch.float16, device, "packed")
    _, lse = inputs.exact_attention(q, k, v, 0.125)
    masses = block_masses(q, k, lse.float(), block_q=64, block_k=64, scale=0.125)
    exact = inputs.exact_masses(q, k, lse, 0.125, 64, 64)
    assert_within("masses", masses, exact, MASS_TOLERANCE)


@MASSES
def test_a_stale_lse_is_renormalised(block_masses, device):
    q, k, v = inputs.make(1, 1, 100, 200, 64, torch.bfloat16, device)
    _, lse = inputs.exact_attention(q, k, v, 0.125)
    # the same drift on every row vanishes
    masses = block_masses(q, k, lse.float() + 3.0, block_q=64, block_k=64, scale=0.125)
    exact = inputs.exact_masses(q, k, lse, 0.125, 64, 64)
    assert_within("masses", masses, exact, MASS_TOLERANCE)


@pytest.mark.parametrize("stale", [slice(5, 6), slice(0, 64)], ids=["a row", "a block"])
@MASSES
def test_hopelessly_stale_and_empty_rows_stay_finite(block_masses, stale, device):
    q, k, v = inputs.make(1, 1, 128, 128, 64, torch.bfloat16, device)
    _, lse = inputs.exact_attention(q, k, v, 0.125)
    lse = lse.float()
    lse[0, 0, stale] = -300.0
    lse[0, 0, 64:] = float("-inf")
    masses = block_masses(q, k, lse, block_q=64, block_k=64, scale=0.125)
    assert_within("rows", masses.sum(-1), torch.tensor([[[64.0, 0.0]]], device=device), 1e-3)


@MASSES
def test_a_row_without_a_key_takes_no_mass_from_its_block(block_masses, device):
    q, k, v = inputs.make(1, 1, 128, 200, 64, torch.bfloat16, device)
    _, lse = inputs.exact_attention(q, k, v, 0.125)
    lse[0, 0, 20:40] = float("-inf")
    for renormalise in (False, True):
        options = {"block_q": 64, "block_k": 64, "scale": 0.125, "renormalise": renormalise}
        masses = block_masses(q, k, lse.float(), **options)
        exact = reference.block_masses(q.double(), k.double(), lse, **options)
        assert_within("masses", masses, exact, MASS_TOLERANCE)


@KERNELS
def test_key_bias_takes_mass_away(block_masses, device):
    q, k, v = inputs.make(2, 1, 90, 200, 64, torch.bfloat16, device)
    bias = torch.randn(2, 200, device=device)
    bias[0, 64:128] = float("-inf")
    bias[1, 128:] = torch.finfo(torch.float32).min
    _, lse = inputs.exact_attention(q, k, v, 0.125, bias)
    masses = block_masses(q, k, lse.float(), block_q=64, block_k=64, scale=0.125, key_bias=bias)
    exact = inputs.exact_masses(q, k, lse, 0.125, 64, 64, bias)
    assert_within("masses", masses, exact, MASS_TOLERANCE)
    assert (masses[0, 0, :, 1] == 0).all() and (masses[1, 0, :, 2:] == 0).all()


@MASSES
def test_a_bias_of_a_few_keys_reaches_those_alone(block_masses, device):
    q, k, v = inputs.make(2, 1, 300, 600, 64, torch.bfloat16, device)
    bias = inputs.few_biased_keys(2, 600, device)
    _, lse = inputs.exact_attention(q, k, v, 0.125, bias)
    masses = block_masses(q, k, lse.float(), block_q=64, block_k=64, scale=0.125, key_bias=bias)
    exact = inputs.exact_masses(q, k, lse, 0.125, 64, 64, bias)
    assert_within("masses", masses, exact, MASS_TOLERANCE)


@KERNELS
def test_nan_in_a_key_is_not_hidden(block_masses, device):
    q, k, _ = inputs.make(1, 1, 64, 128, 64, torch.bfloat16, device)
    k[0, 0, 70] = float("nan")
    lse = torch.zeros(1, 1, 64, device=device)
    masses = block_masses(q, k, lse, block_q=64, block_k=64, scale=0.125, int8=True)
    assert masses.isnan()[..., 1].all()
    masses = block_masses(q, k, lse, block_q=64, block_k=64, scale=0.125, renormalise=False)
    assert torch.equal(masses.isnan()[0, 0, 0], torch.tensor([False, True], device=device))


@pytest.mark.parametrize("biased", [False, True])
@KERNELS
def test_nan_in_a_key_that_the_mean_skips_is_not_hidden_by_int8(block_masses, biased, device):
    q, k, _ = inputs.make(2, 1, 64, 8192, 64, torch.bfloat16, device)
    k[0, 0, 64 * 3 + 5] = float("nan")
    masses = block_masses(
        q, k, torch.zeros(2, 1, 64, device=device), block_q=64, block_k=64, scale=0.125,
        key_bias=inputs.few_biased_keys(2, 8192, device) if biased else None,
        renormalise=False, int8=True,
    )  # fmt: skip
    spoilt = masses.isnan()[:, 0, 0]
    assert spoilt[0, 3] and spoilt.sum() == 1


@KERNELS
def test_two_runs_are_bit_equal(block_masses, device):
    q, k, _ = inputs.make(1, 2, 200, 200, 64, torch.bfloat16, device)
    lse = torch.full((1, 2, 200), 5.0, device=device)
    for int8 in (False, True):
        first, second = (
            block_masses(q, k, lse, block_q=64, block_k=64, scale=0.1, int8=int8) for _ in range(2)
        )
        assert torch.equal(first, second)
