from types import SimpleNamespace

import pytest
import torch
from close import assert_as_accurate_as, assert_within

from sparse_attn.backends import reference
from sparse_attn.backends.choice import plain_torch
from sparse_attn.method.fused_online_search import fused_online_search

TORCH = plain_torch()
CASES = [
    # B, H, L, D, block_q, block_k
    (1, 2, 256, 64, 64, 64),
    (2, 3, 333, 64, 64, 64),  # ragged, batch
    (1, 2, 300, 128, 128, 128),
    (1, 2, 333, 64, 128, 64),  # tall blocks
]


def search(backend, q, k, v, block_q=64, block_k=64, previous=None, key_bias=None):
    def dense_with_lse(q, k, v):
        calls.append(q.shape)
        return TORCH.attention(q, k, v, scale=0.3, key_bias=key_bias)

    calls = []
    found = fused_online_search(
        backend, dense_with_lse, q, k, v,
        scale=0.3, block_q=block_q, block_k=block_k, key_bias=key_bias, previous_lse=previous,
    )  # fmt: skip
    return *found, calls


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-L{}-D{}-q{}-k{}".format(*c))
def test_two_passes_give_dense_output_and_exact_masses(case, biased, device):
    B, H, L, D, *blocks = case
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, H, L, D, device=device)
    bias = None
    if biased:
        bias = torch.zeros(B, L, device=device)
        bias[:, L - 20 :] = torch.finfo(torch.float32).min
    out, lse, masses, calls = search(TORCH, q, k, v, *blocks, key_bias=bias)
    exact_qkv = [x.double() for x in (q, k, v)]
    options = {"scale": 0.3, "key_bias": None if bias is None else bias.double()}
    exact, exact_lse = reference.dense_attention(*exact_qkv, **options)
    same, _ = reference.dense_attention(q, k, v, scale=0.3, key_bias=bias)
    exact_masses = reference.block_masses(
        *exact_qkv[:2], exact_lse, block_q=blocks[0], block_k=blocks[1], **options
    )
    assert_as_accurate_as("out", out, same, exact, factor=4.0)
    assert_within("lse", lse, exact_lse, 1e-5)
    assert_within("masses", masses, exact_masses, 1e-3)
    assert len(calls) == 1


def test_a_backend_without_one_pass_ignores_the_earlier_lse():
    q, k, v = torch.randn(3, 1, 1, 128, 64)
    useless = torch.full((1, 1, 128), 40.0)
    _, _, fresh, _ = search(TORCH, q, k, v)
    _, _, masses, calls = search(TORCH, q, k, v, previous=useless)
    assert torch.equal(masses, fresh) and len(calls) == 1


def test_one_pass_runs_when_the_backend_can_and_the_lse_is_known():
    seen = {}

    def attention_with_masses(q, k, v, **options):
        seen.update(options)
        return "out", "lse", "masses"

    backend = SimpleNamespace(one_pass_search=True, attention_with_masses=attention_with_masses)
    q = torch.zeros(1, 1, 64, 64)
    found = search(backend, q, q, q, 64, 128, previous="earlier", key_bias="bias")
    assert found == ("out", "lse", "masses", [])
    assert seen == {
        "scale": 0.3, "key_bias": "bias", "previous_lse": "earlier", "block_q": 64, "block_k": 128
    }  # fmt: skip


def test_the_first_step_searches_in_two_passes_even_where_one_would_do():
    backend = SimpleNamespace(one_pass_search=True, block_masses=TORCH.block_masses)
    q, k, v = torch.randn(3, 1, 1, 128, 64)
    _, _, masses, calls = search(backend, q, k, v)
    assert len(calls) == 1
    assert_within("rows", masses.sum(-1), torch.full((1, 1, 2), 64.0), 1e-3)
