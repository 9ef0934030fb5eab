import pytest
import torch

from sparse_attn.run import cache as memory
from sparse_attn.run.cache import Cache


def test_what_is_kept_has_memory_of_its_own():
    for place in ("gpu", "cpu"):
        cache, tensor = Cache(place), torch.arange(3)
        stored = cache.keep(tensor)
        tensor.zero_()
        assert stored.tolist() == [0, 1, 2] and cache.fetch(stored, tensor.device) is stored


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@cuda
def test_the_cpu_cache_gives_back_what_it_was_given():
    cache, device = Cache("cpu"), torch.device("cuda", 0)
    tensor = torch.arange(1000, device=device)
    stored = cache.keep(tensor)
    assert stored.device.type == "cpu" and stored.is_pinned()
    assert torch.equal(cache.fetch(stored, device), tensor)
    cache.prefetch(stored, device)
    assert torch.equal(cache.fetch(stored, device), tensor)
    cache.clear()


class FakeStream:
    def __init__(self, *args):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


class FakeCopy:
    """A stored tensor's contents on another device."""

    def __init__(self, contents):
        self.contents, self.streams = contents, []

    def record_stream(self, stream):
        self.streams.append(stream)


class FakeStored:
    """A stored tensor that counts its copies."""

    device = "cpu"

    def __init__(self, contents=0):
        self.contents, self.copies = contents, []

    def to(self, device, non_blocking):
        self.copies.append(FakeCopy(self.contents))
        return self.copies[-1]


@pytest.fixture
def streams(monkeypatch):
    current = FakeStream()
    monkeypatch.setattr(memory.torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(memory.torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(memory.torch.cuda, "current_stream", lambda device: current)
    return current


def test_fetches_ahead_once_and_hands_it_out_once(streams):
    cache, stored = Cache("cpu"), FakeStored()
    cache.prefetch(stored, "cuda:0")
    cache.prefetch(stored, "cuda:0")
    assert len(stored.copies) == 1
    fetched = cache.fetch(stored, "cuda:0")
    assert fetched is stored.copies[0] and fetched.streams == [streams]
    assert len(streams.waited) == 1, "the current work must wait for the copy"
    assert cache.fetch(stored, "cuda:0") is stored.copies[1]


def test_a_replaced_tensor_gives_its_copy_back(streams):
    cache, stored = Cache("cpu"), FakeStored()
    cache.prefetch(stored, "cuda:0")
    cache.forget(stored)
    assert cache.fetch(stored, "cuda:0") is stored.copies[1]


def test_a_copy_is_never_mistaken_for_that_of_a_later_tensor(streams):
    """A freed tensor's id is free for the next one: a mask once came back as its predecessor."""
    cache = Cache("cpu")
    for number in range(200):
        stored = FakeStored(number)
        fetched = cache.fetch(stored, "cuda:0")
        assert fetched.contents == number
        cache.prefetch(stored, "cuda:0")
        del stored, fetched
