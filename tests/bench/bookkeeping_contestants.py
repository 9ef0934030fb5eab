"""What a sparse call and a search cost beside attention: selection, packing, lists, and Python."""

import time
from dataclasses import replace

import torch

from sparse_attn.backends.triton.unpack_mask import unpack_mask
from sparse_attn.call import Call
from sparse_attn.config import AdaSpaConfig
from sparse_attn.run.state import RunState
from sparse_attn.schedule import Schedule, StepKind
from sparse_attn.token_layout import TokenLayout

DENSITY = 0.2
TEXT = 256
CALLS = 200


class LayerRun:
    """A run of one layer that has searched; goes on as often as wanted.

    Args:
        kernels: whether the attention and mass kernels run; without them their last results serve.
    """

    def __init__(self, q, k, v, scale, *, kernels=True, **config):
        config = AdaSpaConfig(
            sparsity=1 - DENSITY, min_tokens=0, cache="gpu", tail="none", **config
        )
        # the last search keeps the LSE for the one that may follow
        kinds = [StepKind.SEARCH, StepKind.SPARSE, StepKind.SEARCH, StepKind.SEARCH]
        self.run = RunState(config, Schedule(tuple(kinds), 0, 4, (1.0, 0.7, 0.4, 0.1)))
        layout = TokenLayout(TEXT, 1, 1, q.shape[2] - TEXT)

        def dense(heads=None):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

        self.calls = [
            Call(q, k, v, scale, layout, step, dense, role="positive", key=0) for step in range(3)
        ]
        self.run.attend(self.calls[0])
        (self.layer,) = self.run.layers.values()
        if not kernels:
            self._take_away_kernels()

    def _take_away_kernels(self):
        last = {}

        def recorded(name, kernel):
            def call(*args, **options):
                last[name] = kernel(*args, **options)
                return last[name]

            return call

        names, backend = ("attention", "block_masses"), self.layer.backend
        kept = {name: recorded(name, getattr(backend, name)) for name in names}
        self.layer.backend = replace(backend, **kept)
        self.search()
        kept = {name: lambda *args, name=name, **options: last[name] for name in names}
        self.layer.backend = replace(backend, **kept)

    def sparse(self):
        return self._attend(1)

    def search(self):
        """A search from the cached LSE, and the sparse attention of the same step."""
        self.layer.pattern = replace(self.layer.pattern, searched_at=0)
        return self._attend(2)

    def _attend(self, step):
        out = self.run.attend(self.calls[step])
        self.run.readback.clear()
        return out


def enter_bookkeeping(contest):
    tensors = contest.q, contest.k, contest.v, contest.scale
    bare = LayerRun(*tensors, kernels=False)
    paper = LayerRun(*tensors, kernels=False, head_adaptive=True)
    whole = LayerRun(*tensors)

    def wrong(_):
        """Blocks by which a row's list misses its budget, over all rows."""
        mask = whole.layer.pattern.mask
        return float((unpack_mask(mask)[1] != mask.to_dense().sum(-1)).sum().item())

    contest.enter("ours, sparse step, whole call", whole.sparse, DENSITY, wrong)
    contest.enter("ours, sparse step, all but the kernel", bare.sparse)
    contest.enter("ours, search step, all but the kernels", bare.search)
    contest.enter("ours, head-adaptive search, all but the kernels", paper.search)


def python_ms(device) -> float:
    """Milliseconds of Python and launches per sparse call: a call too small to keep a GPU busy."""
    q, k, v = (torch.randn(1, 2, 1024, 64, device=device).bfloat16() for _ in range(3))
    layer = LayerRun(q, k, v, 0.125)
    for _ in range(CALLS):
        layer.sparse()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(CALLS):
        layer.sparse()
    took = time.perf_counter() - start
    layer.run.free()
    return 1000 * took / CALLS
