"""Queries and keys projected on their head's principal directions, and their places."""

import pytest
import torch
from close import assert_within, products_within

from sparse_attn.backends import reference
from tests.backends import inputs
from tests.backends.implementations import implementations

FEATURES = pytest.mark.parametrize("features", implementations("features", "torch", "triton"))

# B, H, V, D, layout
CASES = [
    (1, 1, 1, 64, "BHLD"),  # one token
    (2, 3, 150, 64, "BLHD"),  # ragged; batch; the host's strides
    (1, 2, 128, 128, "packed"),  # nothing ragged
]


def made(case, device, dtype=torch.bfloat16):
    """q and k far from 0, their centres, directions and places."""
    B, H, V, D, layout = case
    q, k, _ = (x + 20 for x in inputs.make(B, H, V, V, D, dtype, device, layout))
    centres = 20 + torch.randn(2, B, H, D, device=device)
    directions = torch.randn(2, B, H, D, 16, device=device)
    return q, k, centres, directions, torch.randn(V, 8, device=device)


def exact(*tensors):
    return reference.features(*(x.double() for x in tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-V{}-D{}-{}".format(*c))
@FEATURES
def test_matches_float64(features, case, dtype, device):
    tensors = made(case, device, dtype)
    found = features(*tensors)
    assert found.shape == (*tensors[0].shape[:3], 40) and found.dtype == torch.float32
    # a sum of D products of numbers about 1
    assert_within("features", found, exact(*tensors), 1e-4)


@FEATURES
def test_tokens_may_begin_anywhere_in_the_sequence(features, device):
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
@FEATURES
def test_what_is_not_finite_becomes_0(features, bad, device):
    tensors = made(CASES[1], device)
    tensors[1][1, 2, 7, 3] = bad
    found = features(*tensors)
    assert not found[1, 2, 7, 16:32].any()
    assert_within("features", found, exact(*tensors), 1e-4)


def test_the_kernel_says_what_it_cannot_serve(device):
    why_not = pytest.importorskip("sparse_attn.backends.triton.features").why_not
    q, k, centres, directions, places = made(CASES[1], device)
    assert why_not(q, k, centres, directions, places) is None
    said = "needs 16 directions, got 8"
    assert why_not(q, k, centres, directions[..., :8], places) == said
    said = "float16 or bfloat16, got float32"
    assert said in why_not(q.float(), k.float(), centres, directions, places)
