"""Models whose self-attention reads video alone; text comes in through cross-attention."""

import torch

from ...token_layout import TokenLayout
from .family import grid


def cosmos_blocks(model) -> dict:
    # Cosmos 1 keeps them by name
    named = isinstance(model.blocks, torch.nn.ModuleDict)
    return {"double": list(model.blocks.values()) if named else model.blocks}


def cosmos(model, latent_shape, inputs) -> TokenLayout:
    """Video."""
    patch = (model.patch_temporal, model.patch_spatial, model.patch_spatial)
    return TokenLayout(0, *grid(latent_shape, patch))


def cosmos_segments(kind, layout: TokenLayout, inputs) -> tuple[tuple[int, int, int], ...]:
    """Whole frames."""
    return ((1, layout.frames, layout.height * layout.width),)


def predict2_segments(kind, layout: TokenLayout, inputs) -> tuple[tuple[int, int, int], ...]:
    """Rows of every frame."""
    return ((layout.frames, layout.height, layout.width),)


def kandinsky(model, latent_shape, inputs) -> TokenLayout:
    """Video; the blocks of the text encoder attend to text alone."""
    return TokenLayout(0, *grid(latent_shape, model.patch_size))


def kandinsky_6_blocks(model) -> dict:
    # a whole block also attends to audio, in heads of the same width
    return {"double": [block.videoT.self_attention for block in model.visual_blocks]}


def kandinsky_6(model, latent_shape, inputs) -> TokenLayout:
    """Video, then the image that it begins with, which the latent may hold as its last frame."""
    frames, height, width = grid(latent_shape, model.patch_size)
    image, after = inputs.get("k6_reference"), 0
    if image is not None:
        after = image.shape[2]
    elif inputs.get("k6_reference_tail"):
        frames, after = frames - 1, 1
    return TokenLayout(0, frames, height, width, after * height * width)


def prism_blocks(model) -> dict:
    """The blocks of the expert for high noise; those for low noise take their place."""
    fused = [block.video_block for block in model.fusion_blocks]
    return {"double": [*fused, *model.remaining_video_blocks]}


def prism_low_noise(model) -> dict:
    return dict(enumerate(model.video_dit_2.blocks))


def prism(model, latent_shape, inputs) -> TokenLayout | str:
    """Video."""
    if inputs["transformer_options"].get("prism_attention", "dense") != "dense":
        return "Prism's own sparse attention serves the video"
    return TokenLayout(0, *grid(latent_shape, (1, 2, 2)))
