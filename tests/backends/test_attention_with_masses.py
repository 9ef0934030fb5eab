"""Dense attention that measures block masses on the way, by an earlier step's LSE."""

import pytest
import torch
from close import assert_as_accurate_as, assert_within

from sparse_attn.backends import tiles
from tests.backends import inputs
from tests.backends.implementations import implementations

SEARCH = pytest.mark.parametrize(
    "search", implementations("attention_with_masses", "triton", "hopper")
)
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
BLOCKS = {"block_q": 64, "block_k": 64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-Lq{}-Lk{}-D{}-q{}-k{}".format(*c))
@SEARCH
def test_matches_reference(search, case, dtype, device):
    B, H, Lq, Lk, D, block_q, block_k = case
    q, k, v = inputs.make(B, H, Lq, Lk, D, dtype, device)
    scale = D**-0.5
    exact, exact_lse = inputs.exact_attention(q, k, v, scale)
    out, lse, masses = search(
        q, k, v, scale=scale, previous_lse=exact_lse.float(), block_q=block_q, block_k=block_k
    )
    assert out.transpose(1, 2).is_contiguous()
    assert_as_accurate_as("out", out, inputs.torch_attention(q, k, v, scale), exact)
    assert_within("lse", lse, exact_lse, LSE_TOLERANCE)
    exact_masses = inputs.exact_masses(q, k, exact_lse, scale, block_q, block_k)
    assert_within("masses", masses, exact_masses, MASS_TOLERANCE)


@pytest.mark.parametrize("search", implementations("attention_with_masses", "triton"))
def test_turns_of_half_a_block_add_up(search, device, monkeypatch):
    tile = tiles.Tile(64, 16, 2, 2)
    monkeypatch.setattr(tiles, "attention", lambda *card_and_shape: tile)
    test_matches_reference(search, CASES[1], torch.bfloat16, device)


@SEARCH
def test_masses_of_a_drifted_lse_sum_to_their_rows(search, device):
    q, k, v = inputs.make(1, 2, 200, 256, 64, torch.bfloat16, device)
    _, lse = inputs.exact_attention(q, k, v, 0.125)
    drifted = lse.float() + 0.5 * torch.rand_like(lse.float())
    _, _, masses = search(q, k, v, scale=0.125, previous_lse=drifted, **BLOCKS)
    rows = torch.tensor([64.0, 64, 64, 8], device=device).expand(1, 2, 4)
    torch.testing.assert_close(masses.sum(-1), rows)
    exact = inputs.exact_masses(q, k, lse, 0.125, 64, 64)
    weighted = inputs.exact_masses(q, k, drifted, 0.125, 64, 64, renormalise=True)
    assert_within("masses", masses, weighted, 1e-3)
    # unequal drift only reweights rows: far closer than the drift itself
    untouched = inputs.exact_masses(q, k, drifted, 0.125, 64, 64)
    assert (masses - exact).abs().max() < 0.2 * (untouched - exact).abs().max()


@SEARCH
def test_a_row_far_from_its_previous_lse_stays_finite(search, device):
    q, k, v = inputs.make(1, 1, 128, 256, 64, torch.bfloat16, device)
    _, lse = inputs.exact_attention(q, k, v, 0.125)
    lse = lse.float()
    lse[0, 0, 3] = -200.0
    lse[0, 0, 70] = float("-inf")
    _, _, masses = search(q, k, v, scale=0.125, previous_lse=lse, **BLOCKS)
    assert torch.isfinite(masses).all()
    torch.testing.assert_close(masses.sum(-1), torch.full((1, 1, 2), 64.0, device=device))


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@SEARCH
def test_a_bias_reaches_the_masses(search, few, device):
    q, k, v = inputs.make(2, 1, 70, 500, 64, torch.bfloat16, device)
    bias = inputs.few_biased_keys(2, 500, device)
    if not few:
        bias += torch.randn(2, 500, device=device)
        # a whole first pair of tiles is hidden, so the maximum stays at -inf for a while
        bias[0, :140] = float("-inf")
    exact, exact_lse = inputs.exact_attention(q, k, v, 0.125, bias)
    out, lse, masses = search(
        q, k, v, scale=0.125, key_bias=bias, previous_lse=exact_lse.float(), **BLOCKS
    )
    assert_as_accurate_as("out", out, inputs.torch_attention(q, k, v, 0.125, bias), exact)
    assert_within("lse", lse, exact_lse, LSE_TOLERANCE)
    exact_masses = inputs.exact_masses(q, k, exact_lse, 0.125, 64, 64, bias)
    assert_within("masses", masses, exact_masses, MASS_TOLERANCE)


@SEARCH
def test_keys_hidden_everywhere_have_no_mass(search, device):
    q, k, v = inputs.make(2, 1, 64, 130, 64, torch.bfloat16, device)
    bias = torch.zeros(2, 130, device=device)
    bias[0] = float("-inf")
    previous = torch.zeros(2, 1, 64, device=device)
    _, _, masses = search(q, k, v, scale=0.125, key_bias=bias, previous_lse=previous, **BLOCKS)
    assert (masses[0] == 0).all() and torch.isfinite(masses[1]).all()


@SEARCH
def test_two_runs_are_bit_equal(search, device):
    q, k, v = inputs.make(1, 2, 200, 200, 64, torch.bfloat16, device)
    lse = torch.zeros(1, 2, 200, device=device)
    first, second = (search(q, k, v, scale=0.1, previous_lse=lse, **BLOCKS) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@SEARCH
def test_refuses_an_lse_of_another_shape(search, device):
    q, k, v = inputs.make(1, 1, 64, 64, 64, torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"`previous_lse` must be \[1, 1, 64\]"):
        lse = torch.zeros(1, 1, 63, device=device)
        search(q, k, v, scale=0.1, previous_lse=lse, **BLOCKS)
