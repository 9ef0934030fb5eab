from dataclasses import replace

import pytest
import torch
from close import assert_as_accurate_as, assert_within

from sparse_attn.backends import reference
from sparse_attn.call import Call
from sparse_attn.config import AdaSpaConfig
from sparse_attn.method import fused_online_search as module
from sparse_attn.orders.position import serpentine_order
from sparse_attn.token_layout import TokenLayout
from tests.method.chosen import TORCH, measured

CASES = [
    # B, H, L, D, block size
    (1, 2, 256, 64, "64"),
    (2, 3, 333, 64, "64"),  # ragged, batch
    (1, 2, 300, 128, "128"),
    (1, 2, 333, 64, "128x64"),  # tall blocks
]


def search(backend, q, k, v, block_size="64", previous=None, key_bias=None):
    """What is found, the masses, and how many dense passes there were."""

    def dense(call):
        passes.append(call)
        return TORCH.attention(
            call.q, call.k, call.v, scale=call.scale, key_bias=call.key_bias
        )  # fmt: skip

    passes, layout = [], TokenLayout(0, 1, 1, q.shape[2])
    call = Call(q, k, v, 0.3, layout, step=0, dense=None, key_bias=key_bias)
    config = AdaSpaConfig(tail="none", block_size=block_size)
    with measured() as seen:
        found = module.fused_online_search(backend, call, config, previous, dense)
    return found, seen.masses, len(passes)


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-L{}-D{}-{}".format(*c))
def test_two_passes_give_dense_output_and_exact_masses(case, biased, device):
    B, H, L, D, block_size = case
    q, k, v = torch.randn(3, B, H, L, D, device=device)
    bias = None
    if biased:
        bias = torch.zeros(B, L, device=device)
        bias[:, L - 20 :] = torch.finfo(torch.float32).min
    found, masses, passes = search(TORCH, q, k, v, block_size, key_bias=bias)
    exact_qkv = [x.double() for x in (q, k, v)]
    options = {"scale": 0.3, "key_bias": None if bias is None else bias.double()}
    exact, exact_lse = reference.attention(*exact_qkv, **options)
    same, _ = reference.attention(q, k, v, scale=0.3, key_bias=bias)
    blocks = AdaSpaConfig(block_size=block_size).blocks
    exact_masses = reference.block_masses(*exact_qkv[:2], exact_lse, **blocks, **options)
    assert_as_accurate_as("out", found.out, same, exact, factor=4.0)
    assert_within("lse", found.lse, exact_lse, 1e-5)
    assert_within("masses", masses, exact_masses, 1e-3)
    assert passes == 1 and found.exact


def test_a_backend_without_one_pass_ignores_the_earlier_lse():
    q, k, v = torch.randn(3, 1, 1, 128, 64)
    useless = torch.full((1, 1, 128), 40.0)
    _, fresh, _ = search(TORCH, q, k, v)
    found, masses, passes = search(TORCH, q, k, v, previous=useless)
    assert torch.equal(masses, fresh) and passes == 1 and found.exact


def test_one_pass_runs_when_the_backend_can_and_the_lse_is_known():
    seen = {}
    masses, answer = torch.ones(1, 1, 2, 3), torch.randn(1, 1, 192, 64)
    earlier, lse, bias = torch.randn(1, 1, 192), torch.randn(1, 1, 192), torch.randn(1, 192)

    def attention_with_masses(q, k, v, **options):
        seen.update(options)
        return answer, lse, masses

    backend = replace(TORCH, one_pass_search=True, attention_with_masses=attention_with_masses)
    q = torch.zeros(1, 1, 192, 64)
    found, used, passes = search(backend, q, q, q, "128x64", previous=earlier, key_bias=bias)
    assert torch.equal(found.out, answer) and torch.equal(found.lse, lse) and passes == 0
    assert used is masses and not found.exact, "measured with the earlier step's LSE"
    assert torch.equal(seen.pop("previous_lse"), earlier) and seen.pop("key_bias") is bias
    assert seen == {"scale": 0.3, "block_q": 128, "block_k": 64}


def test_the_first_step_searches_in_two_passes_even_where_one_would_do():
    backend = replace(TORCH, one_pass_search=True, attention_with_masses=lambda *args: 1 / 0)
    q, k, v = torch.randn(3, 1, 1, 128, 64)
    _, masses, passes = search(backend, q, k, v)
    assert passes == 1
    assert_within("rows", masses.sum(-1), torch.full((1, 1, 2), 64.0), 1e-3)


@pytest.mark.parametrize("token_order", ["position", "similarity"])
def test_one_pass_in_another_order_takes_every_rows_own_earlier_lse(token_order):
    layout = TokenLayout(0, 3, 8, 16)
    numbers = torch.arange(384.0).expand(1, 2, 384)
    earlier = numbers.clone()
    seen = []

    def attention_with_masses(q, k, v, *, previous_lse, **options):
        # the first channel of a query is its number, as is its LSE
        seen.append((previous_lse, q[..., 0]))
        out, lse = TORCH.attention(q, k, v, scale=0.3)
        return out, lse, torch.rand(1, q.shape[1], 6, 6)

    backend = replace(TORCH, one_pass_search=True, attention_with_masses=attention_with_masses)
    q, k, v = torch.randn(3, 1, 2, 384, 64)
    q[..., 0], k[..., 0] = numbers, 0.0
    order = serpentine_order(layout, q.device)
    call = Call(q, k, v, 0.3, layout, step=1, dense=None, by_position=order)
    config = AdaSpaConfig(tail="pooled", token_order=token_order)
    found = module.fused_online_search(backend, call, config, earlier, lambda call: 1 / 0)
    assert seen and all(torch.equal(lse, rows) for lse, rows in seen)
    assert any((rows[..., 1:] < rows[..., :-1]).any() for _, rows in seen)
    exact, _ = TORCH.attention(q, k, v, scale=0.3)
    assert_within("out", found.out, exact, 1e-3)
