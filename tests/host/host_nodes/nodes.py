"""Stand-ins for a text encoder and for the attention node of another pack."""

import json
from collections import Counter

import torch
from comfy_api.latest import ComfyExtension, io, ui

TEXT_DIM = 64
HostTestCalls = io.Custom("ADASPA_HOST_TEST_CALLS")


class AdaSpaHostTestPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdaSpaHostTestPrompt",
            category="AdaSpa/tests",
            inputs=[io.Int.Input("tokens", default=7, min=1), io.Int.Input("seed", default=0)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, tokens, seed) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, TEXT_DIM, generator=generator)
        pooled = torch.randn(1, 768, generator=generator)
        return io.NodeOutput([[text, {"pooled_output": pooled}]])


class AdaSpaHostTestOverride(io.ComfyNode):
    """Sets the override key on a clone, as attention nodes of other packs do."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdaSpaHostTestOverride",
            category="AdaSpa/tests",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output(), HostTestCalls.Output("calls")],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        calls = Counter()

        def override(func, q, k, *args, **kwargs):
            calls[f"{q.shape[-2]}x{k.shape[-2]}"] += 1
            return func(q, k, *args, **kwargs)

        model = model.clone()
        options = model.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = override
        return io.NodeOutput(model, calls)


class AdaSpaHostTestCalls(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdaSpaHostTestCalls",
            category="AdaSpa/tests",
            inputs=[io.Latent.Input("samples"), HostTestCalls.Input("calls")],
            outputs=[io.Latent.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples, calls) -> io.NodeOutput:
        return io.NodeOutput(samples, ui=ui.PreviewText(json.dumps(calls)))


class HostTestExtension(ComfyExtension):
    async def get_node_list(self):
        return [AdaSpaHostTestPrompt, AdaSpaHostTestOverride, AdaSpaHostTestCalls]
