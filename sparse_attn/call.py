"""One attention call, and the name of the layer that makes it."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .token_layout import TokenLayout


class LayerName(NamedTuple):
    """One attention layer of one conditioning, under a name that means the same in every run."""

    role: str
    block_type: str
    block_index: int
    occurrence: int


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call over a video: of one conditioning, or of all of a plainly dense step.

    Args:
        q, k, v: [B, H, L, D].
        scale: multiplies q @ k.T.
        layout: of the L tokens.
        step: number of the step within its run, from 0.
        dense: dense(heads=None) -> [B, H, L, D], the attention the host would have run, of all
            heads or of the first `heads`.
        key_bias: [B, L] float32 added to the logits of every query, or None.
        low_precision: whether the host lets this call run in low precision.
        foreign: whether `dense` is another node's attention; it then runs all dense steps, whole.
        layer: number of the layer, from 0.
        role: which conditioning, for people: "positive" or "negative".
        key: names the layer within the run: device, conditioning, part of the video, block.
        name: names the layer in every run; None where its mask means nothing to another run.
        by_position: [L] int32, the order of the tokens by their place in the video, as
            `orders.position` has it; None where nothing stands for skipped blocks.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    layout: TokenLayout
    step: int
    dense: Callable[..., torch.Tensor]
    key_bias: torch.Tensor | None = None
    low_precision: bool = True
    foreign: bool = False
    layer: int = 0
    role: str = ""
    key: Hashable = None
    name: LayerName | None = None
    by_position: torch.Tensor | None = None


def empty_output(v: torch.Tensor) -> torch.Tensor:
    """Room for an output like v [B, H, L, D], as hosts lay it out: in memory [B, L, H, D]."""
    B, H, L, D = v.shape
    return torch.empty((B, L, H, D), device=v.device, dtype=v.dtype).transpose(1, 2)
