"""AdaSpa (two experts): both models of a pair, one set of settings, one report."""

from comfy_api.latest import io

from ..sparse_attn.host.compiling import compile_ahead
from ..sparse_attn.host.install import install, why_not
from .own_errors import otherwise, without_adaspa
from .schemas import attention_schema
from .settings import answer, check, config_of, describe


class AdaSpaAttentionPair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        experts = {f"model_{noise}": f"The {noise} noise expert" for noise in ("high", "low")}
        return attention_schema(
            "AdaSpaAttentionPair",
            "AdaSpa (two experts)",
            "AdaSpa for models that come in two parts, such as Wan 2.2 14B with its high noise and "
            "low noise experts. The second begins with the pattern that the first has found, and "
            "looks for its own where that does not fit.",
            "sparse attention, AdaSpa, wan 2.2, high noise, low noise",
            [
                io.Model.Input(name, tooltip=f"{expert}, after its loader and LoRAs.")
                for name, expert in experts.items()
            ],
            [io.Model.Output(name, display_name=name) for name in experts],
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
