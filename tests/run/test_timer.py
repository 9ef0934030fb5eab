import weakref
from unittest.mock import MagicMock

import pytest
import torch

from sparse_attn.run import timer as module
from sparse_attn.run.timer import Timer, Timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told: clock.sleep(seconds)."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def on_cpu(rows=1):
    return torch.zeros(rows, 1)


def noted(timer) -> dict[str, list[float]]:
    """Seconds by kind, and the same by shape of the call."""
    kinds = {kind: took for kind, took in vars(timer.timing).items() if kind != "shapes" and took}
    shapes = {kind: took for (_, kind), took in timer.timing.shapes.items()}
    assert shapes == kinds
    return kinds


def test_notes_a_cpus_seconds_at_once(clock):
    timer = Timer(Timing())
    with timer.measure("dense", on_cpu()):
        clock.sleep(2.5)
    assert noted(timer) == {"dense": [2.5]}


def test_every_video_of_a_call_has_its_share(clock):
    timer = Timer(Timing())
    with timer.measure("sparse", on_cpu(rows=2)):
        clock.sleep(3)
    assert timer.timing.sparse == [1.5, 1.5]


def test_measurements_nest(clock):
    timer = Timer(Timing())
    with timer.measure("search", on_cpu()):
        clock.sleep(1)
        with timer.measure("search_dense", on_cpu()):
            clock.sleep(2)
    assert noted(timer) == {"search": [3.0], "search_dense": [2.0]}


def test_work_that_fails_has_no_time(clock):
    timer = Timer(Timing())
    with pytest.raises(RuntimeError, match="broken"), timer.measure("dense", on_cpu()):
        raise RuntimeError("broken")
    assert noted(timer) == {}


def test_an_attempt_ends_where_memory_does_and_lets_go_of_what_it_held(clock):
    timer, held = Timer(Timing()), []

    def work():
        large = torch.zeros(100)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no room")

    with timer.attempt("sparse", on_cpu()):
        work()
    assert noted(timer) == {} and held[0]() is None
    with pytest.raises(RuntimeError, match="broken"), timer.attempt("sparse", on_cpu()):
        raise RuntimeError("broken")


class FakeEvent:
    """A CUDA event on a stream whose work takes a second between events."""

    recorded = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.synchronized = False

    def record(self, stream):
        FakeEvent.recorded += 1
        self.at = FakeEvent.recorded * 1000

    def synchronize(self):
        self.synchronized = True

    def elapsed_time(self, end):
        assert end.synchronized, "read before the work was done"
        return end.at - self.at


def test_a_gpus_seconds_wait_to_be_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    timer, q = Timer(Timing()), MagicMock(device=torch.device("cuda", 0))
    q.__len__.return_value = 1
    with timer.measure("dense", q):
        pass
    assert noted(timer) == {}
    timer.read()
    assert noted(timer) == {"dense": [1.0]}
    timer.read()
    assert noted(timer) == {"dense": [1.0]}, "noted once"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measures_real_work_on_a_gpu(device):
    timer, x = Timer(Timing()), torch.randn(1, 4096, 4096, device=device)
    x @ x
    with timer.measure("dense", x):
        x @ x
    timer.read()
    assert 1e-5 < timer.timing.dense[0] < 1
