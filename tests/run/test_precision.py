"""Which calls of a run are served in low precision, and what happens where that cannot be."""

import pytest
from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.run.precision import NOT_ALLOWED, OUT_OF_MEMORY
from tests.run.fakes import (
    SCALE,
    TORCH,
    Backend,
    Run,
    call_of,
    coarse,
    dense,
    exact_masses,
    no_memory,
    tensors,
)


@pytest.mark.parametrize("block_size", ["64", "128x64"])
def test_sparse_steps_and_later_searches_run_in_the_precision_asked_for(block_size):
    run = Run("DSsSs", Backend(one_pass=True), precision="int8", block_size=block_size)
    did = [run.attend(step, tensors(step))[1] for step in range(5)]
    # exact attention is fastest here, and measures masses on the way
    assert did == [["dense"], ["dense with masses"], ["int8"], ["int8 masses", "int8"], ["int8"]]
    config = run.state.config
    assert run.backend.asked == (config.block_q, config.block_k)
    q, k, v = tensors(4)
    out, _ = run.attend(4, (q, k, v))
    inputs = [x.double() for x in (q, k, coarse(v))]
    exact, _ = reference.attention(*inputs, scale=SCALE, mask=run.pattern().mask)
    assert_within("out", out, exact, 1e-5)
    statistics = run.statistics
    assert statistics.low_precision.calls == 4 and not statistics.low_precision.declined
    text = "\n".join(statistics.lines())
    assert "Precision: 4 calls in int8\nSearches in int8: 1 calls" in text
    assert statistics.as_dict()["low_precision_searches"] == 1


@pytest.mark.parametrize("one_pass", [False, True])
def test_where_int8_is_fastest_the_first_search_runs_in_it(one_pass):
    run, qkv = Run("DSsSs", Backend(one_pass=one_pass), precision="int8"), tensors()
    run.make_fastest("own int8")
    did = [run.attend(step, qkv)[1] for step in range(5)]
    search = ["int8", "int8 masses"]
    assert did == [["int8"], search, ["int8"], ["int8 masses", "int8"], ["int8"]]
    q, k, v = qkv
    out, _ = Run("S", Backend(), precision="int8").attend(0, qkv)
    assert_within("exact", out, dense(*qkv), 1e-5)
    run = Run("Ss", Backend(one_pass=one_pass), precision="int8")
    run.make_fastest("own int8")
    out, did = run.attend(0, qkv)
    assert did == search and not run.pattern().recall.isnan().any()
    assert_within("out", out, dense(q, k, coarse(v)), 1e-5)
    low = run.statistics.low_precision
    assert (low.calls, low.searches, dict(low.declined)) == (1, 1, {})
    run.state.end_step()
    # the masses are of other q and k than the model's
    assert not run.statistics.patterns.exact()


def test_a_recall_is_measured_exactly_where_int8_is_fastest():
    run = Run("DSs", Backend(), precision="int8", recall=0.9)
    run.make_fastest("own int8")
    assert run.attend(1)[1] == ["dense", "masses"] and run.statistics.low_precision.searches == 0


def test_out_of_memory_in_a_first_search_in_int8_searches_exactly():
    run, qkv = Run("DSs", Backend(one_pass=True), precision="int8"), tensors()
    run.make_fastest("own int8")
    run.attend(0, qkv)
    run.backend.fails["int8 masses"] = no_memory()
    out, did = run.attend(1, qkv)
    assert did == ["int8", "int8 masses", "dense with masses"]
    assert_within("out", out, dense(*qkv), 1e-5)
    assert run.statistics.low_precision.declined == {OUT_OF_MEMORY: 1}
    assert run.statistics.low_precision.searches == 0 and not run.statistics.warnings


def test_a_later_search_stays_exact_where_low_precision_is_not_to_be_had():
    run = Run("SsSs", precision="int8")
    run.backend.refuses = "needs an NVIDIA card for eight bits"
    did = [run.attend(step, tensors(step))[1] for step in range(4)]
    assert did[2] == ["masses", "sparse"] and run.statistics.low_precision.searches == 0
    assert not any("Searches" in line for line in run.statistics.lines())


def test_fp8_of_older_graphs_runs_as_int8_and_says_so():
    run = Run("Ss", precision="fp8")
    assert [run.attend(step)[1] for step in range(2)] == [["dense", "masses"], ["int8"]]
    lines = run.statistics.lines()
    assert "Precision: 1 calls in int8" in "\n".join(lines)
    assert (
        "Note: precision fp8 runs as int8, which is as fast and closer to the dense video" in lines
    )


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_nobody_runs_in_low_precision_unasked(precision):
    run = Run("Ss", precision=precision)
    assert [run.attend(step)[1] for step in range(2)] == [["dense", "masses"], ["sparse"]]
    assert not any("recision" in line for line in run.statistics.lines())


def test_a_declined_call_runs_as_usual_and_is_counted_with_the_reason():
    run = Run("Sss", precision="int8")
    run.backend.refuses = "needs an NVIDIA card for eight bits"
    assert [run.attend(step)[1] for step in range(3)] == [
        ["dense", "masses"], ["sparse"], ["sparse"],
    ]  # fmt: skip
    assert run.statistics.low_precision.declined == {run.backend.refuses: 2}
    text = "\n".join(run.statistics.lines())
    assert "Precision: 0 calls in int8\nNot in int8: 2 calls, needs an NVIDIA card" in text


def test_a_call_that_the_host_wants_exact_stays_exact():
    run = Run("Ss", precision="int8")
    run.attend(0)
    assert run.attend(1, low_precision=False)[1] == ["sparse"]
    assert run.statistics.low_precision.declined == {NOT_ALLOWED: 1}


def test_out_of_memory_while_quantising_runs_as_usual():
    run, qkv = Run("Ss", precision="int8"), tensors()
    run.attend(0, qkv)
    run.backend.fails["int8"] = no_memory()
    out, did = run.attend(1, qkv)
    assert did == ["int8", "sparse"]
    mask = run.pattern().mask
    exact, _ = reference.attention(*(x.double() for x in qkv), scale=SCALE, mask=mask)
    assert_within("out", out, exact, 1e-5)
    assert sum(run.statistics.low_precision.declined.values()) == 1


def test_plain_torch_says_why_it_computes_as_it_does():
    run = Run("Ss", TORCH, precision="int8")
    for step in range(2):
        run.state.attend(call_of(tensors(), step))
    assert run.statistics.low_precision.declined == {"plain torch computes in float32": 1}


DENSE_PRECISIONS = [
    # fastest, config, what served, calls in low precision
    ("own int8", {"precision": "int8"}, "int8", 1),
    ("own", {"precision": "int8"}, "dense", 0),
    ("host", {"precision": "int8"}, "host", 0),
    ("own int8", {"precision": "int8", "dense_attention": "host"}, "host", 0),
    ("own int8", {}, "dense", 0),
]


@pytest.mark.parametrize("fastest, config, served, calls", DENSE_PRECISIONS)
def test_a_dense_step_runs_in_low_precision_where_that_is_fastest(fastest, config, served, calls):
    run, qkv = Run("DDS", **config), tensors()
    run.make_fastest(fastest)
    out, did = run.attend(0, qkv, key=None)
    statistics = run.statistics
    assert statistics.low_precision.calls == calls
    assert did == [served]
    q, k, v = qkv
    assert_within("out", out, dense(q, k, coarse(v) if served == "int8" else v), 1e-5)
    if served != "dense":
        said = {"int8": "own int8, not exact", "host": "host"}
        assert statistics.dense_choice == said[served]


@pytest.mark.parametrize("fastest, config, served, calls", DENSE_PRECISIONS)
def test_the_dense_step_before_a_search_does_too(fastest, config, served, calls):
    run, qkv = Run("DS", Backend(one_pass=True), **config), tensors()
    run.make_fastest(fastest)
    run.statistics.dense_choice = "what earlier dense steps said"
    out, did = run.attend(0, qkv)
    # the host's attention keeps no LSE
    assert did == ["int8" if served == "int8" else "dense"]
    statistics = run.statistics
    assert statistics.low_precision.calls == calls
    said = "own int8, not exact" if served == "int8" else "what earlier dense steps said"
    assert statistics.dense_choice == said
    q, k, v = qkv
    assert_within("out", out, dense(q, k, coarse(v) if served == "int8" else v), 1e-5)
    search = ["int8", "int8 masses"] if served == "int8" else ["dense with masses"]
    assert run.attend(1, qkv)[1] == search
    # the largest mass of every row
    largest = exact_masses(q, k).argmax(-1, keepdim=True)
    assert run.pattern().mask.to_dense().gather(-1, largest).all()


def test_a_dense_step_before_a_search_that_memory_cannot_quantise_is_exact():
    run, qkv = Run("DS", Backend(one_pass=True), precision="int8"), tensors()
    run.make_fastest("own int8")
    run.backend.fails["int8"] = no_memory()
    out, did = run.attend(0, qkv)
    assert did == ["int8", "dense"]
    assert_within("out", out, dense(*qkv), 1e-5)
    assert sum(run.statistics.low_precision.declined.values()) == 1


def test_a_dense_call_that_the_host_wants_exact_has_no_coarse_candidate():
    run = Run("DDS", precision="int8")
    asked = []
    run.state.dense.choice.fastest = lambda call, candidates: asked.append([*candidates]) or "host"
    run.attend(0, key=None, low_precision=False)
    run.attend(0, key=None)
    assert asked == [["host", "own"], ["host", "own", "own int8"]]
    assert run.statistics.low_precision.declined == {NOT_ALLOWED: 1}


def test_out_of_memory_in_an_int8_search_measures_as_the_model_computes():
    run = Run("SsSs", precision="int8")
    run.attend(0)
    run.backend.fails["int8 masses"] = no_memory()
    assert run.attend(2)[1] == ["int8 masses", "masses", "int8"]
    assert run.pattern().searched_at == 2
    statistics = run.statistics
    assert statistics.low_precision.searches == 0 and not statistics.warnings
    assert statistics.low_precision.declined == {OUT_OF_MEMORY: 1}
