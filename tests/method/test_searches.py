"""Searches and sparse calls with a pooled tail; `test_run_tail.py` has them within a run."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.backends.choice import plain_torch
from sparse_attn.backends.reference import in_order
from sparse_attn.call import Call
from sparse_attn.config import TOKEN_ORDERS, AdaSpaConfig
from sparse_attn.method import block_scores as serving
from sparse_attn.token_layout import TokenLayout

TORCH = plain_torch()
LAYOUT, SCALE = TokenLayout(12, 5, 6, 14, 20), 0.25


def a_call():
    qkv = torch.randn(3, 2, 2, LAYOUT.tokens, 16).unbind(0)
    return Call(*qkv, SCALE, LAYOUT, step=0, dense=None)


def dense_with_lse(q, k, v, key_bias):
    return TORCH.attention(q, k, v, scale=SCALE, key_bias=key_bias)


@pytest.mark.parametrize("block_size", ["64", "128x64"])
@pytest.mark.parametrize("token_order", TOKEN_ORDERS)
def test_both_searches_find_the_same_and_bear_a_drift_of_the_lse(block_size, token_order):
    call = a_call()
    q, k, v = call.q, call.k, call.v
    config = AdaSpaConfig(block_size=block_size, token_order=token_order)
    first = serving.search_dense(TORCH, dense_with_lse, call, config)
    exact, lse = reference.dense_attention(q.double(), k.double(), v.double(), scale=SCALE)
    assert_within("out", first.out, exact, 1e-5)
    assert_within("lse", first.lse, lse, 1e-5)
    order = first.order.long()
    stale = first.lse + 0.4
    again = serving.search_again(TORCH, stale, call, config)
    assert again.out is None and again.lse is None and torch.equal(again.order, first.order)
    assert_within("masses", again.masses, first.masses.double(), 1e-3)
    assert_within("scores", again.scores, first.scores.double(), 5e-3 * first.scores.max().item())
    inputs = [in_order(x, order).double() for x in (q, k, v)]
    masses = reference.block_masses(
        *inputs[:2], lse.gather(-1, order), block_q=config.block_q, block_k=64, scale=SCALE
    )
    assert_within("masses", first.masses, masses, 1e-3)


def test_a_recall_needs_no_scores():
    config = AdaSpaConfig(recall=0.9)
    found = serving.search_dense(TORCH, dense_with_lse, a_call(), config)
    assert found.scores is None and found.masses is not None


def test_without_an_order_nothing_is_permuted():
    backend = replace(TORCH, permute=lambda *args: 1 / 0)
    call = a_call()
    config = AdaSpaConfig(tail="none")
    first = serving.search_dense(backend, dense_with_lse, call, config)
    again = serving.search_again(backend, first.lse, call, config)
    assert first.scores is None and again.scores is None
    assert_within("masses", again.masses, first.masses.double(), 1e-3)


def test_permuted_copies_are_gone_before_the_output_is_copied(monkeypatch):
    alive = []
    in_raster = serving.in_raster

    def noted(*args):
        found = TORCH.permute(*args)
        alive.extend(weakref.ref(x) for x in (found.q, found.k, found.v))
        return found

    def checked(*args):
        gc.collect()
        assert len(alive) == 3 and not any(ref() is not None for ref in alive)
        return in_raster(*args)

    monkeypatch.setattr(serving, "in_raster", checked)
    config = AdaSpaConfig(token_order="position")
    serving.search_dense(replace(TORCH, permute=noted), dense_with_lse, a_call(), config)
