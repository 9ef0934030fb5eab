"""Times work on a CPU or a GPU without waiting for the GPU at each call."""

import time
from collections.abc import Callable
from contextlib import contextmanager

import torch


class Stopwatch:
    """Measures blocks of work; GPU readings arrive at the next `drain`."""

    def __init__(self):
        self._pending = []

    @contextmanager
    def measure(self, device: torch.device, record: Callable[[float], None]):
        """Run the body and hand its seconds to `record`, now or at the next `drain`."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            record(time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        yield
        end.record(stream)
        self._pending.append((begin, end, record))

    def drain(self) -> None:
        """Wait for the measured work and hand out its seconds."""
        pending, self._pending = self._pending, []
        for begin, end, record in pending:
            end.synchronize()
            record(begin.elapsed_time(end) / 1000)
