"""A run over a backend that notes what it is asked to do, and a host that is counted."""

from dataclasses import replace

import torch
from close import assert_same_choice, mass_rounding

from sparse_attn.backends import reference
from sparse_attn.backends.choice import plain_torch
from sparse_attn.call import Call
from sparse_attn.config import AdaSpaConfig
from sparse_attn.method.head_adaptive import HIGH_RECALL
from sparse_attn.run.estimate import Workload
from sparse_attn.run.state import RunState
from sparse_attn.schedule import Schedule, StepKind
from sparse_attn.token_layout import TokenLayout
from tests.method.chosen import chosen

TORCH = plain_torch()
KINDS = {"D": StepKind.DENSE, "S": StepKind.SEARCH, "s": StepKind.SPARSE}
# 20 text tokens and 620 of video: ten blocks, the first a sink
LAYOUT = TokenLayout(20, 5, 4, 31)
L, H, D, SCALE = LAYOUT.tokens, 2, 16, 0.25
BLOCKS = {"block_q": 64, "block_k": 64, "scale": SCALE}


def no_memory():
    return torch.OutOfMemoryError("CUDA out of memory")


def schedule(kinds, first=0):
    sigmas = tuple(float(x) for x in range(len(kinds), 0, -1))
    return Schedule(tuple(KINDS[k] for k in kinds), first, first + len(kinds), sigmas)


def tensors(seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, H, 5, D, generator=generator).repeat_interleave(L // 5, 2)
    q, k = (centres + torch.randn(batch, H, L, D, generator=generator) for _ in range(2))
    return q, k, torch.randn(batch, H, L, D, generator=generator)


def host_attention(q, k, v):
    return reference.attention(q, k, v, scale=SCALE)[0]


def call_of(qkv, step=0, dense=None, layout=LAYOUT, **more):
    """A call of layer 0 of the positive prompt."""

    def host(heads=None):
        return host_attention(*(x[:, :heads] for x in qkv))

    fields = {"layer": 0, "role": "positive", "key": "layer 0", **more}
    return Call(*qkv, SCALE, layout, step, dense or host, **fields)


class Backend:
    """Plain torch that notes what it is asked to do; `one_pass` as the kernels search."""

    def __init__(self, one_pass=False):
        self.one_pass_search = one_pass
        self.did = []
        self.fails = {}
        self.refuses = None

    def _note(self, what):
        self.did.append(what)
        if what in self.fails:
            raise self.fails[what]

    def attention(self, *qkv, mask=None, **options):
        self._note("dense" if mask is None else "sparse")
        return TORCH.attention(*qkv, mask=mask, **options)

    def attention_with_masses(self, q, k, v, *, previous_lse, block_q, block_k, **options):
        self._note("dense with masses")
        blocks = {"block_q": block_q, "block_k": block_k}
        masses = TORCH.block_masses(q, k, previous_lse, **blocks, **options)
        return *TORCH.attention(q, k, v, **options), masses

    def block_masses(self, *args, int8=False, **options):
        self._note("int8 masses" if int8 else "masses")
        return TORCH.block_masses(*args, **options)

    def pooled_masses(self, *args, **options):
        self._note("pooled masses")
        return TORCH.pooled_masses(*args, **options)

    def permute(self, *args):
        self._note("permute")
        return TORCH.permute(*args)

    tail_error = staticmethod(TORCH.tail_error)
    row_wise_top_k = staticmethod(TORCH.row_wise_top_k)
    features = staticmethod(TORCH.features)
    pca_tree = staticmethod(TORCH.pca_tree)

    def why_not_quantised(self, q, k, v, block_q, block_k):
        self.asked = block_q, block_k
        return self.refuses

    def quantised_attention(self, q, k, v, **options):
        """Coarse values instead of coarse everything, so that it can be told from the exact one."""
        self._note("int8")
        return TORCH.attention(q, k, coarse(v), **options)


def coarse(v):
    return (v * 4).round() / 4


def fastest_of(name):
    """A choice of dense attention: that candidate where it is one, else our own, else the host's."""

    def fastest(call, candidates):
        return next(x for x in (name, "own", "host") if x in candidates)

    return fastest


class Run:
    """A `RunState`, its backend, and how often the host was called.

    Who runs a dense call is not measured, since the clock would choose now this one and now that.
    Our own attention does where it may.

    Args:
        kinds: of its steps, such as "DSs".
        first: number of the first step within the whole schedule.
    """

    def __init__(
        self, kinds, backend=None, first=0, layout=LAYOUT, carried=None, free_bytes=None, **config
    ):
        fields = {"sparsity": 0.6, "min_tokens": 0, "tail": "none", **config}
        self.backend, self.layout, self.host_calls = backend or Backend(), layout, 0
        self.state = RunState(
            AdaSpaConfig(**fields), schedule(kinds, first), carried=carried, free_bytes=free_bytes
        )
        self.state.backends.of = lambda q, k, v: (self.backend, "a backend")
        self.make_fastest("own")

    def make_fastest(self, name):
        self.state.dense.choice.fastest = fastest_of(name)

    @property
    def statistics(self):
        return self.state.statistics

    def layer(self, key="layer 0"):
        return self.state.layers[key]

    def pattern(self, key="layer 0"):
        return self.layer(key).pattern

    def estimate(self, qkv=None, layers=1):
        """Say what `layers` layers like that of `qkv` will hold, as the host does beforehand."""
        call = call_of(qkv or tensors(), layout=self.layout)
        work = Workload(self.layout, layers, layers, len(call.q), call.q.shape[1])
        return self.state.estimate(call, work)

    def attends(self, step, qkv=None):
        """Whether a call of a step is one for `attend`, and not plainly dense."""
        return not self.state.is_plainly_dense(call_of(qkv or tensors(), step))

    def attend(self, step, qkv=None, **more):
        """One call; returns its output and what the backend and the host did for it."""
        qkv = qkv or tensors()
        self.backend.did, before = [], self.host_calls

        def host(heads=None):
            self.host_calls += 1
            return host_attention(*(x[:, :heads] for x in qkv))

        out = self.state.attend(call_of(qkv, step, host, self.layout, **more))
        return out, self.backend.did + (self.host_calls - before) * ["host"]


def exact_masses(q, k, key_bias=None, **blocks):
    lse = reference.scaled_logits(q.double(), k.double(), SCALE, key_bias).logsumexp(-1)
    options = {**BLOCKS, **blocks, "key_bias": key_bias}
    return reference.block_masses(q.double(), k.double(), lse, **options).float()


def assert_best_choice(run, q, k, key_bias=None, key="layer 0"):
    """Fail unless the mask is what exact masses choose, but for rounding; returns it."""
    config, keep = run.state.config, run.pattern(key).mask.to_dense()
    masses = exact_masses(q, k, key_bias, **config.blocks)
    error = mass_rounding(q, k, SCALE, **config.blocks)
    _, held = chosen(masses, LAYOUT, replace(config, head_adaptive=False))
    # rounding does not decide which heads give blocks to others
    apart = [held[:, i] - held[:, j] for i in range(H) for j in range(i)]
    assert torch.stack([*apart, *(held - HIGH_RECALL).unbind(1)]).abs().min() > 4 * error
    assert_same_choice(keep, chosen(masses, LAYOUT, config)[0], masses.double(), error * masses)
    assert not keep.all()
    return keep


def dense(q, k, v, key_bias=None):
    bias = None if key_bias is None else key_bias.double()
    qkv = [x.double() for x in (q, k, v)]
    return reference.attention(*qkv, scale=SCALE, key_bias=bias)[0]
