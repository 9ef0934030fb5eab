"""Models whose self-attention reads video alone; text comes in through cross-attention."""

import torch

from ...token_layout import TokenLayout
from .family import grid


def cosmos_blocks(model) -> dict:
    # Cosmos 1 keeps them by name
    named = isinstance(model.blocks, torch.nn.ModuleDict)
    return {"double": list(model.blocks.values()) if named else model.blocks}


def cosmos_head_dim(model) -> int:
    return model.model_channels // model.num_heads


def cosmos(model, latent_shape, inputs) -> TokenLayout:
    """Video."""
    patch = (model.patch_temporal, model.patch_spatial, model.patch_spatial)
    return TokenLayout(0, *grid(latent_shape, patch))


def kandinsky_blocks(model) -> dict:
    return {"double": model.visual_transformer_blocks}


def kandinsky_head_dim(model) -> int:
    return model.visual_transformer_blocks[0].self_attention.head_dim


def kandinsky(model, latent_shape, inputs) -> TokenLayout:
    """Video; the blocks of the text encoder attend to text alone."""
    return TokenLayout(0, *grid(latent_shape, model.patch_size))
