"""Where text and video tokens lie, one rule per model family.

A rule reads the latent's shape and the model's inputs and says what the self-attention sequence
looks like. A call whose token count differs is not ours. Add a family with one row of FAMILIES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from ..token_layout import TokenLayout


@dataclass(frozen=True)
class Family:
    """A model family.

    Args:
        name: for people.
        layout: layout(model, latent_shape, inputs) -> TokenLayout; `latent_shape` is
            [B, C, T, H, W], `inputs` the keyword inputs of the diffusion model.
        layers: layers(model) -> how many attention layers of each block type, in running order.
    """

    name: str
    layout: Callable[..., TokenLayout]
    layers: Callable[..., dict[str, int]]

    def num_layers(self, model) -> int:
        return sum(self.layers(model).values())

    def layer_number(self, model, block_type: str, block_index: int) -> int:
        """Number of a block in running order: single blocks count on after the double ones."""
        before = 0
        for kind, count in self.layers(model).items():
            if kind == block_type:
                return before + block_index
            before += count
        return block_index


def grid(shape, patch_size) -> tuple[int, ...]:
    """Tokens per axis of a latent [..., T, H, W]; the models pad up to whole patches."""
    return tuple(-(-size // patch) for size, patch in zip(shape[-3:], patch_size, strict=True))


def wan(model, latent_shape, inputs) -> TokenLayout:
    """[reference image] + video + [reference videos]; no text (cross-attention reads it)."""
    frames, height, width = grid(latent_shape, model.patch_size)
    if inputs.get("time_dim_concat") is not None:
        frames += grid(inputs["time_dim_concat"].shape, model.patch_size)[0]
    before = after = 0
    if getattr(model, "ref_conv", None) is not None and inputs.get("reference_latent") is not None:
        before = prod(
            size // patch
            for size, patch in zip(
                inputs["reference_latent"].shape[-2:], model.patch_size[1:], strict=True
            )
        )
    for latent in inputs.get("context_latents") or ():
        after += prod(grid(latent.shape, model.patch_size))
    return TokenLayout(before, frames, height, width, after)


def hunyuan_video(model, latent_shape, inputs) -> TokenLayout:
    """vision + byT5 + text, in whatever order, then [reference] + video."""
    frames, height, width = grid(latent_shape, model.patch_size)
    text = [inputs.get(name) for name in ("c_crossattn", "txt_byt5", "clip_fea")]
    before = sum(tokens.shape[1] for tokens in text if tokens is not None)
    if inputs.get("ref_latent") is not None:
        before += prod(grid(inputs["ref_latent"].shape, model.patch_size))
    return TokenLayout(before, frames, height, width)


# class of the diffusion model -> its family
FAMILIES = {
    "WanModel": Family("Wan", wan, lambda model: {"double": len(model.blocks)}),
    "HunyuanVideo": Family(
        "HunyuanVideo",
        hunyuan_video,
        lambda model: {"double": len(model.double_blocks), "single": len(model.single_blocks)},
    ),
}


def family_of(model) -> tuple[Family | None, str]:
    """Return the family of a diffusion model, or None and the reason there is none."""
    name = type(model).__name__
    family = FAMILIES.get(name)
    if family is None:
        return None, f"{name} is not a video model that AdaSpa knows"
    if len(model.patch_size) != 3:
        return None, f"{name} with 2-D patches makes images, not videos"
    return family, ""
