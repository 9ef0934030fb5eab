"""Tokens in another order, and the mean key and value of every block of it."""

import pytest
import torch
from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.backends.permuted import block_sizes
from tests.backends import inputs
from tests.backends.implementations import implementations

PERMUTE = pytest.mark.parametrize("permute", implementations("permute", "torch", "triton"))
# B, H, L, D, layout
CASES = [
    (1, 1, 1, 64, "BHLD"),  # one token
    (2, 3, 300, 64, "BLHD"),  # ragged; batch; the host's strides
    (1, 2, 128, 128, "packed"),  # nothing ragged
    (1, 1, 64 * 65 + 7, 64, "BHLD"),  # more means than one block of them
]


def made(case, device):
    """q, k, v, and an order for every head."""
    B, H, L, D, layout = case
    qkv = inputs.make(B, H, L, L, D, torch.bfloat16, device, layout)
    return *qkv, inputs.random_orders(B, H, L, device)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-L{}-D{}-{}".format(*c))
@PERMUTE
def test_tokens_in_their_order_and_the_means_of_their_blocks(permute, case, device):
    q, k, v, order = made(case, device)
    found = permute(q, k, v, order)
    exact = reference.permute(q, k, v, order)
    assert found.key_bias is None and torch.equal(found.q, exact.q)
    assert torch.equal(found.k, exact.k) and torch.equal(found.v, exact.v)
    exact = reference.permute(q.double(), k.double(), v.double(), order).pooled
    for means, truth in ((found.pooled.k_mean, exact.k_mean), (found.pooled.v_mean, exact.v_mean)):
        assert means.dtype == q.dtype
        # bfloat16 has 8 bits, and Triton's interpreter truncates to them
        assert_within("means", means, truth, truth.abs().max().item() * 2**-7)
    assert_within("sizes", found.pooled.log_sizes, exact.log_sizes, 1e-6)
    assert found.pooled.log_sizes.dtype == torch.float32
    # a float32 logarithm of at most 64 is off by a unit of its last place, 2^-21, whoever takes it
    sizes = block_sizes(case[2]).double().log()
    assert_within("sizes", found.pooled.log_sizes[0].cpu(), sizes, 2**-21)


@PERMUTE
def test_queries_need_not_be_moved(permute, device):
    _, k, v, order = made(CASES[1], device)
    assert permute(None, k, v, order).q is None


@PERMUTE
def test_heads_may_share_an_order(permute, device):
    q, k, v, order = made(CASES[1], device)
    for shared in (order[:1, :1], order[:, :1], order[:1]):
        whole = shared.expand(q.shape[:3])
        assert torch.equal(permute(q, k, v, whole).k, reference.in_order(k, whole))


@pytest.mark.parametrize("value", [-2.0, 1.5])
@PERMUTE
def test_a_block_with_a_biased_key_has_no_mean(permute, value, device):
    q, k, v, order = made(CASES[1], device)
    order = order[:, :1].expand_as(order)
    key_bias = torch.zeros(2, 300, device=device)
    key_bias[1, 21] = value
    found = permute(q, k, v, order, key_bias)
    assert torch.equal(found.key_bias, reference.permute(q, k, v, order, key_bias).key_bias)
    block = int((order[1, 0] == 21).nonzero()) // 64
    hidden = (found.pooled.log_sizes == float("-inf")).nonzero().tolist()
    assert hidden == [[1, block]]


@PERMUTE
def test_a_second_call_gives_the_same_bits(permute, device):
    q, k, v, order = made(CASES[1], device)
    first, second = (permute(q, k, v, order).pooled for _ in range(2))
    assert torch.equal(first.k_mean, second.k_mean) and torch.equal(first.v_mean, second.v_mean)


@pytest.mark.parametrize("permute", implementations("permute", "triton"))
def test_refuses_an_order_that_is_none(permute, device):
    q, k, v, order = made(CASES[1], device)
    with pytest.raises(ValueError, match=r"`order` must be \[2, 3, 300\] int32, got \[2, 3, 299\]"):
        permute(q, k, v, order[..., :-1])
    with pytest.raises(ValueError, match=r"got \[300\]"):
        permute(q, k, v, order[0, 0])
    with pytest.raises(ValueError, match="int64"):
        permute(q, k, v, order.long())


@pytest.mark.parametrize("block", [64, 128, 192])
@pytest.mark.parametrize("L", [1, 64, 129, 300, 1000])
def test_means_of_larger_blocks(block, L):
    _, k, v = (x.double() for x in inputs.make(2, 2, L, L, 16, torch.float32, "cpu"))
    key_bias = torch.zeros(2, L)
    key_bias[1, L // 2] = -1.0
    order = torch.arange(L).expand(2, 2, L)
    pooled = reference.permute(None, k, v, order, key_bias).pooled
    found = pooled.of_blocks(L, block)
    assert (found is pooled) == (block == 64)
    for means, x in ((found.k_mean, k), (found.v_mean, v)):
        wanted = torch.stack([part.mean(-2) for part in x.split(block, -2)], -2)
        assert_within("means", means, wanted, 1e-6)
    sizes = torch.tensor([len(part) for part in order[0, 0].split(block)]).log()
    hidden = torch.arange(len(sizes)) == L // 2 // block
    assert_within("sizes", found.log_sizes[0], sizes, 1e-6)
    assert torch.equal(found.log_sizes[1] == float("-inf"), hidden)
