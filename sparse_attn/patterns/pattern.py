"""Carried patterns: the masks of one run, for another run of the same sequence."""

from dataclasses import dataclass, field, replace

import torch

from ..call import Call, LayerName
from ..config import AdaSpaConfig
from ..token_layout import TokenLayout


@dataclass(frozen=True)
class CarriedLayer:
    """The mask of one layer, on the CPU.

    Args:
        bits: [B, H, N, ceil(N / 8)] uint8, as in `BlockMask`.
        density, recall: one number per head, as they were when the mask was searched.
        order: [B, H, L] int32, the token at every place; None where that is the pattern's.
    """

    bits: torch.Tensor
    density: tuple[float, ...]
    recall: tuple[float, ...]
    order: torch.Tensor | None = None

    def mean_recall(self) -> float:
        return sum(self.recall) / len(self.recall)


@dataclass(frozen=True)
class CarriedPattern:
    """The masks of a run.

    Args:
        family: name of the model family.
        layout: the sequence that the masks are for.
        block_size: tokens per block, a key of `BLOCK_SIZES`.
        layers: by `LayerName`; all of one batch and one number of heads.
        source: where the pattern comes from, for people.
        pooled: whether the masks are for steps in which averages stand for skipped blocks; their
            tokens are in rods where a layer has no order of its own.
    """

    family: str
    layout: TokenLayout
    block_size: str
    layers: dict[LayerName, CarriedLayer] = field(default_factory=dict)
    source: str = ""
    pooled: bool = False

    @property
    def tail(self) -> str:
        return "pooled" if self.pooled else "none"

    @property
    def order(self) -> str:
        """How the tokens of the masks are ordered: "raster", "rods" or "similarity"."""
        own = any(layer.order is not None for layer in self.layers.values())
        return "similarity" if own else "rods" if self.pooled else "raster"

    def nbytes(self) -> int:
        tensors = [x for layer in self.layers.values() for x in (layer.bits, layer.order)]
        return sum(x.nbytes for x in tensors if x is not None)

    def density(self) -> float:
        return _mean(d for layer in self.layers.values() for d in layer.density)

    def recall(self) -> float:
        return _mean(r for layer in self.layers.values() for r in layer.recall)

    def named(self, source: str) -> "CarriedPattern":
        return replace(self, source=source)

    def find(
        self, call: Call, family: str, config: AdaSpaConfig
    ) -> tuple[CarriedLayer | None, str]:
        """Return the mask of a call's layer, or None and the reason that it does not fit."""
        layout, block_size = call.layout, config.block_size
        if family != self.family:
            return None, f"the pattern is of {self.family}, and this model is {family}"
        if layout != self.layout:
            return None, (
                f"the pattern is for {self.layout.describe()}, and this run has {layout.describe()}"
            )
        if block_size != self.block_size:
            return None, (
                f"the pattern has blocks of {self.block_size}, and `block_size` is {block_size}"
            )
        if config.pooled != self.pooled:
            wanted = "pooled" if config.pooled else "none"
            return None, f"the pattern was found with `tail` {self.tail}, and this run has {wanted}"
        if call.name is None:
            return None, "parts of a video and passes that skip blocks do not share patterns"
        layer = self.layers.get(call.name)
        if layer is None:
            return None, "the pattern does not know the layer or the prompt"
        batch, heads = call.q.shape[:2]
        if layer.bits.shape[:2] != (batch, heads):
            return None, (
                f"the pattern is for {layer.bits.shape[0]} video(s) and {layer.bits.shape[1]} "
                f"heads, and this run has {batch} and {heads}"
            )
        return layer, ""


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
