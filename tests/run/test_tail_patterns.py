"""Runs with a pooled tail that begin with the pattern of another one."""

import pytest
import torch
from close import assert_within

from sparse_attn import block_mask
from sparse_attn.patterns.file import load, save
from sparse_attn.patterns.reuse import ONE_ORDER
from tests.method import truth
from tests.run.fakes import (
    SCALE,
)
from tests.run.tail_run import BOTH_ORDERS, LAYOUT, NAME, TailRun, in_order, tensors, with_tail

# grids that rods of 4 x 4 do not divide, text on both sides, a last block that is not full


def carried_from(**config):
    run = TailRun("Ss", **config)
    for step in range(2):
        run.attend(step, tensors(step), name=NAME)
    return run.state.end(keep_pattern=True).named("another run")


@BOTH_ORDERS
@pytest.mark.parametrize("most_pairs", [block_mask.MOST_PAIRS, 60, 25])
def test_a_carried_pattern_is_used_in_its_order(token_order, most_pairs, tmp_path, monkeypatch):
    # eleven blocks a side: a file has the small ones
    monkeypatch.setattr(block_mask, "MOST_PAIRS", most_pairs)
    pattern = carried_from(token_order=token_order)
    assert pattern.layers[NAME].bits.shape[-2:] == (11, 2)
    assert pattern.pooled and pattern.layout == LAYOUT
    own = token_order == "similarity"
    assert pattern.order == ("similarity" if own else "rods")
    assert (pattern.layers[NAME].order is not None) == own
    pattern = load(save(pattern, tmp_path, "pattern"))
    run = TailRun("Sss", carried=pattern)
    # clusters of other tokens would not hold enough here
    qkv = tensors(0 if own else 1)
    out, did = run.attend(0, qkv, name=NAME)
    assert did == ["permute", "sparse"]
    assert torch.equal(run.pattern().mask.bits, pattern.layers[NAME].bits)
    if own:
        assert torch.equal(run.order, pattern.layers[NAME].order)
    assert_within("out", out, with_tail(*qkv, run.pattern().mask, run.order), 1e-5)
    run.state.end_step()
    (shown,) = run.statistics.patterns.values()
    q, k, _ = in_order(run, *qkv)
    exact = truth.recall(q.double(), k.double(), run.keep, block_q=64, block_k=64, scale=SCALE)
    assert shown.recall == pytest.approx(exact[0].tolist(), abs=0.06)


def test_a_second_search_replaces_a_carried_pattern():
    run = TailRun("DsSs", one_pass=True, carried=carried_from())
    did = [run.attend(step, tensors(step), name=NAME)[1] for step in range(4)]
    # with the LSE of the dense step
    again = ["permute", "masses", "pooled masses", "permute", "sparse"]
    assert did[1:] == [["permute", "sparse"], again, ["permute", "sparse"]]
    assert not run.pattern().carried


def test_a_pattern_of_many_orders_is_refused_where_the_video_is_biased():
    run = TailRun("Ss", carried=carried_from(token_order="similarity"))
    bias = torch.zeros(1, LAYOUT.tokens)
    bias[:, 100] = -1.0
    run.attend(0, tensors(1), name=NAME, key_bias=bias)
    assert run.statistics.reuse.refused == {ONE_ORDER: 1} and not run.pattern().carried


@pytest.mark.parametrize("first, second", [("none", "pooled"), ("pooled", "none")])
def test_a_pattern_of_another_tail_is_refused_with_the_reason(first, second):
    pattern = carried_from(tail=first)
    run = TailRun("Ss", tail=second, carried=pattern)
    run.attend(0, tensors(0), name=NAME)
    reason = f"the pattern was found with `tail` {first}, and this run has {second}"
    assert run.statistics.reuse.refused == {reason: 1}
    assert run.keep is not None and not run.pattern().carried
