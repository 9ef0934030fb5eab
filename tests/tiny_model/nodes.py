"""The two nodes the tiny model needs in place of a text encoder and a VAE. For tests only."""

import comfy.latent_formats
import torch
from comfy_api.latest import ComfyExtension, io

from .procedural_video import decode, embed_prompt


class AdaSpaTinyPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdaSpaTinyPrompt",
            display_name="AdaSpa Tiny Prompt",
            category="AdaSpa/tests",
            description="Words to conditioning for the tiny test model. Needs no text encoder.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a large red star moving left slowly over a navy gradient",
                    tooltip="Size, colour, shape, direction and speed, then the background. "
                    "Empty means no prompt.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text) -> io.NodeOutput:
        return io.NodeOutput([[embed_prompt(text)[None], {}]])


class AdaSpaTinyDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdaSpaTinyDecode",
            display_name="AdaSpa Tiny Decode",
            category="AdaSpa/tests",
            description="Latents of the tiny test model to frames, two frames per latent frame.",
            inputs=[
                io.Latent.Input("samples"),
                io.Int.Input(
                    "scale",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="Enlarges the frames. 4 gives the size set on the empty latent.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples, scale) -> io.NodeOutput:
        latent = comfy.latent_formats.Wan21().process_in(samples["samples"].float().cpu())
        frames = decode(latent).movedim(1, 2).flatten(0, 1)  # [N * F, 3, Y, X]
        if scale > 1:
            frames = torch.nn.functional.interpolate(frames, scale_factor=scale, mode="bicubic")
        return io.NodeOutput(frames.clamp(0, 1).movedim(1, -1).contiguous())


class TinyModelExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [AdaSpaTinyPrompt, AdaSpaTinyDecode]
