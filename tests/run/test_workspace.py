"""What a call allocates beside its results, by tensors without contents that stand for a GPU's."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from sparse_attn import block_mask
from sparse_attn.call import Call
from sparse_attn.config import AdaSpaConfig
from sparse_attn.head_groups import WORKSPACE_BYTES
from sparse_attn.method.fused_online_search import fused_online_search
from sparse_attn.method.lse_cached_search import lse_cached_search
from sparse_attn.method.sparse_step import sparse_step
from sparse_attn.token_layout import TokenLayout
from tests.backends.implementations import kernels_alone

FINE = 1 << 40
META = torch.device("meta")
D = 128
CONFIGS = {
    "similarity": AdaSpaConfig(),
    "rows sampled": AdaSpaConfig(query_stride=4),
    "position 128x64": AdaSpaConfig(token_order="position", block_size="128x64"),
    "recall": AdaSpaConfig(recall=0.9),
    "paper": AdaSpaConfig(tail="none", head_adaptive=True),
}
SHAPES = {
    # layout, heads, MOST_PAIRS
    "Wan 14B, 720p": (TokenLayout(0, 21, 45, 80), 40, block_mask.MOST_PAIRS),
    "HunyuanVideo, 24 s": (TokenLayout(0, 145, 45, 80, 256), 6, block_mask.MOST_PAIRS),
    "24 s, fine masks": (TokenLayout(0, 145, 45, 80, 256), 6, FINE),
}
# what is small, or of one block of a few rows, is not counted; one head of 24 s in fine blocks takes
# more than the workspace where blocks are ranked for a recall
SMALL, RANKED = 1.03, 1.35


class Allocated(TorchDispatchMode):
    """The most bytes that tensors held at once, beside those there were before and those that stay."""

    def __init__(self, *before):
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in before}
        self.held = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.held)
        return out

    def _freed(self, storage, size):
        self.known.discard(storage)
        self.held -= size


def taken_by(work, *before):
    """Bytes that `work` took beside what it answers with, and the answer."""
    with Allocated(*before) as allocated:
        answer = work()
        return allocated.most - allocated.held, answer


@pytest.fixture
def backend(monkeypatch):
    """The kernels, whose launches do nothing."""
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **options: None)
    return kernels_alone()


def test_what_is_allocated_is_counted():
    before = torch.empty(1000, device=META)

    def work():
        first = before.view(10, 100) + 1
        second = first.T.contiguous()
        del first
        return second[:5], torch.empty(7, dtype=torch.int8, device=META)

    taken, answer = taken_by(work, before)
    assert taken == 4000 - 7 and len(answer) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels must be interpreted")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_call_takes_more_than_the_workspace(backend, shape, config, monkeypatch):
    layout, heads, most_pairs = shape
    monkeypatch.setattr(block_mask, "MOST_PAIRS", most_pairs)
    options = {"device": META, "dtype": torch.bfloat16}
    q, k, v = torch.empty(3, 1, layout.tokens, heads, D, **options).transpose(2, 3)
    lse = torch.empty(1, heads, layout.tokens, device=META)
    by_position = torch.empty(layout.tokens, device=META, dtype=torch.int32)
    call = Call(q, k, v, 0.1, layout, step=0, dense=None, by_position=by_position)
    before, taken = [q, lse, by_position], {}

    def dense(call):
        return torch.empty(1, layout.tokens, heads, D, **options).transpose(1, 2), lse.clone()

    for name, known in (("one pass", lse), ("first", None)):
        taken[name], _ = taken_by(
            lambda lse=known: fused_online_search(backend, call, config, lse, dense), *before
        )
    for int8 in (False, True):
        taken["later", int8], found = taken_by(
            lambda int8=int8: lse_cached_search(backend, call, config, lse, int8), *before
        )
    before += [x for x in (found.mask.bits, found.order) if x is not None]
    for int8 in (False, True):
        taken["sparse", int8], _ = taken_by(
            lambda int8=int8: sparse_step(backend, call, found.mask, found.order, int8), *before
        )
    one_ranked = config.recall and most_pairs == FINE
    room = (RANKED if one_ranked else SMALL) * WORKSPACE_BYTES
    assert max(taken.values()) <= room, {x: round(n / 2**30, 3) for x, n in taken.items()}
    assert max(taken.values()) > 0
