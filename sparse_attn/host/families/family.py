"""What a model family is: where its tokens lie, and which of its blocks read the video."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from ...token_layout import TokenLayout


@dataclass(frozen=True)
class Block:
    """A block whose self-attention reads the video.

    Args:
        kind, index: as ComfyUI publishes them where it does.
        number: in running order, as `dense_layers` counts: single blocks count on after double ones.
        follows: blocks of the same number that run before it.
    """

    kind: str
    index: int
    number: int
    follows: int = 0


@dataclass(frozen=True)
class Family:
    """A model family.

    Args:
        name: for people.
        layout: layout(model, latent_shape, inputs) -> TokenLayout, or a text that says why there is
            none; `latent_shape` is [B, C, T, H, W], `inputs` the keyword inputs of the diffusion
            model and its `transformer_options`.
        blocks: blocks(model) -> the blocks of each kind, in running order.
        head_dim: head_dim(model) -> width of a head of the video's self-attention. Streams beside
            the video may have as many tokens, but have other heads.
        beside: beside(model) -> further blocks by the number of the one that each follows.
        beside_times: beside_times(inputs) -> how often a call of the model runs each of those; None
            for once.
        segments: segments(kind, layout, inputs) -> how an engine for several GPUs shares the
            sequence in blocks of a kind: for each part that it cuts by itself a grid of tokens,
            of which it cuts the middle axis. None where it cuts the sequence whole.
        by_turns: whether a call of the model runs one of each such pair of blocks, not both.
    """

    name: str
    layout: Callable[..., TokenLayout | str]
    blocks: Callable[..., dict[str, Collection[torch.nn.Module]]]
    head_dim: Callable[..., int] | None = None
    beside: Callable[..., dict[int, torch.nn.Module]] | None = None
    beside_times: Callable[..., int] | None = None
    segments: Callable[..., tuple[tuple[int, int, int], ...]] | None = None
    by_turns: bool = False

    def num_layers(self, model) -> int:
        return sum(map(len, self.blocks(model).values()))

    def num_calls(self, model) -> int:
        """Self-attentions over the video in one call of the model."""
        beside = self.beside(model) if self.beside and not self.by_turns else ()
        return self.num_layers(model) + len(beside)

    def listed(self, model) -> list[tuple[torch.nn.Module, Block]]:
        """Every block's module and what it is called."""
        found = []
        for kind, blocks in self.blocks(model).items():
            for index, module in enumerate(blocks):
                found.append((module, Block(kind, index, len(found))))
        for number, module in (self.beside(model) if self.beside else {}).items():
            found.append((module, replace(found[number][1], follows=1)))
        return found

    def published(self, model, kind: str, index: int) -> Block:
        """The block that ComfyUI calls so."""
        before = 0
        for other, blocks in self.blocks(model).items():
            if other == kind:
                return Block(kind, index, before + index)
            before += len(blocks)
        return Block(kind, index, index)

    def read(self, model, latent_shape, inputs) -> TokenLayout | str:
        """Apply the rule; raises where a newer ComfyUI has renamed what the rule reads."""
        self.listed(model)
        if self.head_dim:
            self.head_dim(model)
        return self.layout(model, latent_shape, inputs)


def listed_in(name: str) -> Callable[..., dict[str, Collection[torch.nn.Module]]]:
    """The rule of models that keep all their blocks in one list, the attribute `name`."""
    return lambda model: {"double": getattr(model, name)}


def grid(shape, patch_size) -> tuple[int, int, int]:
    """Tokens per axis of a latent [..., T, H, W] that its model pads up to whole patches."""
    t, h, w = (-(-size // patch) for size, patch in zip(shape[-3:], patch_size, strict=True))
    return t, h, w


def whole_patches(sizes, patch_size) -> tuple[int, ...]:
    """Tokens per axis where the model does not pad: its convolution drops what is left over."""
    return tuple(size // patch for size, patch in zip(sizes, patch_size, strict=True))
