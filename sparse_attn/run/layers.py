"""What a run remembers of its layers."""

import threading
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from ..backends.choice import Backend, Backends
from ..block_mask import BlockMask
from ..call import Call, LayerName
from ..config import AdaSpaConfig
from ..orders.position import is_shared
from ..patterns.pattern import CarriedLayer, CarriedPattern
from ..token_layout import TokenLayout
from .cache import Cache
from .statistics import RunStatistics


@dataclass
class LayerState:
    """What a run remembers of one layer: its mask, its LSE, and whether it gave up.

    `density` and `recall`, one number per head, are those of the search that found the mask, and so
    is `similar`, the share of the batch that is ordered by similarity. `order`, [B, H, L], is the
    token at every place of the mask's sequence, or None where that is q's; the LSE is in q's.
    """

    backend: Backend
    mask: BlockMask | None = None
    lse: torch.Tensor | None = None
    order: torch.Tensor | None = None
    searched_at: int = -1
    sampled_at: int = -1
    stays_dense: str = ""
    name: LayerName | None = None
    layout: TokenLayout | None = None
    density: torch.Tensor | None = None
    recall: torch.Tensor | None = None
    similar: torch.Tensor | None = None
    carried: bool = False

    def give_up(self, reason: str) -> None:
        """Run dense from now on."""
        self.stays_dense = reason
        self.mask = self.lse = self.order = None

    def nbytes(self) -> int:
        """Bytes held between steps."""
        own_order = None if self.order is None or is_shared(self.order) else self.order
        tensors = (self.lse, own_order, None if self.mask is None else self.mask.bits)
        return sum(x.nbytes for x in tensors if x is not None)


class Layers(dict[Hashable, LayerState]):
    """The layers that a run has met, by `Call.key`: in which order they come, what they hold.

    Args:
        cache: holds the tensors of the states.
    """

    def __init__(self, cache: Cache, backends: Backends, statistics: RunStatistics):
        super().__init__()
        self.cache = cache
        self.backends = backends
        self.statistics = statistics
        # key -> key of the layer that is called next
        self.following: dict[Hashable, Hashable] = {}
        self._last_key = None
        self._lock = threading.Lock()

    def of(self, call: Call) -> LayerState:
        """The state of the layer that makes a call, made at its first one."""
        with self._lock:
            if self._last_key is not None:
                self.following.setdefault(self._last_key, call.key)
            self._last_key = call.key
            state = self.get(call.key)
            if state is None:
                backend, why = self.backends.of(call.q, call.k, call.v)
                self.statistics.backend = why
                state = LayerState(backend, stays_dense="" if backend else why)
                state.name, state.layout = call.name, call.layout
                self[call.key] = state
        return state

    def prefetch_next(self, call: Call, device: torch.device) -> None:
        """Start to fetch the mask of the layer that follows."""
        if self.cache.place != "cpu" or device.type != "cuda":
            return
        state = self.get(self.following.get(call.key))
        if state is not None and state.mask is not None:
            self.cache.prefetch(state.mask.bits, device)
            if state.order is not None:
                self.cache.prefetch(state.order, device)

    def hold(self, state: LayerState, mask: BlockMask, order: torch.Tensor | None) -> None:
        """Put a new mask and its order in the place of a layer's earlier ones."""
        if order is not None and not is_shared(order):
            order = self.cache.keep(order)
        mask = mask.with_bits(self.cache.keep(mask.bits))
        for earlier in (None if state.mask is None else state.mask.bits, state.order):
            if earlier is not None:
                self.cache.forget(earlier)
        state.mask, state.order = mask, order

    def held(self, state: LayerState, device: torch.device) -> tuple:
        """A layer's mask and order on `device`."""
        mask = state.mask.with_bits(self.cache.fetch(state.mask.bits, device))
        order = None if state.order is None else self.cache.fetch(state.order, device)
        return mask, order

    def count_held(self) -> None:
        """Note the most bytes ever held."""
        held = sum(state.nbytes() for state in list(self.values()))
        statistics = self.statistics
        statistics.held_bytes = max(statistics.held_bytes, held)
        # context windows hold a mask each, and how many there will be is not known before
        self.cache.make_room(held)
        statistics.cache_place = self.cache.shown_place()

    def clear(self) -> None:
        super().clear()
        self.following.clear()
        self._last_key = None


def pattern_of(
    states: list[LayerState], family: str, config: AdaSpaConfig
) -> CarriedPattern | None:
    """The masks of a run, copied to the CPU, or None where there are none."""
    layers, first = {}, None
    for state in states:
        if state.mask is None or state.name is None or state.name in layers:
            continue
        like = state.layout, state.mask.bits.shape
        # one sequence a pattern: a part of the picture with a prompt of its own may be another
        first = first or like
        if like == first:
            order = None if state.order is None or is_shared(state.order) else state.order
            layers[state.name] = CarriedLayer(
                state.mask.bits.cpu(),
                tuple(state.density.tolist()),
                tuple(state.recall.tolist()),
                order if order is None else order.cpu(),
            )
    if not layers:
        return None
    return CarriedPattern(family, first[0], config.block_size, layers, pooled=config.pooled)
