"""What calls leave on the device for the statistics, read once per step instead of once per call."""

import threading
from collections.abc import Callable

import torch

from ..call import Call
from .layers import LayerState
from .statistics import Pattern, RunStatistics

NOT_A_NUMBER = "NaN or infinity in q, k or v"


class Findings:
    """Masks, samples and probes that wait to be read.

    Args:
        statistics: where they go.
    """

    def __init__(self, statistics: RunStatistics):
        self.statistics = statistics
        # call, its layer, what was found, and read(call, found) -> whether its numbers are sound
        self._pending: list[tuple[Call, LayerState, tuple, Callable]] = []
        self._lock = threading.Lock()

    def add_mask(self, call: Call, state: LayerState, recall, block_map, *, exact: bool) -> None:
        """Note a layer's new mask.

        Args:
            recall: [H]. block_map: [H, rows, columns] uint8.
        """
        found = state.density, recall, block_map, exact, state.carried, state.similar
        self._add(call, state, found, self._read_mask)

    def add_sample(self, call: Call, state: LayerState, recall: torch.Tensor) -> None:
        """Note what a mask holds in a later step, by a sample of its rows; `recall` is [H]."""
        self._add(call, state, (recall,), self._read_sample)

    def add_probe(self, call: Call, state: LayerState, probe: torch.Tensor) -> None:
        """Note a number that is finite where the output is."""
        self._add(call, state, (probe,), lambda call, probe: bool(torch.isfinite(probe)))

    def _add(self, *finding):
        with self._lock:
            self._pending.append(finding)

    def read(self) -> None:
        """Wait for the device; a layer with NaN or infinity runs dense from the next step on."""
        with self._lock:
            pending, self._pending = self._pending, []
        for call, state, found, read in pending:
            if not read(call, *found) and not state.stays_dense:
                state.give_up(NOT_A_NUMBER)
                self.statistics.warn(
                    f"{NOT_A_NUMBER}: the layers concerned run dense after step {self._step(call)}"
                )

    def clear(self) -> None:
        self._pending.clear()

    def _read_mask(self, call, density, recall, block_map, exact, carried, similar):
        pattern = Pattern(
            self._step(call), exact, density.tolist(), recall.tolist(), block_map.cpu(), carried,
            None if similar is None else similar.tolist(),
        )  # fmt: skip
        sound = _are_shares(pattern.recall)
        if sound:
            self.statistics.patterns[call.layer, call.role] = pattern
        return sound

    def _read_sample(self, call, recall):
        found = recall.tolist()
        sound = _are_shares(found)
        if sound:
            self.statistics.samples[call.layer, call.role] = self._step(call), found
        return sound

    def _step(self, call) -> int:
        return self.statistics.schedule.first_step + call.step


def _are_shares(recall: list[float]) -> bool:
    """False for NaN too."""
    return all(0 <= r <= 1.001 for r in recall)
