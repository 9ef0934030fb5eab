"""Density, recall, seconds and memory that a run shows, against counting them."""

from types import SimpleNamespace

import pytest
import torch

from sparse_attn import block_mask
from sparse_attn.run import timer
from tests.method import truth
from tests.run.fakes import BLOCKS, LAYOUT, Backend, Run, tensors


def test_patterns_hold_the_true_density_and_recall():
    run = Run("DDSs", Backend(one_pass=True), first=3)
    qkv = tensors(batch=2)
    run.attend(2, qkv, layer=4)
    run.state.end_step()
    ((key, pattern),) = run.statistics.patterns.items()
    assert key == (4, "positive") and pattern.step == 5 and pattern.exact
    keep = run.pattern().mask.to_dense()
    true = truth.recall(*(x.double() for x in qkv[:2]), keep, **BLOCKS).mean(0)
    assert pattern.recall == pytest.approx(true.tolist(), abs=1e-5)
    density = keep.double().mean((-1, -2)).mean(0)
    assert pattern.density == pytest.approx(density.tolist(), abs=1e-6)
    assert torch.equal(pattern.block_map, keep[0].to(torch.uint8) * 255)


@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
def test_recall_of_a_search_in_one_pass_is_called_an_estimate(one_pass):
    run = Run("DSs", Backend(one_pass))
    if one_pass:
        run.attend(0, tensors(0))
    run.attend(1, tensors(1))
    run.state.end_step()
    assert run.statistics.patterns.exact() == (not one_pass)


def test_recall_of_a_later_search_is_called_an_estimate():
    run = Run("SSs")
    run.attend(0)
    run.attend(1)
    run.state.end_step()
    assert not run.statistics.patterns[0, "positive"].exact
    assert not run.statistics.patterns.exact()


def test_seconds_are_counted_per_kind_and_video(monkeypatch):
    run = Run("DSsSs", Backend(one_pass=False))
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(timer, "time", clock)

    def slow(name, seconds):
        function = getattr(run.backend, name)

        def slowed(*args, **options):
            clock.now += seconds(**options)
            return function(*args, **options)

        setattr(run.backend, name, slowed)

    slow("attention", lambda mask=None, **_: 8.0 if mask is None else 2.0)
    slow("block_masses", lambda **_: 4.0)
    qkv = tensors(batch=2)
    with run.state.timer.measure("dense", qkv[0]):
        clock.now += 8.0
    for step in range(1, 5):
        run.attend(step, qkv)
    timing = run.statistics.timing
    assert timing.dense == [4.0, 4.0] and timing.search == [6.0, 6.0]
    assert timing.search_dense == [4.0, 4.0] and timing.search_again == [2.0, 2.0]
    assert timing.sparse == 6 * [1.0]
    # dense, 8 rows of 4 s after the first step; they took 12 s of search, 4 s of search again, 6 s
    assert timing.saved() == pytest.approx(32 - 12 - 4 - 6)


def test_held_memory_is_the_sum_of_masks_and_lse():
    run = Run("SsSs")
    for key in ("a", "b"):
        run.attend(0, key=key)
    one = run.pattern("a").mask.bits.nbytes + run.layer("a").lse.nbytes
    assert run.statistics.memory.held_bytes == 2 * one
    run.state.free()
    assert run.statistics.memory.held_bytes == 2 * one, "the fullest moment, not the last"


@pytest.mark.parametrize("config", [{}, {"block_size": "128x64"}, {"recall": 0.8}], ids=str)
@pytest.mark.parametrize("kinds", ["Sss", "DSs", "SsSs", "DSSs", "DDD"])
@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
@pytest.mark.parametrize("most_pairs", [block_mask.MOST_PAIRS, 16])
def test_memory_is_predicted_to_the_byte(monkeypatch, kinds, one_pass, config, most_pairs):
    monkeypatch.setattr(block_mask, "MOST_PAIRS", most_pairs)
    run = Run(kinds, Backend(one_pass), **config)
    q, k, v = tensors(batch=2)
    run.estimate((q, k, v), layers=3)
    for step in range(len(kinds)):
        for layer in range(3):
            if run.attends(step, (q, k, v)):
                run.attend(step, (q, k, v), key=layer, layer=layer)
    statistics = run.statistics
    assert statistics.memory.held_bytes == statistics.memory.predicted_bytes
    assert (statistics.memory.held_bytes > 0) == ("S" in kinds)
    assert statistics.layout == (LAYOUT if "S" in kinds else None)


PLACES = [
    # cache, free bytes, where the cache lives
    ("auto", None, "cpu"),  # no GPU at all
    ("auto", 10**12, "gpu"),
    ("auto", 10**3, "cpu"),  # short of memory
    ("gpu", 10**3, "gpu"),
    ("cpu", 10**12, "cpu"),
]


@pytest.mark.parametrize("cache, free_bytes, place", PLACES)
def test_where_the_cache_lives(cache, free_bytes, place):
    run = Run("Ss", cache=cache, free_bytes=free_bytes)
    run.estimate(layers=60)
    run.attend(0)
    assert run.statistics.memory.place == place
    if free_bytes is not None:
        assert run.state.cache.place == place


def test_the_summary_of_a_whole_run():
    run = Run("DSsSs", sparsity=0.7)
    run.estimate()
    for step in range(1, 5):
        run.state.enter_step(step)
        run.attend(step)
    run.state.end()
    statistics = run.statistics
    statistics.timing.dense = [9.0]
    statistics.timing.search, statistics.timing.search_again = [12.0], [4.0]
    statistics.timing.sparse = [2.0] * 3
    mean, worst = statistics.patterns.recall()
    assert 0.5 < worst <= mean <= 1
    # ten blocks: the first is a sink, the others keep three of ten each
    assert statistics.lines()[1] == (
        "640 tokens, steps 1 dense, 2 search, 3 sparse, 4 search, 5 sparse, density 0.37, "
        f"recall {mean:.2f} (estimated), worst head {worst:.2f}, saved 14 s of attention"
    ).replace("14 s", "14.0 s")


@pytest.mark.parametrize("read", [False, True], ids=["before a pattern", "after one"])
def test_an_interrupted_run_says_where_it_was_stopped(read):
    run = Run("Sss", first=7)
    for step in range(3 if read else 1):
        run.state.enter_step(step)
        run.attend(step)
    run.state.stop()
    statistics = run.statistics
    assert statistics.stopped_at == (9 if read else 7) and not statistics.finished
    first, *others = statistics.lines()
    assert first == f"Stopped at step {10 if read else 8} of 10."
    # only the steps that it did
    numbers = "tokens, steps 8 search, 9-10 sparse, density 0."
    assert any(numbers in line for line in others) == read
    assert statistics.as_dict()["stopped_at"] == statistics.stopped_at
