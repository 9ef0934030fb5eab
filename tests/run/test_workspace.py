"""What a call allocates beside its results, by tensors without contents that stand for a GPU's."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from sparse_attn.call import Call, empty_output
from sparse_attn.config import AdaSpaConfig
from sparse_attn.head_groups import WORKSPACE_BYTES
from sparse_attn.method.fused_online_search import fused_online_search
from sparse_attn.method.lse_cached_search import lse_cached_search
from sparse_attn.method.sparse_step import sparse_step
from sparse_attn.token_layout import TokenLayout
from tests.backends.implementations import kernels_alone
from tests.run.fakes import Run

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
    "Wan 14B, 720p": (TokenLayout(0, 21, 45, 80), 40),
    # of 24 heads, which go one at a time there
    "HunyuanVideo, 24 s": (TokenLayout(0, 145, 45, 80, 256), 6),
}
# what is small is not counted
ROOM = 1.03 * WORKSPACE_BYTES


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels must be interpreted")


def a_call(layout, heads):
    x = torch.empty(3, 1, layout.tokens, heads, D, device=META, dtype=torch.bfloat16)
    by_position = torch.empty(layout.tokens, device=META, dtype=torch.int32)
    q, k, v = x.transpose(2, 3)
    return Call(q, k, v, 0.1, layout, step=0, dense=lambda heads=None: v, by_position=by_position)


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


@interpreted
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_search_and_no_sparse_step_takes_more_than_the_workspace(backend, shape, config):
    call = a_call(*shape)
    lse = torch.empty(call.q.shape[:3], device=META)
    before, taken = [call.q, lse, call.by_position], {}

    def dense(call):
        return empty_output(call.v), lse.clone()

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
    assert 0 < max(taken.values()) <= ROOM, {x: round(n / 2**30, 3) for x, n in taken.items()}


@interpreted
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_dense_step_in_int8_takes_more_than_the_workspace(backend, shape):
    call = a_call(*shape)
    run = Run("DS", backend, layout=call.layout, precision="int8")
    run.make_fastest("own int8")
    for serve in (run.state.dense.serve, run.state.dense.serve_with_lse):
        taken, _ = taken_by(lambda serve=serve: serve(call), call.q)
        assert 0 < taken <= ROOM
    assert run.statistics.low_precision.calls == 2
