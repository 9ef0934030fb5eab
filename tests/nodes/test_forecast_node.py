"""The node AdaSpa Skip Steps: what it installs, and what it says."""

import pytest

from sparse_attn.forecast.plan import LEVELS
from tests.forecast.polynomial_model import STEPS, Answers, answering, trace
from tests.tools import comfy_inprocess

pytestmark = pytest.mark.any_comfyui


@pytest.fixture
def skip(comfyui):
    """skip(model, level) -> the model that the node returns, and its text."""
    nodes = comfy_inprocess.nodes_of(comfy_inprocess.load_pack())
    node = nodes["AdaSpaForecast"].PREPARE_CLASS_CLONE({"hidden_inputs": {}})

    def skip(model, level):
        out = node.execute(model=model, level=level)
        return out.args[0], out.ui["text"][0]

    return skip


def test_off_installs_nothing_and_says_so(load, skip):
    model = load("wan_h64")
    off, text = skip(skip(model, "fast")[0], "off")
    assert text == "Skip Steps is off." and "adaspa_forecast" not in str(off.wrappers)


@pytest.mark.parametrize("level, forecast", [("careful", 6), ("fast", 8)])
def test_a_level_forecasts_as_many_steps_as_it_may(load, skip, level, forecast):
    answers = Answers(degree=LEVELS[level].degree)
    model, text = skip(answering(load("wan_h64"), answers), level)
    assert text == f"Skip Steps is ready: {level}."
    trace(model, cfg=1.0)
    assert len(answers.sigmas) == STEPS - forecast
