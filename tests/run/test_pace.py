"""Never slower: where sparse calls take as long as dense ones, the rest of a run is dense."""

from types import SimpleNamespace

import pytest
import torch

from sparse_attn.run import timer
from sparse_attn.run.pace import DECIDING, FASTER, Pace, Speed
from tests.run import fakes
from tests.run.fakes import Backend, Run, host_attention, tensors


@pytest.fixture
def make_run(monkeypatch):
    """make_run(dense, sparse, kinds): a run whose calls take so many seconds."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(timer, "time", clock)

    def host(*qkv):
        clock.now += clock.dense
        return host_attention(*qkv)

    monkeypatch.setattr(fakes, "host_attention", host)

    class Slow(Backend):
        def attention(self, *qkv, mask=None, **options):
            clock.now += self.seconds[mask is not None]
            return super().attention(*qkv, mask=mask, **options)

    def make(dense, sparse, kinds="DSssss", pace=None, verdict="auto", **config):
        backend = Slow(one_pass=False)
        backend.seconds, clock.dense = (dense, sparse), dense
        run = Run(kinds, backend, dense_attention="host", verdict=verdict, **config)
        run.state.pace = pace or Pace()
        return run

    return make


def sampled(run, layers=DECIDING + 1):
    """Sample every step; by step, what the backend did for its first layer."""
    did = []
    for step in range(len(run.state.schedule.kinds)):
        run.state.enter_step(step)
        if step == 0:
            run.estimate(layers=layers)
        for layer in range(layers):
            qkv = tensors(layer)
            key = None if not run.attends(step, qkv) else layer
            _, found = run.attend(step, qkv, key=key, layer=layer)
            if layer == 0:
                did.append(found)
    run.state.end()
    return did


SEARCH = ["dense", "masks"]


def kinds(run):
    return "".join(kind.value[:2] for kind in run.state.schedule.kinds)


@pytest.mark.parametrize(
    "ratio, pays", [(0.5, True), (FASTER - 0.01, True), (FASTER + 0.01, False), (9, False)]
)
def test_the_rest_is_dense_where_sparse_is_not_clearly_faster(make_run, ratio, pays):
    run = make_run(1.0, ratio)
    did = sampled(run)
    assert did[2] == ["sparse"], "the calls that decide"
    assert did[3:] == 3 * [["sparse"] if pays else ["host"]]
    statistics = run.statistics
    assert statistics.speed.sparse == pytest.approx(ratio) and statistics.speed.pays == pays
    assert statistics.dense_from == (None if pays else 3)
    assert kinds(run) == "desesp" + 3 * ("sp" if pays else "de")
    assert not run.state.layers or pays, "what it held is let go"


def test_the_next_run_of_that_shape_is_dense_from_the_start(make_run):
    pace = Pace()
    sampled(make_run(1.0, 2.0, pace=pace))
    again = make_run(1.0, 2.0, pace=pace)
    assert sampled(again) == 6 * [["host"]] and not again.statistics.patterns
    assert "All ran dense: " in again.statistics.lines()[0]
    # another setting is judged anew
    assert ["sparse"] in sampled(make_run(1.0, 2.0, pace=pace, sparsity=0.5))


def test_a_verdict_falls_once(make_run):
    pace = Pace()
    sampled(make_run(1.0, 0.5, pace=pace))
    assert sampled(make_run(1.0, 2.0, pace=pace))[-1] == ["sparse"]


def test_pinned_to_sparse_reruns_are_equal_bit_for_bit(make_run):
    pace, outputs = Pace(), []
    for _ in range(2):
        run = make_run(1.0, 2.0, pace=pace, verdict="sparse")
        run.state.enter_step(1)
        run.attend(1)
        for step in range(2, 6):
            run.state.enter_step(step)
            for layer in range(DECIDING + 1):
                outputs.append(run.attend(step, tensors(layer))[0])
    half = len(outputs) // 2
    assert all(map(torch.equal, outputs[:half], outputs[half:]))
    assert not torch.equal(outputs[-1], host_attention(*tensors(DECIDING)))
    assert run.statistics.dense_from is None


def test_pinned_to_dense_searches_nothing(make_run):
    run = make_run(1.0, 0.1, verdict="dense")
    assert sampled(run) == 6 * [["host"]]
    assert "All ran dense: `verdict` is set to dense." in run.statistics.lines()[0]


def test_too_few_calls_decide_nothing(make_run):
    run = make_run(1.0, 2.0, kinds="DSs")
    sampled(run, layers=DECIDING)
    assert run.statistics.speed is None and not run.state.pace.verdicts


def test_without_a_dense_step_the_search_s_dense_pass_is_the_yardstick(make_run):
    run = make_run(1.0, 2.0, kinds="Sssss")
    sampled(run)
    assert run.statistics.speed == Speed(1.0, 2.0, 640) and run.statistics.dense_from == 2


def test_the_length_from_which_sparse_is_faster():
    # L = 1,000 and kept 0.2: a sparse call takes 0.2 L^2 and 0.8 L of something else
    speed = Speed(1.0, 1.0, 1000)
    least = speed.least_tokens(0.2)
    assert least == pytest.approx(1000 * 0.8 / 0.7, abs=50)
    for tokens, faster in ((least - 100, False), (least + 100, True)):
        dense = (tokens / 1000) ** 2
        sparse = 0.2 * dense + 0.8 * tokens / 1000
        assert (sparse < FASTER * dense) == faster
    # nothing is told of lengths far from the one that was measured
    assert Speed(1.0, 10.0, 1000).least_tokens(0.2) is None
    assert Speed(1.0, 1.0, 1000).least_tokens(0.95) is None
