"""AdaSpa: MODEL in, a MODEL that samples long videos sooner out."""

from comfy_api.latest import io

from ..sparse_attn.host.compiling import compile_ahead
from ..sparse_attn.host.install import install, why_not
from .own_errors import otherwise, without_adaspa
from .schemas import attention_schema
from .settings import answer, check, config_of, describe


class AdaSpaAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return attention_schema(
            "AdaSpaAttention",
            "AdaSpa",
            "Skips the attention that hardly matters, so long videos sample sooner and look "
            "almost the same. Finds the pattern of your video once, from every token, and reuses it.",
            "sparse attention, AdaSpa, faster video, speed up, accelerate, optimize, teacache, sage, "
            "wan, hunyuan",
            [io.Model.Input("model", tooltip="A video model, after its loader and LoRAs.")],
            [io.Model.Output(display_name="model")],
        )

    @classmethod
    def validate_inputs(cls, model=None, **settings) -> bool:
        return check(settings)

    @classmethod
    @otherwise(lambda said, model, **_: without_adaspa(said, model))
    def execute(cls, model, **settings) -> io.NodeOutput:
        config = config_of(**settings)
        compile_ahead(model, config, cls.hidden.unique_id)
        patched, handle = install(model, config, cls.hidden.unique_id)
        describe(handle, cls.hidden, settings["preset"])
        return io.NodeOutput(patched, handle, ui=answer(config, settings, why_not(model)))
