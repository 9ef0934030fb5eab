import pytest
import torch

from sparse_attn.run import timer as stopwatch
from sparse_attn.run.timer import Stopwatch

CPU = torch.device("cpu")


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
    monkeypatch.setattr(stopwatch, "time", found)
    return found


def test_hands_out_a_cpus_seconds_at_once(clock):
    seconds = []
    with Stopwatch().measure(CPU, seconds.append):
        clock.sleep(2.5)
    assert seconds == [2.5]


def test_measurements_nest(clock):
    inner, outer = [], []
    watch = Stopwatch()
    with watch.measure(CPU, outer.append):
        clock.sleep(1)
        with watch.measure(CPU, inner.append):
            clock.sleep(2)
    assert (inner, outer) == ([2.0], [3.0])


def test_work_that_fails_has_no_time(clock):
    seconds = []
    with pytest.raises(RuntimeError, match="broken"), Stopwatch().measure(CPU, seconds.append):
        raise RuntimeError("broken")
    assert seconds == []


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


def test_a_gpus_seconds_wait_for_the_drain(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    watch, seconds = Stopwatch(), []
    with watch.measure(torch.device("cuda", 0), seconds.append):
        pass
    assert seconds == []
    watch.drain()
    assert seconds == [1.0]
    watch.drain()
    assert seconds == [1.0], "handed out once"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measures_real_work_on_a_gpu(device):
    watch, seconds = Stopwatch(), []
    x = torch.randn(4096, 4096, device=device)
    x @ x
    with watch.measure(device, seconds.append):
        x @ x
    watch.drain()
    assert 1e-5 < seconds[0] < 1
