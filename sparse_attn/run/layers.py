"""What a run remembers of its layers."""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..backends.choice import Backend, Backends
from ..block_mask import BlockMask
from ..call import Call, LayerName
from ..config import AdaSpaConfig
from ..orders.packed import pack, unpack
from ..orders.position import is_shared
from ..patterns.pattern import CarriedLayer, CarriedPattern
from ..token_layout import TokenLayout
from .cache import Cache
from .statistics import RunStatistics


@dataclass(frozen=True, eq=False)
class LayerPattern:
    """The pattern that a layer uses; mask and order lie where the cache has put them.

    Args:
        order: [B, H, L] int32, the token at every place of the mask's sequence, or None where that
            is q's. One that is kept, and that other layers do not share, is packed.
        density, recall: [H], of the search that found the mask.
        similar: [H], the share of the batch that is ordered by similarity, or None without a tail.
        carried: whether another run found the mask.
        searched_at: the step whose search it answers. sampled_at: the step in which it was measured
            last.
    """

    mask: BlockMask
    order: torch.Tensor | None
    density: torch.Tensor
    recall: torch.Tensor
    similar: torch.Tensor | None
    searched_at: int
    carried: bool = False
    sampled_at: int = -1

    @property
    def own_order(self) -> torch.Tensor | None:
        """The order, unless all layers share it."""
        return None if self.order is None or is_shared(self.order) else self.order


@dataclass(eq=False)
class Layer:
    """One layer of one conditioning. It has no pattern yet, or one, or runs dense for a reason.

    Args:
        lse: [B, H, bytes] uint8 of `packed_lse` in q's order, kept while a later search needs it.
        served: whether a sparse step has used its pattern. unused: steps in a row without a call.
    """

    backend: Backend | None
    name: LayerName | None
    layout: TokenLayout
    dense_reason: str = ""
    pattern: LayerPattern | None = None
    lse: torch.Tensor | None = None
    served: bool = False
    unused: int = 0

    def disable(self, reason: str) -> None:
        """Run dense from now on."""
        self.dense_reason = reason
        self.pattern = self.lse = None

    def nbytes(self) -> int:
        """Bytes held between steps."""
        pattern, tensors = self.pattern, [self.lse]
        if pattern is not None:
            tensors += [pattern.mask.bits, pattern.own_order]
        return sum(x.nbytes for x in tensors if x is not None)


class Layers(dict[Hashable, Layer]):
    """The layers that a run has met, by `Call.key`: in which order they come, what they hold.

    Args:
        cache: holds the tensors of the layers.
    """

    def __init__(self, cache: Cache, backends: Backends, statistics: RunStatistics):
        super().__init__()
        self.cache = cache
        self.backends = backends
        self.statistics = statistics
        # key -> key of the layer that is called next
        self.following: dict[Hashable, Hashable] = {}
        self._last_key = None
        # those that the present step has called, and those that it has met first
        self._called: set[Hashable] = set()
        self._new: set[Hashable] = set()
        self._lock = threading.Lock()

    def of(self, call: Call) -> Layer:
        """The layer that makes a call, made at its first one."""
        with self._lock:
            if self._last_key is not None:
                self.following.setdefault(self._last_key, call.key)
            self._last_key = call.key
            layer = self.get(call.key)
            if layer is None:
                backend, why = self.backends.of(call.q, call.k, call.v)
                self.statistics.backend = why
                layer = Layer(backend, call.name, call.layout, "" if backend else why)
                self[call.key] = layer
                self._new.add(call.key)
            self._called.add(call.key)
        return layer

    def leave_step(self) -> tuple[list[Layer], bool]:
        """Let go of the layers that a step did not call, unless it called none, as under a cache.

        Where the step has met others in their place they go at once, else after a second such step:
        guidance may leave a prompt out of every other step.

        Returns:
            Those that went, and whether the step called only layers that it met first.
        """
        with self._lock:
            called, new = self._called, self._new
            self._called, self._new = set(), set()
            if not called:
                return [], False
            gone = []
            for key, layer in self.items():
                layer.unused = 0 if key in called else layer.unused + 1
                if layer.unused > (0 if new else 1):
                    gone.append(key)
            return [self._drop(key) for key in gone], called == new

    def forget(self, wanted: Callable[[Any], bool]) -> None:
        """Let go of the layers whose key is `wanted`."""
        with self._lock:
            for key in list(filter(wanted, self)):
                self._drop(key)
                self._called.discard(key)
                self._new.discard(key)

    def _drop(self, key: Hashable) -> Layer:
        layer = self.pop(key)
        self.following.pop(key, None)
        if layer.pattern is not None:
            self.cache.forget(layer.pattern.mask.bits, layer.pattern.order)
        return layer

    def prefetch_next(self, key: Hashable, device: torch.device) -> None:
        """Start to fetch the pattern of the layer that follows the one of `key`."""
        if self.cache.place != "cpu" or device.type != "cuda":
            return
        layer = self.get(self.following.get(key))
        pattern = None if layer is None else layer.pattern
        if pattern is not None:
            self.cache.prefetch(pattern.mask.bits, device)
            if pattern.order is not None:
                self.cache.prefetch(pattern.order, device)

    def install(self, layer: Layer, pattern: LayerPattern) -> LayerPattern:
        """Put a pattern in the place of a layer's earlier one; returns it as the cache keeps it."""
        own, earlier = pattern.own_order, layer.pattern
        order = pattern.order if own is None else self.cache.keep(pack(own, layer.layout))
        mask = pattern.mask.with_bits(self.cache.keep(pattern.mask.bits))
        if earlier is not None:
            self.cache.forget(earlier.mask.bits, earlier.order)
        layer.pattern = kept = replace(pattern, mask=mask, order=order)
        return kept

    def fetch(self, layer: Layer, device: torch.device) -> tuple:
        """Mask and order of a layer's pattern, [B, H, L] int32 or None, on `device`."""
        pattern = layer.pattern
        assert pattern is not None, "the caller has seen it"
        mask = pattern.mask.with_bits(self.cache.fetch(pattern.mask.bits, device))
        if pattern.order is None:
            return mask, None
        order = self.cache.fetch(pattern.order, device)
        return mask, order if pattern.own_order is None else unpack(order, layer.layout)

    def count_held(self) -> None:
        """Note the most bytes ever held."""
        held = sum(layer.nbytes() for layer in list(self.values()))
        memory = self.statistics.memory
        memory.held_bytes = max(memory.held_bytes, held)
        # context windows hold a mask each, and how many there will be is not known before
        self.cache.make_room(held)
        memory.place = self.cache.shown_place()

    def as_pattern(self, family: str, config: AdaSpaConfig) -> CarriedPattern | None:
        """The masks of all layers, copied to the CPU, or None where there are none."""
        kept, first = {}, None
        for layer in list(self.values()):
            pattern, name = layer.pattern, layer.name
            if pattern is None or name is None or name in kept:
                continue
            mask = pattern.mask.of_blocks(layer.layout.tokens, **config.blocks)
            like = layer.layout, mask.bits.shape
            # one sequence a pattern: a part of the picture with a prompt of its own may be another
            first = first or like
            if like == first:
                order = pattern.own_order
                order = None if order is None else unpack(order.cpu(), layer.layout)
                density, recall = (tuple(x.tolist()) for x in (pattern.density, pattern.recall))
                kept[name] = CarriedLayer(mask.bits.cpu(), density, recall, order)
        if first is None:
            return None
        return CarriedPattern(family, first[0], config.block_size, kept, pooled=config.pooled)

    def clear(self) -> None:
        super().clear()
        self.following.clear()
        self._called.clear()
        self._new.clear()
        self._last_key = None
