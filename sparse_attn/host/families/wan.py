"""Wan and its variants: the text is read by cross-attention, so all extra tokens are pictures."""

from math import prod

from ...sentences import Sentence
from ...token_layout import TokenLayout
from .family import grid, whole_patches

KV_CACHE = Sentence("why_kv_cache")
POSE_KEYS = Sentence("why_pose_keys")


def layout(model, latent_shape, inputs) -> TokenLayout:
    """[reference image] + video + [reference frames] + [reference videos]."""
    frames, height, width = grid(latent_shape, model.patch_size)
    before = 0
    reference = inputs.get("reference_latent")
    if getattr(model, "ref_conv", None) is not None and reference is not None:
        before = prod(whole_patches(reference.shape[-2:], model.patch_size[1:]))
    behind = [inputs.get("time_dim_concat"), *(inputs.get("context_latents") or ())]
    after = sum(
        prod(grid(latent.shape, model.patch_size)) for latent in behind if latent is not None
    )
    return TokenLayout(before, frames, height, width, after)


def with_reference_last(model, latent_shape, inputs) -> TokenLayout:
    """HuMo: video + [reference frames]."""
    video = layout(model, latent_shape, inputs)
    reference = inputs.get("reference_latent")
    after = 0
    if reference is not None:
        after = prod(whole_patches(reference.shape[-3:], model.patch_size))
    return TokenLayout(0, video.frames, video.height, video.width, after)


def speech(model, latent_shape, inputs) -> TokenLayout:
    """Speech to video: video + [reference frame] + [earlier frames, the older the coarser]."""
    video = with_reference_last(model, latent_shape, inputs)
    motion = 0
    if inputs.get("reference_motion") is not None:
        packer = model.frame_packer
        size = inputs["reference_motion"].shape[-2:]
        convolutions = (packer.proj, packer.proj_2x, packer.proj_4x)
        for frames, conv in zip(packer.zip_frame_buckets, convolutions, strict=True):
            motion += prod(whole_patches((frames, *size), conv.stride))
    return TokenLayout(0, video.frames, video.height, video.width, video.after + motion)


def pose(model, latent_shape, inputs) -> TokenLayout:
    """SCAIL: [reference frames] + video + [pose frames, which may be of half the size]."""
    video = layout(model, latent_shape, inputs)
    streams = (inputs.get("reference_latent"), inputs.get("pose_latents"))
    before, after = (
        0 if stream is None else prod(grid(stream.shape, model.patch_size)) for stream in streams
    )
    return TokenLayout(before, video.frames, video.height, video.width, after)


def causal(model, latent_shape, inputs) -> TokenLayout | str:
    """Causal Wan: video, unless it runs frame by frame."""
    if "ar_state" in inputs["transformer_options"]:
        return KV_CACHE
    return layout(model, latent_shape, inputs)


def animate_2(model, latent_shape, inputs) -> TokenLayout | str:
    """Animate 2: video, unless a pose branch runs beside it.

    ComfyUI then calls attention once for every frame: its queries, with the keys of the whole video
    and those of one frame of poses. A block mask here is of queries and keys in one order of blocks,
    so these calls run in full.
    """
    if inputs.get("pose_latents") is not None:
        return POSE_KEYS
    return layout(model, latent_shape, inputs)


def vace_contexts(inputs) -> int:
    """Each VACE block runs once for every context, [B, N, C, T, H, W]."""
    return inputs["vace_context"].shape[1]


def vace_blocks(model) -> dict:
    """Each VACE block follows a main block."""
    return {main: model.vace_blocks[n] for main, n in model.vace_layers_mapping.items()}
