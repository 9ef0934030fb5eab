"""AdaSpa Skip Steps: MODEL in, a MODEL that does not compute every step out."""

from comfy_api.latest import io

from ..sparse_attn.forecast.plan import LEAST_STEPS, LEVELS
from ..sparse_attn.host.forecast import install
from ..sparse_attn.sentences import Sentence
from .own_errors import otherwise
from .settings import spoken

OFF = "off"


class AdaSpaForecast(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdaSpaForecast",
            display_name="AdaSpa Skip Steps",
            category="model/patch",
            description=(
                "Does not compute every step: what the model would return at some of them is forecast "
                "from the steps before. Works with AdaSpa or alone, and is off at first. For "
                f"schedules of {LEAST_STEPS} steps and more."
            ),
            search_aliases=[
                "skip steps",
                "forecast",
                "cache",
                "AdaSpa",
                "faster video",
                "speed up",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A model, before or after AdaSpa."),
                io.Combo.Input(
                    "level",
                    options=[OFF, *LEVELS],
                    default=OFF,
                    tooltip=(
                        "careful forecasts every other step: on a small model, 20 steps with 12 to "
                        "13 computed came to 47.3 dB of the full result, 13 steps alone to 40.1. "
                        "fast forecasts two of three: 10 computed, 36 dB on two such models; 10 steps "
                        "alone came to 34 and 37."
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @otherwise(lambda said, model, **_: io.NodeOutput(model, ui=spoken([said])))
    def execute(cls, model, level) -> io.NodeOutput:
        said = Sentence("skip_off") if level == OFF else Sentence("skip_ready", level=level)
        patched = install(model, LEVELS.get(level), cls.hidden.unique_id)
        return io.NodeOutput(patched, ui=spoken([said]))
