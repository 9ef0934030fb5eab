"""Which order a search with a pooled tail finds, keeps and uses again, with plain torch."""

import pytest
import torch
from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.block_mask import BlockMask
from sparse_attn.orders.packed import same_blocks
from sparse_attn.orders.position import serpentine_order
from sparse_attn.run import packed_lse
from tests.method.chosen import chosen
from tests.run.fakes import (
    SCALE,
)
from tests.run.tail_run import (
    BOTH_ORDERS,
    LAYOUT,
    PERMUTED,
    D,
    H,
    TailRun,
    dense,
    in_order,
    padded,
    tail_error,
    tensors,
    with_tail,
)


@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
@BOTH_ORDERS
def test_a_later_search_finds_the_new_pattern_with_the_old_lse(one_pass, token_order):
    run, later = TailRun("DSsSs", one_pass=one_pass, token_order=token_order), tensors(7)
    for step in range(3):
        if step or one_pass:
            run.attend(step, tensors(step))
    old, old_order = run.keep, run.order
    assert run.layer().lse is not None
    run.attend(3, later)
    new = run.keep
    assert not torch.equal(new, old) and run.layer().lse is None
    q, k, v = (x.double() for x in in_order(run, *later))
    scores = tail_error(q, k, v)
    best, _ = chosen(scores.float(), PERMUTED, run.state.config)
    spared = (scores * new).sum() / (scores * best).sum()
    assert spared > 0.95, "close to the choice with today's LSE"
    if token_order == "position":
        assert (scores * old).sum() < (scores * new).sum() and torch.equal(old_order, run.order)
        return
    assert not torch.equal(old_order, run.order), "an order of today's tokens"
    truth = dense(*later)
    left = [
        (with_tail(*later, BlockMask.from_dense(keep, block_q=64, block_k=64), order) - truth)
        .square()
        .mean()
        for keep, order in ((new, run.order), (old, old_order))
    ]
    assert left[0] < left[1]


@BOTH_ORDERS
def test_a_kept_lse_is_in_the_order_of_the_tokens(token_order):
    run = TailRun("DSsSs", one_pass=True, token_order=token_order)
    for step in range(2):
        q, k, v = tensors(step)
        run.attend(step, (q, k, v))
        exact = reference.scaled_logits(q, k, SCALE).logsumexp(-1)
        found = packed_lse.unpack(run.layer().lse, LAYOUT.tokens)
        spanned = (exact.amax(-1) - exact.amin(-1)).max().item()
        assert_within("lse", found, exact.double(), 1e-4 + 1.01 * spanned / 510)


def test_a_search_takes_the_heads_that_similarity_serves_better():
    """Head 0 looks all over the video for its like, head 1 around itself."""
    generator = torch.Generator().manual_seed(3)
    L = LAYOUT.tokens
    kinds = torch.randn(10, D, generator=generator) * 2
    strewn = torch.randint(10, (L,), generator=generator)
    q, k, v = tensors(4)
    q[0, 0] = kinds[strewn] + 0.1 * q[0, 0]
    k[0, 0] = kinds[strewn] + 0.1 * k[0, 0]
    run = TailRun("Ss", token_order="similarity")
    run.attend(0, (q, k, v))
    in_place = serpentine_order(LAYOUT, torch.device("cpu"))
    assert not torch.equal(run.order[0, 0], in_place)
    assert torch.equal(run.order[0, 0, LAYOUT.video :], in_place[LAYOUT.video :])
    alike = strewn[run.order[0, 0, : LAYOUT.video].long()].split(64)
    assert sum((x == x.mode().values).float().mean() for x in alike) / len(alike) > 0.6
    run.state.end_step()
    statistics = run.statistics
    (pattern,) = statistics.patterns.values()
    assert pattern.similar == [float(not torch.equal(x, in_place)) for x in run.order[0]]
    share = sum(pattern.similar) / 2
    assert statistics.patterns.similar() == statistics.as_dict()["heads_by_similarity"] == share > 0
    line = f"Token order: by similarity in {share:.0%} of the heads, else by position"
    assert line in statistics.lines()
    position = TailRun("Ss")
    position.attend(0, (q, k, v))
    assert torch.equal(position.order, in_place.expand(1, H, -1))


def test_a_bias_on_the_video_leaves_all_heads_one_order():
    run, qkv, bias = TailRun("Ss", token_order="similarity"), tensors(), padded()
    bias[:, 100] = -1.0
    run.attend(0, qkv, key_bias=bias)
    later = tensors(1)
    out, _ = run.attend(1, later, key_bias=bias)
    in_place = serpentine_order(LAYOUT, torch.device("cpu")).expand(1, H, -1)
    assert same_blocks(run.order, in_place, LAYOUT).all()
    assert torch.equal(run.order[0], run.order[0, :1].expand(H, -1))
    assert_within("out", out, with_tail(*later, run.pattern().mask, run.order, bias), 1e-5)


def test_a_replaced_order_takes_its_prefetched_copy_along():
    run, forgotten = TailRun("SSs", token_order="similarity"), []
    run.state.cache.forget = lambda *stored: forgotten.extend(stored)
    run.attend(0, tensors(0))
    old = run.pattern().mask.bits, run.pattern().order
    run.attend(1, tensors(1))
    assert [x is y for x, y in zip(forgotten, old, strict=True)] == [True, True]


def test_orders_are_kept_where_masks_are_and_fetched_ahead(monkeypatch):
    run = TailRun("Sss", token_order="similarity")
    cache, kept, ahead = run.state.cache, [], []
    cache.place = "cpu"
    keep = cache.keep
    monkeypatch.setattr(cache, "keep", lambda x: kept.append(x) or keep(x))
    monkeypatch.setattr(cache, "prefetch", lambda x, device: ahead.append(x))
    run.attend(0, tensors(0))
    run.state.layers.following["layer 0"] = "layer 0"
    run.state.layers.prefetch_next("layer 0", torch.device("cuda"))
    wanted = [run.pattern().mask.bits, run.pattern().order]
    assert all(x is y for x, y in zip(ahead, wanted, strict=True))
    assert any(torch.equal(x, run.pattern().order) for x in kept)
    run.layer().disable("a reason")
    assert run.pattern() is None and run.layer().nbytes() == 0
