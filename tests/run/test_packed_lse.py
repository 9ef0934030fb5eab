"""An LSE comes back from eight bits to within half a step of its group."""

import pytest
import torch

from sparse_attn.run.packed_lse import GROUP, pack, packed_bytes, unpack


@pytest.mark.parametrize("tokens", [1, 2, GROUP - 1, GROUP, GROUP + 1, 3001])
@pytest.mark.parametrize("mean, spread", [(0, 0), (12, 3), (-800, 1e-4), (3e4, 50), (0, 1e4)])
def test_it_errs_by_half_a_step_of_its_group(tokens, mean, spread):
    lse = mean + spread * torch.randn(2, 3, tokens, generator=torch.Generator().manual_seed(0))
    packed = pack(lse)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, packed_bytes(tokens))
    found = unpack(packed, tokens)
    assert found.shape == lse.shape and found.dtype == torch.float32
    for first in range(0, tokens, GROUP):
        group = lse[..., first : first + GROUP]
        spans = group.amax(-1, keepdim=True) - group.amin(-1, keepdim=True)
        # the least value is kept in half precision, below it; no step is below 2^-13
        low = group.amin(-1, keepdim=True).abs()
        step = (1.002 * (spans + 2.0**-9 * low) / 255).clamp(min=2.0**-13)
        # float32 rounds the sum
        allowed = step / 2 + group.abs() * 2.0**-22
        assert ((found[..., first : first + GROUP] - group).abs() <= allowed).all()
    assert torch.equal(unpack(packed[:, 1:2], tokens), found[:, 1:2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad):
    lse = torch.ones(1, 2, 2 * GROUP)
    lse[0, 1, GROUP + 3] = bad
    found = unpack(pack(lse), 2 * GROUP)
    assert found[0, 1, GROUP:].isnan().all()
    assert torch.equal(found[0, 0], lse[0, 0]) and torch.equal(
        found[0, 1, :GROUP], lse[0, 1, :GROUP]
    )


@pytest.mark.parametrize("without_keys", [-float("inf"), -1e30])
def test_a_row_without_keys_leaves_the_others_their_values(without_keys):
    lse = torch.linspace(3, 5, 2 * GROUP).expand(1, 2, -1).clone()
    plain = unpack(pack(lse), 2 * GROUP)
    lse[0, 1, GROUP + 3], lse[0, 0, :GROUP] = without_keys, without_keys
    found = unpack(pack(lse), 2 * GROUP)
    assert found.isfinite().all()
    others = torch.arange(2 * GROUP) != GROUP + 3
    assert torch.equal(found[0, 1, others], plain[0, 1, others])
    assert torch.equal(found[0, 0, GROUP:], plain[0, 0, GROUP:])


def test_it_takes_a_quarter_of_float32():
    assert packed_bytes(522_256) < 0.255 * 4 * 522_256
