"""Skip Steps beside AdaSpa Attention, and beside nodes that answer for the model themselves."""

import pytest
import torch

from sparse_attn.forecast.plan import Level
from tests.forecast.polynomial_model import BLIND, Told, trace
from tests.host.host_fixtures import calls, sparse

pytestmark = pytest.mark.any_comfyui

STEPS = 14
# dense up to step 2, whose LSE the search of step 3 takes; step 9 searches again
SETTINGS = {"warmup": 0.2, "search_points": (0.55,), "tail": "none"}
PLAN = "steps 1-3 dense, 4 search, 5-8 sparse, 9 search, 10-14 sparse"
# of BLIND: two in a row, the last step is computed
FORECAST = [4, 5, 7, 9, 10, 12]
ORDERS = pytest.mark.parametrize("order", ["before", "after"])


@pytest.fixture
def told(monkeypatch, comfyui):
    return Told(monkeypatch)


def both(load, order, level=BLIND, **settings):
    """A model with Skip Steps before or after AdaSpa, and AdaSpa's handle."""
    from sparse_attn.host.forecast import install

    settings = {**SETTINGS, **settings}
    if order == "before":
        return sparse(install(load("wan_h64"), level), **settings)
    model, handle = sparse(load("wan_h64"), **settings)
    return install(model, level), handle


@ORDERS
def test_no_search_is_forecast_and_no_forecast_counts_as_sparse(load, told, order):
    model, handle = both(load, order)
    out = trace(model, steps=STEPS, cfg=1.0)[-1]
    assert torch.isfinite(out).all()
    run = handle.latest()
    assert run.schedule.describe() == PLAN
    assert sorted(run.forecast.forecast) == FORECAST
    # two layers, one prompt; a search of the later kind only chooses
    computed = STEPS - 6
    assert calls(handle) == {
        "dense": 6,
        "search": 2,
        "search_again": 2,
        "sparse": 2 * (computed - 4),
    }
    assert {pattern.step for pattern in run.patterns.values()} == {8}
    assert len(run.steps) == computed and run.skipped() == []


@ORDERS
def test_the_report_of_adaspa_says_what_was_forecast_and_saved(load, told, order):
    model, handle = both(load, order)
    trace(model, steps=STEPS, cfg=1.0)
    run = handle.latest()
    assert ", 6 of them forecast, density" in run.summary()
    lines = "\n".join(run.lines())
    assert "Skip Steps: 6 of 14 steps forecast, 5-6, 8, 10-11, 13; saved about " in lines
    assert "by a cache" not in lines
    figures = run.as_dict()
    assert figures["steps_forecast"] == FORECAST and figures["steps_skipped"] == []
    assert figures["forecast_seconds_saved"] > 0
    kinds = run.step_kinds()
    assert [i for i, kind in enumerate(kinds) if kind == "forecast"] == FORECAST
    assert kinds[3] == kinds[8] == "search"


@ORDERS
def test_a_model_that_no_forecast_fits_samples_as_with_adaspa_alone(load, told, order):
    alone, _ = sparse(load("wan_h64"), **SETTINGS)
    expected = trace(alone, steps=STEPS, cfg=1.0)
    # random weights answer anew at every sigma
    model, handle = both(load, order, Level(1, 1, 1e-4))
    assert all(map(torch.equal, trace(model, steps=STEPS, cfg=1.0), expected))
    (line,) = [line for line in handle.latest().lines() if line.startswith("Skip Steps")]
    assert line == "Skip Steps: every step was computed: the forecasts were too far off."


def test_without_skip_steps_the_report_says_nothing_of_it(load, told):
    model, handle = sparse(load("wan_h64"), **SETTINGS)
    trace(model, steps=4, cfg=1.0)
    text = "\n".join(handle.latest().lines())
    assert "Skip Steps" not in text and "forecast" not in text
    assert handle.latest().as_dict()["steps_forecast"] == []


def standing_in(model, steps):
    """As forecasting nodes of others do: the model is entered, and returns without attention."""
    import comfy.patcher_extension

    def wrapper(executor, x, timestep, *args, **kwargs):
        options = kwargs.get("transformer_options") or args[-1]
        sigmas = options["sample_sigmas"]
        step = int((sigmas[:-1] - options["sigmas"][0]).abs().argmin())
        return torch.zeros_like(x) if step in steps else executor(x, timestep, *args, **kwargs)

    model = model.clone()
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    model.add_wrapper_with_key(kind, "another_forecast", wrapper)
    return model


@ORDERS
def test_a_stand_in_beside_loses_no_search_and_teaches_nothing(load, told, order):
    model, handle = both(load, order)
    trace(standing_in(model, {3, 8, 12}), steps=STEPS, cfg=1.0)
    run = handle.latest()
    assert run.skipped() == [3, 8, 12]
    # a search that was missed takes place in the next step, which is computed for it
    assert sorted(run.forecast.forecast) == [5, 6, 10, 11]
    assert {pattern.step for pattern in run.patterns.values()} == {9}
    assert sorted(run.forecast.errors) == [2, 4, 7, 9, 13]
    assert calls(handle) == {"dense": 6, "search": 2, "search_again": 2, "sparse": 6}
    assert len(run.steps) == STEPS - 3 - 4


def test_a_stand_in_without_ours_is_no_sparse_step(load):
    model, handle = sparse(load("wan_h64"), **SETTINGS)
    trace(standing_in(model, {3, 6, 9}), steps=STEPS, cfg=1.0)
    run = handle.latest()
    assert run.skipped() == [3, 6, 9] and len(run.steps) == STEPS - 3
    assert {pattern.step for pattern in run.patterns.values()} == {8}
    assert calls(handle) == {"dense": 6, "search": 2, "search_again": 2, "sparse": 2 * (STEPS - 7)}


def test_a_stand_in_for_the_blocks_of_a_model_is_no_sparse_step(load):
    def stand_in(args, extra):
        options = args["transformer_options"]
        step = int((options["sample_sigmas"][:-1] - options["sigmas"][0]).abs().argmin())
        return {"img": args["img"]} if step in {5, 6} else extra["original_block"](args)

    model, handle = sparse(load("wan_h64"), **SETTINGS)
    for block in range(2):
        model.set_model_patch_replace(stand_in, "dit", "double_block", block)
    trace(model, steps=STEPS, cfg=1.0)
    run = handle.latest()
    assert len(run.steps) == STEPS - 2
    assert calls(handle)["sparse"] == 2 * (STEPS - 6)
