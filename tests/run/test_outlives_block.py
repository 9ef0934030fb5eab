"""What a call leaves behind is allocated in the context for tensors that outlive a block."""

import gc
from contextlib import contextmanager

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.run.fakes import Run, tensors


class Allocations(TorchDispatchMode):
    """Notes every storage that is allocated outside of `outlives_block`."""

    def __init__(self):
        super().__init__()
        self.inside = 0
        self.kept, self.noted = [], set()

    @contextmanager
    def outlives_block(self):
        assert not self.inside, "not every host lets the context be entered twice"
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.note(x)
        return out

    def note(self, tensor):
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage.cdata in self.noted:
            # the address of one that is gone may be taken again
            self.noted -= {ref.cdata for ref, _ in self.kept if ref.expired()}
            self.kept = [(ref, shape) for ref, shape in self.kept if not ref.expired()]
        if storage.cdata not in self.noted and not self.inside:
            self.noted.add(storage.cdata)
            self.kept.append((storage, tuple(tensor.shape)))
        elif self.inside:
            self.noted.add(storage.cdata)

    def alive(self):
        gc.collect()
        return [shape for ref, shape in self.kept if not ref.expired()]


@pytest.mark.parametrize(
    ("kinds", "config"),
    [
        ("DSsSs", {}),
        ("SsSs", {"tail": "pooled"}),
        ("Sss", {"recall": 0.9, "tail": "pooled"}),
    ],
    ids=["dense first", "tail", "recall"],
)
@pytest.mark.parametrize("later", [False, True], ids=["cpu", "gpu"])
def test_no_tensor_of_a_block_outlives_it(monkeypatch, kinds, config, later):
    monkeypatch.setattr("sparse_attn.run.serving.waits", lambda device: later)
    run, allocations = Run(kinds, **config), Allocations()
    run.state.serving.outlives_block = allocations.outlives_block
    for step in range(len(kinds)):
        for key in ("layer 0", "layer 1"):
            with allocations:
                # q, k and v are the block's too
                qkv = tuple(x.clone() for x in tensors())
                out, _ = run.attend(step, qkv, key=key)
            del qkv, out
            assert allocations.alive() == [], f"step {step}, {key}"
        run.state.end_step()
    assert run.statistics.patterns
