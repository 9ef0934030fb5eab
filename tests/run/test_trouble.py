"""NaN and no memory: the video still comes out, and the report says what happened."""

import weakref

import pytest
import torch
from close import assert_within

from sparse_attn.run import state as run_state
from sparse_attn.run.state import NOT_A_NUMBER, OUT_OF_MEMORY
from tests.run.fakes import Run, call_of, dense, host_attention, no_memory, tensors


@pytest.mark.parametrize("place", range(3), ids="qkv")
@pytest.mark.parametrize("step", [0, 1], ids=["search", "sparse"])
def test_nan_gives_the_dense_result_and_is_reported(step, place):
    run = Run("Sss", first=7)
    if step:
        run.attend(0)
    broken = tensors()
    broken[place][0, 1, 100, 3] = float("nan")
    out, did = run.attend(step, broken)
    assert did[-1] == "host"
    expected = host_attention(*broken)
    assert torch.equal(out.isnan(), expected.isnan())
    # the layer stays dense, another one does not
    assert run.attend(2)[1] == ["host"]
    assert run.attend(2, key="other")[1] == ["dense", "masses"]
    run.state.end_step()
    statistics = run.statistics
    assert statistics.kept_dense == {NOT_A_NUMBER: 2}
    assert statistics.warnings == [
        f"{NOT_A_NUMBER}: the layers concerned run dense from step {7 + step}"
    ]
    assert run.layer().mask is None and run.layer().lse is None


def test_nan_in_a_search_leaves_no_pattern():
    run = Run("Ss")
    q, k, v = tensors()
    k[0, 0, 5, 5] = float("nan")
    run.attend(0, (q, k, v))
    run.state.end_step()
    assert run.statistics.patterns == {}


@pytest.mark.parametrize("at", ["dense", "masses"])
def test_out_of_memory_in_the_first_search_keeps_sampling_dense(at):
    run, qkv = Run("Sss"), tensors()
    run.backend.fails[at] = no_memory()
    out, did = run.attend(0, qkv)
    assert did[-1] == "host"
    assert_within("out", out, dense(*qkv), 1e-5)
    assert run.attend(1)[1] == ["host"]
    assert run.statistics.kept_dense == {OUT_OF_MEMORY: 2}
    assert run.statistics.warnings == [
        f"{OUT_OF_MEMORY}: the layers concerned run dense from step 0"
    ]


def test_out_of_memory_lets_go_of_the_search_before_the_dense_pass():
    """An exception's traceback holds the frames, and with them the tensors, that ran out."""
    run, alive = Run("Ss"), []

    def out_of_memory(q, *args, **options):
        large = torch.empty(100)
        alive.append(weakref.ref(large))
        raise no_memory()

    def host(heads=None):
        alive_now.append(alive[0]() is not None)
        return host_attention(*tensors())

    alive_now = []
    run.backend.block_masses = out_of_memory
    run.state.attend(call_of(tensors(), dense=host))
    assert alive_now == [False]


def test_out_of_memory_in_a_later_search_keeps_the_pattern():
    run = Run("SSs")
    run.attend(0)
    old = run.layer().mask
    run.backend.fails["masses"] = no_memory()
    assert run.attend(1, layer=3)[1] == ["masses", "sparse"]
    assert run.layer().mask is old and run.layer().lse is None
    assert run.attend(1)[1] == ["sparse"], "does not try again in the same step"
    assert run.statistics.warnings == [f"{OUT_OF_MEMORY}: layer 3 kept its earlier pattern"]


def test_out_of_memory_while_sampling_costs_the_sample_alone(monkeypatch):
    def out_of_memory(*args, **options):
        raise no_memory()

    monkeypatch.setattr(run_state, "sampled_recall", out_of_memory)
    run = Run("Ss", recall=0.8)
    run.attend(0)
    assert run.attend(1, layer=5)[1] == ["sparse"]
    run.state.end_step()
    statistics = run.statistics
    assert statistics.samples == {}
    assert statistics.warnings == ["out of memory while sampling the recall of layer 5"]


def test_out_of_memory_in_a_later_exact_search_keeps_the_pattern():
    run = Run("SSs", recall=0.8)
    run.attend(0)
    old = run.layer().mask
    run.backend.fails["masses"] = no_memory()
    assert run.attend(1, layer=3)[1] == ["dense", "masses", "sparse"]
    assert run.layer().mask is old
    assert run.attend(1)[1] == ["sparse"], "does not try again in the same step"
    assert run.statistics.warnings == [f"{OUT_OF_MEMORY}: layer 3 kept its earlier pattern"]
