"""Times work on a CPU or a GPU without waiting for the GPU at each call."""

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch

from .memory import until_out_of_memory


@dataclass
class Timing:
    """Seconds of attention calls, one entry per call and batch row.

    Args:
        search: first searches, dense output included; `search_dense` is their dense pass alone.
        search_again: later searches, without output.
        carry: measuring what carried masks hold. sample: what masks still hold in a later step.
        shapes: the same by shape of a call and kind.
    """

    dense: list[float] = field(default_factory=list)
    search: list[float] = field(default_factory=list)
    search_dense: list[float] = field(default_factory=list)
    search_again: list[float] = field(default_factory=list)
    sparse: list[float] = field(default_factory=list)
    carry: list[float] = field(default_factory=list)
    sample: list[float] = field(default_factory=list)
    shapes: dict[tuple[tuple, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def searching(self) -> float:
        return sum(map(sum, (self.search, self.search_again, self.carry, self.sample)))

    def spent(self) -> float:
        return sum(self.dense) + self.searching() + sum(self.sparse)

    def dense_call(self) -> float | None:
        """Seconds of one dense call: of this run's dense steps, else of its searches' dense pass."""
        calls = self.dense or self.search_dense
        return median(calls) if calls else None

    def sparse_call(self) -> float | None:
        """Seconds of one sparse call."""
        return median(self.sparse) if self.sparse else None

    def saved(self) -> float | None:
        """Seconds saved over running every call dense; negative when the searches cost more."""
        dense = self.dense_call()
        if dense is None or not (self.sparse or self.search):
            return None
        return dense * (len(self.sparse) + len(self.search)) - sum(self.sparse) - self.searching()


def shape_of(q: torch.Tensor) -> tuple:
    """What decides how long a call of one video takes: heads, tokens, dimension, dtype, device."""
    return *q.shape[1:], q.dtype, q.device


class Timer:
    """Measures blocks of work; GPU readings arrive at the next `read`.

    Args:
        timing: where seconds go.
    """

    def __init__(self, timing: Timing):
        self.timing = timing
        self._pending = []

    @contextmanager
    def measure(self, kind: str, q: torch.Tensor):
        """Time the body as a `kind` of `Timing`; `q` lies on its device and has the batch first."""
        if q.device.type != "cuda":
            start = time.perf_counter()
            yield
            self._note(kind, shape_of(q), len(q), time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(q.device)
        begin.record(stream)
        yield
        end.record(stream)
        self._pending.append((kind, shape_of(q), len(q), begin, end))

    @contextmanager
    def attempt(self, kind: str, q: torch.Tensor):
        """Time the body as `measure` does `until_out_of_memory`; then it has no time."""
        with until_out_of_memory(), self.measure(kind, q):
            yield

    def read(self) -> None:
        """Wait for the measured work and note its seconds."""
        pending, self._pending = self._pending, []
        for kind, shape, rows, begin, end in pending:
            end.synchronize()
            self._note(kind, shape, rows, begin.elapsed_time(end) / 1000)

    def clear(self) -> None:
        self._pending.clear()

    def _note(self, kind: str, shape: tuple, rows: int, seconds: float) -> None:
        for times in (getattr(self.timing, kind), self.timing.shapes[shape, kind]):
            times.extend([seconds / rows] * rows)
