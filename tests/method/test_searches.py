"""Both searches with a pooled tail; `tests/run/test_tail.py` has them within a run."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.backends.reference import in_order
from sparse_attn.call import Call
from sparse_attn.config import TOKEN_ORDERS, AdaSpaConfig
from sparse_attn.method.fused_online_search import fused_online_search
from sparse_attn.method.lse_cached_search import lse_cached_search
from sparse_attn.method.query_sample import query_sample
from sparse_attn.orders.position import serpentine_order
from sparse_attn.token_layout import TokenLayout
from tests.method.chosen import TORCH, measured

LAYOUT, SCALE = TokenLayout(12, 5, 6, 14, 20), 0.25


def a_call():
    qkv = torch.randn(3, 2, 2, LAYOUT.tokens, 16).unbind(0)
    by_position = serpentine_order(LAYOUT, torch.device("cpu"))
    return Call(*qkv, SCALE, LAYOUT, step=0, dense=None, by_position=by_position)


def dense(call):
    return TORCH.attention(call.q, call.k, call.v, scale=call.scale, key_bias=call.key_bias)


def search(config, call, backend=TORCH):
    """What a search with dense attention finds, and what it chooses by."""
    with measured() as seen:
        found = fused_online_search(backend, call, config, None, dense)
    return found, seen


def test_one_pass_takes_the_earlier_lse_in_the_order_of_its_rows():
    """As the kernels search, which know an earlier LSE in the order of the tokens."""

    def attention_with_masses(q, k, v, *, previous_lse, scale, key_bias, **blocks):
        masses = TORCH.block_masses(q, k, previous_lse, scale=scale, key_bias=key_bias, **blocks)
        return *TORCH.attention(q, k, v, scale=scale, key_bias=key_bias), masses

    backend = replace(TORCH, one_pass_search=True, attention_with_masses=attention_with_masses)
    call = a_call()
    # rows whose LSE differ; else masses would hardly tell whose they got
    call = replace(call, q=call.q * torch.linspace(0, 4, LAYOUT.tokens)[:, None])
    qkv = [x.double() for x in (call.q, call.k, call.v)]
    _, lse = reference.attention(*qkv, scale=SCALE)
    with measured() as seen:
        found = fused_online_search(
            backend, call, AdaSpaConfig(token_order="position"), lse.float(), dense
        )
    order = found.order.long()
    q, k, _ = (in_order(x, order) for x in qkv)
    exact = reference.block_masses(
        q, k, lse.gather(-1, order), block_q=64, block_k=64, scale=SCALE
    )  # fmt: skip
    assert_within("masses", seen.masses, exact, 1e-3)
    assert not found.exact


def test_rows_whose_kept_lse_leaves_them_no_mass_stay_finite():
    call, config = a_call(), AdaSpaConfig(token_order="position")
    found, _ = search(config, call)
    stale = found.lse.clone()
    # the first block of rows: exp(score - 500) is 0 in float32
    stale[..., found.order[0, 0, :64].long()] = 500.0
    later, seen = search_again(config, call, stale)
    assert not seen.masses[:, :, 0].any() and seen.masses[:, :, 1:].all()
    assert seen.masses.isfinite().all() and seen.scores.isfinite().all()
    assert later.recall.isfinite().all()


def search_again(config, call, lse, backend=TORCH):
    """The same of a search with a kept LSE."""
    with measured() as seen:
        found = lse_cached_search(backend, call, config, lse, int8=False)
    return found, seen


@pytest.mark.parametrize("block_size", ["64", "128x64"])
@pytest.mark.parametrize("token_order", TOKEN_ORDERS)
def test_both_searches_find_the_same_and_bear_a_drift_of_the_lse(block_size, token_order):
    call = a_call()
    q, k, v = call.q, call.k, call.v
    config = AdaSpaConfig(block_size=block_size, token_order=token_order)
    found, first = search(config, call)
    exact, lse = reference.attention(q.double(), k.double(), v.double(), scale=SCALE)
    assert_within("out", found.out, exact, 1e-5)
    assert_within("lse", found.lse, lse, 1e-5)
    order = found.order.long()
    stale = found.lse + 0.4
    later, again = search_again(config, call, stale)
    assert later.out is None and later.lse is None and torch.equal(later.order, found.order)
    assert_within("masses", again.masses, first.masses.double(), 1e-3)
    assert_within("scores", again.scores, first.scores.double(), 5e-3 * first.scores.max().item())
    inputs = [in_order(x, order).double() for x in (q, k, v)]
    masses = reference.block_masses(
        *inputs[:2], lse.gather(-1, order), block_q=config.block_q, block_k=64, scale=SCALE
    )
    assert_within("masses", first.masses, masses, 1e-3)


@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("block_size", ["64", "128x64"])
@pytest.mark.parametrize(
    "tail, token_order", [("none", "position"), ("pooled", "position"), ("pooled", "similarity")]
)
def test_a_sample_of_rows_is_measured_exactly(tail, token_order, block_size, later):
    call = a_call()
    config = AdaSpaConfig(
        block_size=block_size, tail=tail, token_order=token_order, query_stride=4
    )  # fmt: skip
    found, seen = search(config, call)
    if later:
        # what all rows of a block have drifted by cancels
        lse = found.lse + 0.4
        found, seen = search_again(config, call, lse)
    assert not found.exact
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    order = torch.arange(LAYOUT.tokens).expand(2, 2, -1)
    if found.order is not None:
        order = found.order.long()
    _, lse = reference.attention(q, k, v, scale=SCALE)
    rows = order[..., query_sample(LAYOUT.tokens, 4, call.q.device)]
    q, lse = in_order(q, rows), lse.gather(-1, rows)
    options = {"block_q": config.block_q // 4, "scale": SCALE}
    moved = reference.permute(None, k, v, order)
    masses = reference.block_masses(q, moved.k, lse, block_k=64, **options)
    assert_within("masses", seen.masses, masses, 1e-3)
    if found.order is not None:
        pooled = moved.pooled
        means = reference.pooled_masses(q, pooled.k_mean, pooled.log_sizes, lse, **options)
        scores = reference.tail_error(masses, means, moved.v, pooled.v_mean)
        assert_within("scores", seen.scores, scores, 5e-3 * scores.max().item())


def test_a_recall_is_found_by_all_rows():
    _, seen = search(AdaSpaConfig(recall=0.9, query_stride=4), a_call())
    assert_within("rows", seen.masses.sum(-1)[..., 0], torch.full((2, 2), 64.0), 1e-3)


def test_a_recall_needs_no_scores():
    _, seen = search(AdaSpaConfig(recall=0.9), a_call())
    assert seen.scores is None and seen.masses is not None


def test_without_an_order_nothing_is_permuted():
    backend = replace(TORCH, permute=lambda *args: 1 / 0)
    call = a_call()
    config = AdaSpaConfig(tail="none")
    found, first = search(config, call, backend)
    later, again = search_again(config, call, found.lse, backend)
    assert found.order is None and later.order is None
    assert first.scores is None and again.scores is None
    assert_within("masses", again.masses, first.masses.double(), 1e-3)


def test_permuted_copies_go_as_soon_as_nothing_needs_them():
    alive = []

    def noted(*args):
        found = TORCH.permute(*args)
        alive.extend(weakref.ref(x) for x in (found.q, found.k, found.v))
        return found

    def after(operation, gone):
        def checked(*args, **options):
            gc.collect()
            assert [ref() is None for ref in alive] == gone
            return operation(*args, **options)

        return checked

    backend = replace(
        TORCH,
        permute=noted,
        pooled_masses=after(TORCH.pooled_masses, [False, True, False]),
        tail_error=after(TORCH.tail_error, [True, True, False]),
        row_wise_top_k=after(TORCH.row_wise_top_k, [True, True, True]),
    )
    search(AdaSpaConfig(token_order="position"), a_call(), backend)
