import pytest
import torch
from close import assert_within, products_within

pytest.importorskip("triton")

from sparse_attn.backends.triton.features import features
from tests.backends import kernel_reference as reference

# B, H, V, D, layout
CASES = [
    (1, 1, 1, 64, "BHLD"),  # one token
    (2, 3, 150, 64, "BLHD"),  # ragged; batch; the host's strides
    (1, 2, 128, 128, "packed"),  # nothing ragged
]


def made(case, device, dtype=torch.bfloat16):
    """q and k far from 0, their centres, directions and places."""
    B, H, V, D, layout = case
    q, k, _ = (x + 20 for x in reference.make(B, H, V, V, D, dtype, device, layout))
    centres = 20 + torch.randn(2, B, H, D, device=device)
    directions = torch.randn(2, B, H, D, 16, device=device)
    return q, k, centres, directions, torch.randn(V, 8, device=device)


def exact(q, k, centres, directions, places):
    """In float64."""
    sides = [
        (x.double() - c.double()[:, :, None]) @ w.double()
        for x, c, w in zip((q, k), centres, directions, strict=True)
    ]
    return torch.cat([*sides, places.double().expand(*q.shape[:3], -1)], -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-V{}-D{}-{}".format(*c))
def test_matches_float64(case, dtype, device):
    inputs = made(case, device, dtype)
    found = features(*inputs)
    assert found.shape == (*inputs[0].shape[:3], 40) and found.dtype == torch.float32
    # a sum of D products of numbers about 1
    assert_within("features", found, exact(*inputs), 1e-4)


def test_tokens_may_begin_anywhere_in_the_sequence(device):
    q, k, centres, directions, places = made(CASES[1], device)
    part = features(q[:, :, 7:99], k[:, :, 7:99], centres, directions, places[7:99])
    whole = features(q, k, centres, directions, places)[:, :, 7:99]
    # both are off by what a product may be; places are copied
    allowed = [
        2 * products_within(x[:, :, 7:99].float() - c[:, :, None], w)
        for x, c, w in zip((q, k), centres, directions, strict=True)
    ]
    allowed = torch.cat([*allowed, torch.zeros_like(part[..., 32:])], -1)
    assert ((part - whole).abs() <= allowed).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_becomes_0(bad, device):
    inputs = made(CASES[1], device)
    inputs[1][1, 2, 7, 3] = bad
    found, expected = features(*inputs), exact(*inputs)
    assert not found[1, 2, 7, 16:32].any() and not expected[1, 2, 7, 16:32].isfinite().any()
    expected[1, 2, 7, 16:32] = 0
    assert_within("features", found, expected, 1e-4)


def test_refuses_what_it_cannot_serve(device):
    q, k, centres, directions, places = made(CASES[1], device)
    with pytest.raises(ValueError, match="needs 16 directions, got 8"):
        features(q, k, centres, directions[..., :8], places)
    with pytest.raises(ValueError, match="float16 or bfloat16, got float32"):
        features(q.float(), k.float(), centres, directions, places)
