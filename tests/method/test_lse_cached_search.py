import pytest
import torch
from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.backends.permuted import block_sizes
from sparse_attn.block_mask import recall
from sparse_attn.call import Call
from sparse_attn.config import AdaSpaConfig
from sparse_attn.method import lse_cached_search as module
from sparse_attn.run import packed_lse
from sparse_attn.token_layout import TokenLayout
from tests.method.chosen import TORCH, chosen, measured

L, D, BLOCK, SCALE = 640, 64, 64, 64**-0.5
OPTIONS = {"block_q": BLOCK, "block_k": BLOCK, "scale": SCALE}


def clustered(drift, seed=0):
    """q and k with block structure; `drift` is how far they have moved since an earlier step."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1, 2, 5, D, generator=generator).repeat_interleave(L // 5, 2)
    q, k = (1.5 * centres + torch.randn(1, 2, L, D, generator=generator) for _ in range(2))
    moved = [x + drift * torch.randn(x.shape, generator=generator) for x in (q, k)]
    return q, k, *moved


def exact_lse(q, k):
    return reference.scaled_logits(q.double(), k.double(), SCALE).logsumexp(-1)


def cached(q, k, lse, key_bias=None):
    """The masses that a search with a kept LSE chooses by."""
    call = Call(q, k, q, SCALE, TokenLayout(0, 1, 1, L), step=0, dense=None, key_bias=key_bias)
    with measured() as seen:
        found = module.lse_cached_search(TORCH, call, AdaSpaConfig(tail="none"), lse, int8=False)
    assert not found.exact and found.out is None and found.lse is None
    return seen.masses


def cached_and_exact(drift, shift=0.0):
    q, k, q_now, k_now = clustered(drift)
    earlier = exact_lse(q, k).float() + shift
    now = exact_lse(q_now, k_now)
    masses = cached(q_now, k_now, earlier)
    exact = reference.block_masses(q_now.double(), k_now.double(), now, **OPTIONS)
    return masses, exact, (earlier - now).abs().mean().item()


def test_without_drift_the_masses_are_exact():
    masses, exact, _ = cached_and_exact(0.0)
    assert_within("masses", masses, exact, 1e-3)


@pytest.mark.parametrize("shift", [-0.65, 0.65, 5.0])
def test_a_common_shift_of_the_lse_cancels(shift):
    masses, exact, _ = cached_and_exact(0.0, shift)
    assert_within("masses", masses, exact, 2e-3)


# drift of q and k, most relative error of the masses; measured 0.4, 2.0 and 5.3 % at a mean LSE
# drift of 0.14, 0.46 and 0.85 nat, and 5, 43 and 173 % without renormalising
DRIFTS = [(0.1, 0.01), (0.3, 0.04), (0.5, 0.1)]


@pytest.mark.parametrize("drift, allowed", DRIFTS)
def test_a_drifted_lse_stays_close(drift, allowed):
    masses, exact, nats = cached_and_exact(drift)
    assert nats > 0.02, "nothing drifted"
    error = (masses.double() - exact).abs().sum() / exact.sum()
    assert error < allowed
    assert_within("rows", masses.sum(-1), torch.full((1, 2, 10), 64.0), 1e-3)


def test_the_mask_of_a_drifted_lse_holds_almost_the_best_mass():
    masses, exact, _ = cached_and_exact(0.3)
    layout, config = TokenLayout(0, 1, 1, L), AdaSpaConfig(sparsity=0.7)
    keep, estimated = chosen(masses, layout, config)
    _, best = chosen(exact.float(), layout, config)
    true = recall(exact.float(), keep)
    assert (true <= best + 1e-6).all(), "no mask holds more than the best"
    assert (best - true < 0.01).all()
    assert ((estimated - true).abs() < 0.03).all()


def test_rows_whose_weights_vanish_have_no_mass():
    """As where q has moved so far that every weight is 0 in float32."""
    masses, _, _ = cached_and_exact(0.0, shift=200.0)
    assert (masses == 0).all()


# measured 3e-4, 4e-3 and 3.7e-2 of the mass, and no recall
@pytest.mark.parametrize("sharper, allowed", [(1, 6e-4), (4, 8e-3), (16, 8e-2)])
def test_an_lse_in_eight_bits_loses_next_to_nothing(sharper, allowed):
    """Of LSE that span 16, 70 and 290: rounding changes a row's weight, and a block has many rows."""
    q, k, q_now, k_now = clustered(0.05)
    earlier = exact_lse(q * sharper, k).float()
    rounded = packed_lse.unpack(packed_lse.pack(earlier), L)
    whole, found = (cached(q_now * sharper, k_now, x) for x in (earlier, rounded))
    assert 0 < (found - whole).abs().sum() < allowed * whole.sum()
    layout, config = TokenLayout(0, 1, 1, L), AdaSpaConfig(sparsity=0.7)
    best, kept = (recall(whole, chosen(x, layout, config)[0]) for x in (whole, found))
    assert (best - kept < 1e-4).all()


def test_a_key_bias_reaches_the_masses():
    q, k, _, _ = clustered(0.0)
    bias = torch.zeros(1, L)
    bias[:, -100:] = torch.finfo(torch.float32).min
    lse = reference.scaled_logits(q.double(), k.double(), SCALE, bias).logsumexp(-1)
    masses = cached(q, k, lse.float(), bias)
    exact = reference.block_masses(q.double(), k.double(), lse, key_bias=bias, **OPTIONS)
    assert_within("masses", masses, exact, 1e-3)
    assert (masses[..., -1] == 0).all()


def test_rows_of_blocks():
    assert block_sizes(150).tolist() == [64, 64, 22] and block_sizes(128, block=128).tolist() == [
        128
    ]
