"""NaN and no memory: the video still comes out, and the report says what happened."""

import weakref
from pkgutil import resolve_name as resolve

import pytest
import torch
from close import assert_within

from sparse_attn.call import LayerName
from sparse_attn.run import serving
from sparse_attn.run.serving import NOT_A_NUMBER, OUT_OF_MEMORY
from tests.run.fakes import Backend, Run, call_of, dense, host_attention, no_memory, tensors

NAN = float("nan")


@pytest.mark.parametrize(
    "place, bad", [(0, NAN), (1, NAN), (2, NAN), (2, float("inf"))], ids=["q", "k", "v", "v inf"]
)
@pytest.mark.parametrize("step", [0, 1], ids=["search", "sparse"])
def test_nan_gives_the_dense_result_and_is_reported(step, place, bad):
    run = Run("Sss", first=7)
    if step:
        run.attend(0)
    broken = tensors()
    broken[place][0, 1, 100, 3] = bad
    out, did = run.attend(step, broken)
    assert did[-1] == "host"
    expected = host_attention(*broken)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    # the layer stays dense, another one does not
    assert run.attend(2)[1] == ["host"]
    assert run.attend(2, key="other")[1] == ["dense", "masses"]
    run.state.end_step()
    statistics = run.statistics
    assert statistics.kept_dense == {NOT_A_NUMBER: 2}
    assert statistics.warnings == [
        f"{NOT_A_NUMBER}: the layers concerned run dense from step {8 + step}"
    ]
    assert run.pattern() is None and run.layer().lse is None


@pytest.mark.parametrize("place", range(3), ids="qkv")
def test_nan_in_a_search_leaves_no_pattern(place):
    run, qkv = Run("Ss"), tensors()
    qkv[place][0, 0, 5, 5] = float("nan")
    run.attend(0, qkv)
    run.attend(0, key="other", layer=1)
    run.state.end_step()
    # with NaN in v alone the masses are sound, and yet no step uses the mask
    assert [*run.statistics.patterns] == [(1, "positive")]


def test_nan_in_a_later_step_leaves_the_pattern_that_was_used():
    run, broken = Run("Sss"), tensors()
    broken[2][0, 0, 5, 5] = float("nan")
    for step, qkv in enumerate((tensors(), tensors(), broken)):
        run.attend(step, qkv)
        run.state.end_step()
    assert run.layer().dense_reason == NOT_A_NUMBER and len(run.statistics.patterns) == 1


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
        f"{OUT_OF_MEMORY}: the layers concerned run dense from step 1"
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
    old = run.pattern().mask
    run.backend.fails["masses"] = no_memory()
    assert run.attend(1, layer=3)[1] == ["masses", "sparse"]
    assert run.pattern().mask is old and run.layer().lse is None
    assert run.attend(1)[1] == ["sparse"], "does not try again in the same step"
    assert run.statistics.warnings == [f"{OUT_OF_MEMORY}: layer 3 kept its earlier pattern"]


PLACES = [
    # what has no memory, in which of its calls
    ("sparse_attn.run.cache.Cache.keep", 0),
    ("sparse_attn.run.cache.Cache.keep", 1),
    ("sparse_attn.run.cache.Cache.keep", 2),
    ("sparse_attn.run.cache.Cache.fetch", 0),
    ("sparse_attn.run.cache.Cache.fetch", 1),
    ("sparse_attn.block_mask.BlockMask.block_map", 0),
    ("sparse_attn.block_mask.BlockMask.block_map", 1),
    ("sparse_attn.block_mask.BlockMask.density", 0),
    ("sparse_attn.run.serving.serpentine_order", 0),
]


@pytest.mark.parametrize("place, number", PLACES)
@pytest.mark.parametrize("carried", [False, True], ids=["searched", "carried"])
@pytest.mark.parametrize("order", ["similarity", "position"])
def test_wherever_memory_runs_out_the_run_goes_on(monkeypatch, place, number, carried, order):
    config = {"tail": "pooled", "token_order": order, "sparsity": 0.0}
    name, pattern = LayerName("positive", "double", 0, 0), None
    if carried:
        run = Run("Ss", **config)
        run.attend(0, name=name)
        pattern = run.state.end(keep_pattern=True)
    module, _, what = place.rpartition(".")
    owner = resolve(module)
    works, made = getattr(owner, what), []

    def fails_once(*args, **options):
        made.append(None)
        if len(made) == number + 1:
            raise no_memory()
        return works(*args, **options)

    monkeypatch.setattr(owner, what, fails_once)
    run = Run("DSsSs", Backend(one_pass=True), carried=pattern, **config)
    for step in range(5):
        out, _ = run.attend(step, tensors(step), name=name)
        # every block is kept
        assert_within("out", out, dense(*tensors(step)), 1e-5)
    assert len(made) > number


def test_out_of_memory_while_sampling_costs_the_sample_alone(monkeypatch):
    def out_of_memory(*args, **options):
        raise no_memory()

    monkeypatch.setattr(serving, "sampled_recall", out_of_memory)
    run = Run("Ss", recall=0.8)
    run.attend(0)
    assert run.attend(1, layer=5)[1] == ["sparse"]
    run.state.end_step()
    statistics = run.statistics
    assert statistics.patterns.samples == {}
    assert statistics.warnings == ["out of memory while sampling the recall of layer 5"]


def test_out_of_memory_in_a_later_exact_search_keeps_the_pattern():
    run = Run("SSs", recall=0.8)
    run.attend(0)
    old = run.pattern().mask
    run.backend.fails["masses"] = no_memory()
    assert run.attend(1, layer=3)[1] == ["dense", "masses", "sparse"]
    assert run.pattern().mask is old
    assert run.attend(1)[1] == ["sparse"], "does not try again in the same step"
    assert run.statistics.warnings == [f"{OUT_OF_MEMORY}: layer 3 kept its earlier pattern"]
