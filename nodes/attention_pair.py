"""AdaSpa (two experts): both models of a pair, one set of settings, one report."""

from comfy_api.latest import io

from ..sparse_attn.host.compiling import compile_ahead
from ..sparse_attn.host.install import install, why_not
from .own_errors import otherwise, without_adaspa
from .settings import answer, check, config_of, describe, setting_inputs
from .sockets import AdaSpaRun


class AdaSpaAttentionPair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdaSpaAttentionPair",
            display_name="AdaSpa (two experts)",
            category="model/patch",
            description=(
                "AdaSpa for models that come in two parts, such as Wan 2.2 14B with its "
                "high noise and low noise experts. The second begins with the pattern that the "
                "first has found, and looks for its own where that does not fit."
            ),
            search_aliases=["sparse attention", "AdaSpa", "wan 2.2", "high noise", "low noise"],
            inputs=[
                io.Model.Input(
                    "model_high", tooltip="The high noise expert, after its loader and LoRAs."
                ),
                io.Model.Input(
                    "model_low", tooltip="The low noise expert, after its loader and LoRAs."
                ),
                *setting_inputs(),
            ],
            outputs=[
                io.Model.Output("model_high", display_name="model_high"),
                io.Model.Output("model_low", display_name="model_low"),
                AdaSpaRun.Output("adaspa", display_name="adaspa"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            # two nodes with equal settings must not share one handle through ComfyUI's cache
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, model_high=None, model_low=None, **settings) -> bool:
        return check(settings)

    @classmethod
    @otherwise(lambda said, model_high, model_low, **_: without_adaspa(said, model_high, model_low))
    def execute(cls, model_high, model_low, **settings) -> io.NodeOutput:
        config = config_of(**settings)
        node_id = cls.hidden.unique_id
        # both experts are of one architecture
        compile_ahead(model_high, config, node_id)
        high, handle = install(model_high, config, node_id, part="high noise")
        low, second = install(model_low, config, node_id, first=handle, part="low noise")
        for one in (handle, second):
            describe(one, cls.hidden, settings["preset"])
        reason = why_not(model_high) or why_not(model_low)
        return io.NodeOutput(high, low, handle, ui=answer(config, settings, reason))
