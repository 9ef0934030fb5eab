import pytest
import torch

from sparse_attn.block_mask import BlockMask
from sparse_attn.run import cache as memory
from sparse_attn.run.cache import Cache, CacheSize, predict
from sparse_attn.schedule import Schedule, StepKind

KINDS = {"D": StepKind.DENSE, "S": StepKind.SEARCH, "s": StepKind.SPARSE}
GIB = 2**30


def schedule(kinds):
    return Schedule(tuple(KINDS[k] for k in kinds), 0, len(kinds), tuple(range(len(kinds), 0, -1)))


def sizes(kinds, one_pass=False, **shape):
    defaults = {"layers": 2, "batch": 1, "heads": 3, "tokens": 1000, "block_q": 64, "block_k": 64}
    return predict(schedule(kinds), one_pass=one_pass, **defaults | shape)


def test_hunyuan_video_at_720p_stays_below_a_gib_and_a_half():
    # 129 frames; the paper's schedule searches twice
    size = predict(
        schedule("DDSssSss"),
        layers=60, batch=1, heads=24, tokens=119_040, block_q=64, block_k=64, one_pass=True,
    )  # fmt: skip
    assert size.mask_bytes / GIB == pytest.approx(0.59, abs=0.015)
    assert size.lse_bytes / GIB == pytest.approx(0.64, abs=0.005)
    assert size.total <= 1.5 * GIB


@pytest.mark.parametrize(
    "tokens, block_q, block_k",
    [(1000, 64, 64), (1024, 64, 64), (8320, 64, 64), (1000, 128, 128), (1000, 128, 64)],
)
def test_a_mask_takes_what_its_bits_take(tokens, block_q, block_k):
    blocks = {"block_q": block_q, "block_k": block_k}
    keep = torch.ones(2, 3, -(-tokens // block_q), -(-tokens // block_k), dtype=torch.bool)
    bits = BlockMask.from_dense(keep, **blocks).bits
    size = sizes("Ss", batch=2, tokens=tokens, **blocks)
    assert size == CacheSize(mask_bytes=2 * bits.nbytes, lse_bytes=0)


MASK, LSE = 2 * 3 * 16 * 2, 2 * 3 * 1000 * 4

FULLEST = [
    # kinds, one pass, mask bytes, LSE bytes
    ("DDDD", True, 0, 0),  # nothing is searched
    ("Ssss", True, MASK, 0),  # no dense step leaves an LSE
    ("DSss", False, MASK, 0),  # two passes need no earlier LSE
    ("DSss", True, 0, LSE),  # the LSE gives way to the masks layer by layer
    ("DSsS", False, MASK, LSE),  # the first search's LSE waits for the second
    ("DSsS", True, MASK, LSE),
]


@pytest.mark.parametrize("kinds, one_pass, mask, lse", FULLEST)
def test_what_is_held_at_the_fullest_moment(kinds, one_pass, mask, lse):
    assert sizes(kinds, one_pass) == CacheSize(mask, lse)


def test_orders_take_as_much_as_an_lse_and_stay_with_the_masks():
    for kinds, one_pass, lse in (("DSss", True, 0), ("DSsS", True, LSE), ("Ssss", False, 0)):
        assert sizes(kinds, one_pass, own_orders=True) == CacheSize(MASK, lse, LSE)
    assert sizes("DDDD", own_orders=True).total == 0
    found = sizes("DSsS", keeps_lse=False, own_orders=True)
    assert found == CacheSize(MASK, 0, LSE) and found.total == MASK + LSE


def test_a_search_that_measures_its_own_lse_keeps_none():
    for kinds in ("DSss", "DSsS"):
        assert sizes(kinds, True, keeps_lse=False) == CacheSize(MASK, 0)


def test_masks_outgrow_the_lse_of_a_very_long_video():
    # a mask grows with the square of the length
    size = sizes("DSss", one_pass=True, tokens=200_000)
    assert size.mask_bytes > 2 * 3 * 200_000 * 4 and size.lse_bytes == 0


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
