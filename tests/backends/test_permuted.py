import pytest
import torch
from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.backends.permuted import block_sizes
from sparse_attn.backends.reference import in_order
from sparse_attn.backends.torch.block_masses import pooled_masses
from sparse_attn.backends.torch.permute import permute
from sparse_attn.orders.position import rods
from sparse_attn.token_layout import TokenLayout

CPU = torch.device("cpu")
# 7 blocks of which the last holds 20 tokens; and whole blocks only
RAGGED, WHOLE = TokenLayout(20, 4, 6, 15, 24), TokenLayout(0, 4, 8, 16)
LAYOUTS = [RAGGED, WHOLE, TokenLayout(0, 1, 2, 5)]


def orders(layout, own=True):
    """[2, 2, L]: that of rods, and its video turned round in the other head of each."""
    order = rods(layout, CPU).expand(2, 2, -1)
    if own:
        order = order.clone()
        order[:, 1, : layout.video] = order[:, 1, : layout.video].flip(-1)
    return order


def tensors(layout, dtype=torch.float32):
    shape = 3, 2, layout.tokens, 2, 16
    return [x.transpose(1, 2) for x in torch.randn(shape).to(dtype)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.describe())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_in_their_order_and_the_means_of_their_blocks(layout, dtype):
    q, k, v = tensors(layout, dtype)
    order = orders(layout)
    found = permute(q, k, v, order)
    assert torch.equal(found.q, in_order(q, order)) and found.key_bias is None
    for x, tokens, means in (
        (k, found.k, found.pooled.k_mean),
        (v, found.v, found.pooled.v_mean),
    ):
        assert tokens.dtype == means.dtype == dtype
        assert torch.equal(tokens, in_order(x, order))
        exact = reference.block_means(in_order(x, order).double(), 64)
        assert_within("means", means, exact, 1e-6 if dtype == torch.float32 else 4e-3)
    sizes = [min(64, layout.tokens - 64 * i) for i in range(layout.num_blocks(64))]
    assert block_sizes(layout.tokens).tolist() == sizes
    assert_within("sizes", found.pooled.log_sizes.exp(), torch.tensor([sizes] * 2), 1e-4)


def test_queries_need_not_be_moved():
    _, k, v = tensors(RAGGED)
    assert permute(None, k, v, orders(RAGGED)).q is None


def test_a_block_with_a_biased_key_has_no_stand_in():
    layout = RAGGED
    order = orders(layout, own=False)
    key_bias = torch.zeros(2, layout.tokens)
    key_bias[1, 21] = -2.0
    found = permute(*tensors(layout), order, key_bias)
    assert torch.equal(found.key_bias, key_bias[:, order[0, 0]])
    block = int((order[0, 0] == 21).nonzero()) // 64
    hidden = (found.pooled.log_sizes == float("-inf")).nonzero().tolist()
    assert hidden == [[1, block]]


def test_means_never_get_more_than_their_keys():
    """By Jensen's inequality, and exactly that much: against the float64 reference."""
    layout = RAGGED
    q, k, v = tensors(layout)
    order = orders(layout)
    found = permute(q, k, v, order)
    inputs = [in_order(x, order).double() for x in (q, k)]
    lse = reference.scaled_logits(*inputs, 0.25).logsumexp(-1)
    for block_q in (64, 128):
        options = {"block_q": block_q, "scale": 0.25}
        pooled = pooled_masses(
            found.q, found.pooled.k_mean, found.pooled.log_sizes, lse.float(), **options
        )
        means = reference.block_means(inputs[1], 64)
        weights = reference.weights_of(reference.scaled_logits(inputs[0], means, 0.25), lse)
        weights = weights * block_sizes(layout.tokens)
        exact = torch.stack([x.sum(-2) for x in weights.split(block_q, -2)], -2)
        assert_within("pooled", pooled, exact, 1e-4)
        masses = reference.block_masses(*inputs, lse, block_k=64, **options)
        assert (pooled <= masses + 1e-4).all() and (pooled > 0).all()
