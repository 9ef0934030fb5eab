"""What one attention call does, step by step, with plain torch and a counted host."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.block_mask import recall
from sparse_attn.config import BLOCK_SIZES
from sparse_attn.run import state as run_state
from sparse_attn.run.pace import Pace
from sparse_attn.schedule import StepKind
from tests.method.chosen import chosen
from tests.run.fakes import (
    LAYOUT,
    SCALE,
    Backend,
    L,
    Run,
    assert_best_choice,
    dense,
    exact_masses,
    tensors,
)

SEQUENCES = [
    # kinds, one pass, what each step's call does
    ("Sss", False, [["dense", "masses"], ["sparse"], ["sparse"]]),
    ("Sss", True, [["dense", "masses"], ["sparse"], ["sparse"]]),  # no earlier LSE yet
    ("DSs", True, [["dense"], ["dense with masses"], ["sparse"]]),
    ("SsSs", False, [["dense", "masses"], ["sparse"], ["masses", "sparse"], ["sparse"]]),
    ("SSSs", False, [["dense", "masses"], ["masses", "sparse"], ["masses", "sparse"], ["sparse"]]),
    ("DSSs", True, [["dense"], ["dense with masses"], ["masses", "sparse"], ["sparse"]]),
]


@pytest.mark.parametrize("kinds, one_pass, did", SEQUENCES, ids=lambda x: str(x)[:5])
def test_each_step_does_its_kind_of_work(kinds, one_pass, did):
    run = Run(kinds, Backend(one_pass))
    assert [run.attend(step, tensors(step))[1] for step in range(len(kinds))] == did


def test_the_first_search_answers_with_its_own_dense_output():
    run, qkv = Run("Ss"), tensors()
    out, _ = run.attend(0, qkv)
    assert_within("out", out, dense(*qkv), 1e-5)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("head_adaptive", [False, True], ids=["uniform", "head-adaptive"])
def test_a_sparse_step_attends_what_the_search_chose(head_adaptive, biased, block_size):
    run = Run("Ss", head_adaptive=head_adaptive, block_size=block_size)
    bias = None
    if biased:
        bias = torch.zeros(1, L)
        bias[:, 150:400] = -1e30
    first, later = tensors(0), tensors(1)
    run.attend(0, first, key_bias=bias)
    out, _ = run.attend(1, later, key_bias=bias)
    assert_best_choice(run, *first[:2], bias)
    exact, _ = reference.attention(
        *(x.double() for x in later), scale=SCALE, key_bias=bias, mask=run.pattern().mask
    )
    assert_within("out", out, exact, 1e-5)


def test_keeping_everything_equals_dense_at_every_step():
    run = Run("SsSs", sparsity=0.0)
    for step in range(4):
        qkv = tensors(step)
        assert_within("out", run.attend(step, qkv)[0], dense(*qkv), 1e-5)


def test_a_conditioning_that_first_appears_late_searches_then():
    run = Run("Ssss")
    run.attend(0)
    assert run.attend(2, key="late", role="negative")[1] == ["dense", "masses"]
    assert run.attend(2)[1] == ["sparse"]
    assert run.attend(3, key="late", role="negative")[1] == ["sparse"]


def test_a_second_call_of_the_same_search_step_runs_sparse():
    """As heun and cond/uncond windows do."""
    run = Run("SsSs")
    assert run.attend(0)[1] == ["dense", "masses"]
    assert run.attend(0)[1] == ["sparse"]
    assert run.attend(2)[1] == ["masses", "sparse"]
    assert run.attend(2)[1] == ["sparse"]


def test_a_later_search_finds_the_new_pattern_with_the_old_lse():
    run, first, later = Run("SSs"), tensors(0), tensors(1)
    run.attend(0, first)
    old = run.pattern().mask.to_dense()
    run.attend(1, later)
    mask = run.pattern().mask.to_dense()
    assert not torch.equal(mask, old)
    masses = exact_masses(*later[:2])
    _, held = chosen(masses, LAYOUT, run.state.config)
    assert (held - recall(masses, mask) < 0.02).all()


@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
def test_the_lse_lives_exactly_as_long_as_a_search_needs_it(one_pass):
    run = Run("DSsSs", Backend(one_pass))
    if one_pass:
        run.attend(0)
        assert run.layer().lse is not None and run.pattern() is None
    has_lse = []
    for step in range(1, 5):
        run.attend(step)
        has_lse.append(run.layer().lse is not None)
    assert has_lse == [True, True, False, False]
    run = Run("Sss")
    run.attend(0)
    assert run.layer().lse is None, "no later search needs it"


def test_only_a_backend_that_searches_in_one_pass_wants_an_lse_before():
    for one_pass in (False, True):
        run = Run("DDSs", Backend(one_pass))
        assert [run.attends(step) for step in range(4)] == [False, one_pass, True, True]


def test_a_replaced_mask_takes_its_prefetched_copy_along():
    run, forgotten = Run("SSs"), []
    run.state.cache.forget = lambda *stored: forgotten.extend(stored)
    run.attend(0)
    assert forgotten == []
    old = run.pattern().mask.bits
    run.attend(1)
    assert len(forgotten) == 2 and forgotten[0] is old and forgotten[1] is None


def test_layers_and_conditionings_do_not_share_masks():
    run = Run("Ss")
    for key, seed in (("a", 0), ("b", 1)):
        run.attend(0, tensors(seed), key=key)
    for key, seed in (("a", 0), ("b", 1)):
        assert_best_choice(run, *tensors(seed)[:2], key=key)


@pytest.mark.parametrize("declined", [(), (0,), (0, 1, 2)], ids=str)
def test_a_new_step_is_noticed_once(declined, monkeypatch):
    run = Run("DSs")
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(run_state, "time", clock)
    entered = []
    for step in (0, 0, 1, 1, 2):
        entered.append(run.state.enter_step(step))
        if step not in declined:
            run.attend(step)
        clock.now += 1.0
    run.state.end()
    assert entered == [True, False, True, False, True]
    # the host runs what is declined, whatever was planned
    kinds = StepKind.DENSE, StepKind.SEARCH, StepKind.SPARSE
    kinds = 3 * [StepKind.DENSE] if 2 in declined else kinds
    assert run.statistics.steps == list(zip(kinds, (2.0, 2.0, 1.0), strict=True))
    assert run.statistics.finished


def test_a_step_that_was_declined_tells_what_a_dense_one_takes(monkeypatch):
    run = Run("sSs")
    run.state.pace, run.state.work = Pace(), "work"
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(run_state, "time", clock)
    for step in range(3):
        run.state.enter_step(step)
        if step:
            run.attend(step)
        clock.now += 5.0 - step
    run.state.end()
    run.statistics.took = 12.0
    assert run.statistics.steps[0] == (StepKind.DENSE, 5.0)
    # its attention was not ours to time
    assert run.state.pace.dense_steps == {"work": (5.0, None)}
    assert run.statistics.seconds_dense() == 15.0


def test_a_declined_step_thins_no_attention_that_was_timed(monkeypatch):
    run = Run("DDDS")
    run.state.pace, run.state.work = Pace(), "work"
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(run_state, "time", clock)
    for step, took in enumerate((5.0, 9.0, 4.0)):
        run.state.enter_step(step)
        if step != 1:
            run.attend(step)
            run.statistics.timing.dense.append(took - 1)
        clock.now += took
    run.state.enter_step(3)
    took, attention = run.state.pace.dense_steps["work"]
    assert took == 4.0 and attention == pytest.approx(3.0, abs=0.3)


def test_without_a_backend_every_call_runs_on_the_host():
    run = Run("DSs")
    run.state.backends.of = lambda q, k, v: (None, "no backend")
    assert not run.attends(0)
    assert [run.attend(step)[1] for step in range(3)] == 3 * [["host"]]
    assert run.statistics.kept_dense == {"no backend": 3}


def test_other_errors_are_not_swallowed():
    run = Run("Ss")
    run.backend.fails["masses"] = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        run.attend(0)


def test_free_drops_every_tensor():
    run = Run("DSsSs", Backend(one_pass=True))
    for step in range(3):
        for key in ("a", "b"):
            run.attend(step, key=key)
    states = [run.layer(key) for key in ("a", "b")]
    found = [weakref.ref(x) for s in states for x in (s.lse, s.pattern.mask.bits)]
    found += [weakref.ref(pending[1]) for pending in run.state.readback._patterns]
    assert len(found) > 4 and all(ref() is not None for ref in found)
    del states
    run.state.free()
    gc.collect()
    assert [ref() for ref in found] == len(found) * [None]


def test_an_interrupted_run_frees_without_reading_the_device():
    run = Run("Sss")
    run.attend(0)
    run.state.free()
    run.state.end_step()
    assert run.statistics.patterns == {} and not run.statistics.finished
