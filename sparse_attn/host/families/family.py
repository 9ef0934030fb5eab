"""What a model family is: where its tokens lie, and how its blocks are counted."""

from collections.abc import Callable
from dataclasses import dataclass

from ...token_layout import TokenLayout


@dataclass(frozen=True)
class Family:
    """A model family.

    Args:
        name: for people.
        layout: layout(model, latent_shape, inputs) -> TokenLayout, or a text that says why there is
            none; `latent_shape` is [B, C, T, H, W], `inputs` the keyword inputs of the diffusion
            model and its `transformer_options`.
        layers: layers(model) -> how many attention layers of each block type, in running order.
        head_dim: head_dim(model) -> width of a head of the video's self-attention. Streams beside
            the video may have as many tokens, but have other heads.
        calls: calls(model) -> self-attentions over the video in one call of the model, where a
            layer makes more than one.
    """

    name: str
    layout: Callable[..., TokenLayout | str]
    layers: Callable[..., dict[str, int]]
    head_dim: Callable[..., int] | None = None
    calls: Callable[..., int] | None = None

    def num_layers(self, model) -> int:
        return sum(self.layers(model).values())

    def num_calls(self, model) -> int:
        return self.calls(model) if self.calls else self.num_layers(model)

    def layer_number(self, model, block_type: str, block_index: int) -> int:
        """Number of a block in running order: single blocks count on after the double ones."""
        before = 0
        for kind, count in self.layers(model).items():
            if kind == block_type:
                return before + block_index
            before += count
        return block_index

    def read(self, model, latent_shape, inputs) -> TokenLayout | str:
        """Apply the rule; raises where a newer ComfyUI has renamed what the rule reads."""
        self.num_layers(model)
        self.num_calls(model)
        if self.head_dim:
            self.head_dim(model)
        return self.layout(model, latent_shape, inputs)


def grid(shape, patch_size) -> tuple[int, int, int]:
    """Tokens per axis of a latent [..., T, H, W] that its model pads up to whole patches."""
    t, h, w = (-(-size // patch) for size, patch in zip(shape[-3:], patch_size, strict=True))
    return t, h, w


def whole_patches(sizes, patch_size) -> tuple[int, ...]:
    """Tokens per axis where the model does not pad: its convolution drops what is left over."""
    return tuple(size // patch for size, patch in zip(sizes, patch_size, strict=True))
