"""Models whose self-attention reads text and video in one sequence."""

from math import prod

from ...sentences import Sentence
from ...token_layout import TokenLayout
from .family import grid


def hunyuan_blocks(model) -> dict:
    return {"double": model.double_blocks, "single": model.single_blocks}


def hunyuan_video(model, latent_shape, inputs) -> TokenLayout:
    """vision + byT5 + text, in whatever order, then [reference] + video."""
    frames, height, width = grid(latent_shape, model.patch_size)
    before = _text(inputs)
    if inputs.get("ref_latent") is not None:
        before += prod(grid(inputs["ref_latent"].shape, model.patch_size))
    return TokenLayout(before, frames, height, width)


def hunyuan_segments(kind, layout: TokenLayout, inputs) -> tuple[tuple[int, int, int], ...]:
    """Double blocks keep text and video apart."""
    text = _text(inputs)
    parts = (text, layout.tokens - text) if kind == "double" else (layout.tokens,)
    return tuple((1, part, 1) for part in parts)


def _text(inputs) -> int:
    given = [inputs.get(name) for name in ("c_crossattn", "txt_byt5", "clip_fea")]
    return sum(tokens.shape[1] for tokens in given if tokens is not None)


def cogvideox(model, latent_shape, inputs) -> TokenLayout:
    """Text, then video; the 1.5 models also have patches in time."""
    patch = (model.patch_size_t or 1, model.patch_size, model.patch_size)
    return TokenLayout(inputs["c_crossattn"].shape[1], *grid(latent_shape, patch))


def mochi(model, latent_shape, inputs) -> TokenLayout:
    """Video, then as many text tokens as the longest prompt of the batch has."""
    size = model.patch_size
    text = min(inputs.get("num_tokens", 256), inputs["c_crossattn"].shape[1])
    return TokenLayout(0, *grid(latent_shape, (1, size, size)), text)


def minimax_h3(model, latent_shape, inputs) -> TokenLayout | str:
    """Text, [references], audio, then video; ComfyUI lays the sequence out before the run."""
    packed = (inputs.get("minimax_payload") or {}).get("layout")
    text = inputs["c_crossattn"].shape[1]
    if packed is None or packed.signature[0] != text:
        return Sentence("why_layout")
    start, stop, kind = packed.segments[-1]
    video = TokenLayout(start, *grid(latent_shape, model.patch_size))
    if kind != "video" or stop != video.tokens:
        return Sentence("why_layout_end", count=f"{video.video:,}")
    return video


def is_fast_h3(model) -> bool:
    """Whether each layer has a gate between dense and sparse attention."""
    return getattr(model.blocks[0].attn, "to_gate_compress", None) is not None
