"""What calls leave on the device for the statistics, read once per step instead of once per call."""

import threading
from typing import NamedTuple

import torch

from ..call import Call
from .layers import Layer, LayerPattern
from .statistics import Pattern, RunStatistics


class Origin(NamedTuple):
    """Which call something is of, without its tensors: those end with the model's block."""

    step: int
    layer: int
    role: str

    @classmethod
    def of(cls, call: Call) -> "Origin":
        return cls(call.step, call.layer, call.role)


def waits(device: torch.device) -> bool:
    """Whether to read from a device means to wait for it."""
    return device.type == "cuda"


class Readback:
    """Patterns, samples and probes that wait to be read.

    Args:
        statistics: where they go.
    """

    def __init__(self, statistics: RunStatistics):
        self.statistics = statistics
        self._patterns: list[
            tuple[Origin, Layer, LayerPattern, torch.Tensor, torch.Tensor, bool]
        ] = []
        self._samples: list[tuple[Origin, Layer, torch.Tensor]] = []
        self._probes: list[tuple[Origin, Layer, torch.Tensor]] = []
        self._lock = threading.Lock()

    def add_pattern(
        self, call: Call, layer: Layer, pattern: LayerPattern, recall: torch.Tensor,
        block_map: torch.Tensor, exact: bool,
    ) -> None:  # fmt: skip
        """Note a layer's new pattern.

        Args:
            recall: [H], what it holds in this call. block_map: of `BlockMask`, on the device.
            exact: whether the recall was measured with the call's own LSE.
        """
        with self._lock:
            self._patterns.append((Origin.of(call), layer, pattern, recall, block_map, exact))

    def add_sample(self, call: Call, layer: Layer, recall: torch.Tensor) -> None:
        """Note what a mask holds in a later step, by a sample of its rows; `recall` is [H]."""
        with self._lock:
            self._samples.append((Origin.of(call), layer, recall))

    def add_probe(self, call: Call, layer: Layer, probe: torch.Tensor) -> None:
        """Note a number that is finite where the output is."""
        with self._lock:
            self._probes.append((Origin.of(call), layer, probe))

    def read(self) -> list[tuple[Origin, Layer]]:
        """Wait for the device, and return the calls that met NaN or infinity, with their layers.

        What such a layer found in the same step does not count.
        """
        patterns, samples, probes = self._take()
        broken = [(call, layer) for call, layer, probe in probes if not torch.isfinite(probe)]

        def sound(call, layer, recall) -> bool:
            # NaN is no such number
            if not all(0 <= r <= 1.001 for r in recall):
                broken.append((call, layer))
            return not layer.dense_reason and all(layer is not other for _, other in broken)

        for call, layer, pattern, recall, block_map, exact in patterns:
            recall, similar = recall.tolist(), pattern.similar
            if sound(call, layer, recall):
                self.statistics.patterns[call.layer, call.role] = Pattern(
                    self._step(call), exact, pattern.density.tolist(), recall, block_map.cpu(),
                    pattern.carried, None if similar is None else similar.tolist(),
                )  # fmt: skip
        for call, layer, recall in samples:
            recall = recall.tolist()
            if sound(call, layer, recall):
                self.statistics.patterns.samples[call.layer, call.role] = self._step(call), recall
        return broken

    def clear(self) -> None:
        self._take()

    def _take(self) -> tuple[list, list, list]:
        with self._lock:
            taken = self._patterns, self._samples, self._probes
            self._patterns, self._samples, self._probes = [], [], []
        return taken

    def _step(self, call: Origin) -> int:
        return self.statistics.schedule.first_step + call.step
