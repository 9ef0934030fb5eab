"""What one attention call does, step by step, with plain torch and a counted host."""

import gc
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from close import assert_same_choice, assert_within, mass_rounding

from sparse_attn.backends import reference
from sparse_attn.backends.torch import attention as eager
from sparse_attn.config import BLOCK_SIZES, AdaSpaConfig
from sparse_attn.method.head_adaptive import HIGH_RECALL
from sparse_attn.method.recall import recall
from sparse_attn.method.selection import select
from sparse_attn.run import state as run_state
from sparse_attn.run import timer as stopwatch
from sparse_attn.run.cache import Cache
from sparse_attn.run.dense import DenseChoice
from sparse_attn.run.precision import NOT_ALLOWED
from sparse_attn.run.state import NOT_A_NUMBER, OUT_OF_MEMORY, Call, RunState
from sparse_attn.schedule import Schedule, StepKind
from sparse_attn.token_layout import TokenLayout

KINDS = {"D": StepKind.DENSE, "S": StepKind.SEARCH, "s": StepKind.SPARSE}
# 20 text tokens and 620 of video: ten blocks, the first a sink
LAYOUT = TokenLayout(20, 5, 4, 31)
L, H, D, SCALE = LAYOUT.tokens, 2, 16, 0.25
BLOCKS = {"block_q": 64, "block_k": 64, "scale": SCALE}


def schedule(kinds, first=0):
    sigmas = tuple(float(x) for x in range(len(kinds), 0, -1))
    return Schedule(tuple(KINDS[k] for k in kinds), first, first + len(kinds), sigmas)


def tensors(seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, H, 5, D, generator=generator).repeat_interleave(L // 5, 2)
    q, k = (centres + torch.randn(batch, H, L, D, generator=generator) for _ in range(2))
    return q, k, torch.randn(batch, H, L, D, generator=generator)


class Backend:
    """Plain torch that notes what it is asked to do; `one_pass` as the kernels search."""

    def __init__(self, one_pass=False):
        self.ONE_PASS_SEARCH = one_pass
        self.did = []
        self.fails = {}

    def _note(self, what):
        self.did.append(what)
        if what in self.fails:
            raise self.fails[what]

    def dense_attention(self, q, k, v, *, previous_lse=None, block_q=64, block_k=64, **options):
        self._note("dense" if previous_lse is None else "dense with masses")
        out, lse, _ = eager.dense_attention(q, k, v, **options)
        if previous_lse is None:
            return out, lse, None
        blocks = {"block_q": block_q, "block_k": block_k}
        return out, lse, eager.block_masses(q, k, previous_lse, **blocks, **options)

    def block_masses(self, *args, int8=False, **options):
        self._note("int8 masses" if int8 else "masses")
        return eager.block_masses(*args, **options)

    def sparse_attention(self, *args, **options):
        self._note("sparse")
        return eager.sparse_attention(*args, **options)

    def pooled_masses(self, *args, **options):
        self._note("pooled masses")
        return eager.pooled_masses(*args, **options)

    def arrange(self, *args):
        self._note("arrange")
        return eager.arrange(*args)

    unpack_mask = staticmethod(eager.unpack_mask)

    refuses = None

    def why_not_low_precision(self, q, k, v, block_q, block_k, precision):
        self.asked = block_q, block_k, precision
        return self.refuses

    def low_precision_attention(self, q, k, v, *, scale, precision, kv_indices=None,
                                kv_num_blocks=None, block_q=64, block_k=64, key_bias=None):  # fmt: skip
        """Coarse values instead of coarse everything, so that it can be told from the exact one."""
        self._note(precision)
        v = (v * 4).round() / 4
        if kv_indices is None:
            return eager.dense_attention(q, k, v, scale=scale, key_bias=key_bias)[:2]
        blocks = {"block_q": block_q, "block_k": block_k}
        return eager.sparse_attention(
            q, k, v, kv_indices, kv_num_blocks, scale=scale, key_bias=key_bias, **blocks
        )


class Host:
    """The attention the host would have run, counted."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, k, v):
        self.calls += 1
        return reference.dense_attention(q, k, v, scale=SCALE)[0]


@pytest.fixture
def make_run(monkeypatch):
    def make(kinds, backend=None, first=0, **config):
        backend = backend or Backend()
        monkeypatch.setattr(run_state.attention, "choose", lambda *args: (backend, "a backend"))
        fields = {"sparsity": 0.6, "min_tokens": 0, "tail": "none", **config}
        run = RunState(AdaSpaConfig(**fields), schedule(kinds, first))
        return SimpleNamespace(state=run, backend=backend, host=Host())

    return make


def attend(run, step, qkv=None, key="layer 0", layer=0, role="positive", **more):
    """One call; returns its output and what the backend and the host did for it."""
    q, k, v = qkv or tensors()
    run.backend.did, before = [], run.host.calls
    call = Call(key, layer, role, step, LAYOUT, SCALE, run.host, **more)
    out = run.state.attend(call, q, k, v)
    return out, run.backend.did + (run.host.calls - before) * ["host"]


def state_of(run, key="layer 0"):
    return run.state.layers[key]


def exact_masses(q, k, key_bias=None, **blocks):
    lse = reference.scaled_logits(q.double(), k.double(), SCALE, key_bias).logsumexp(-1)
    options = {**BLOCKS, **blocks, "key_bias": key_bias}
    return reference.block_masses(q.double(), k.double(), lse, **options).float()


def assert_best_choice(run, q, k, key_bias=None, key="layer 0"):
    """Fail unless the mask is what exact masses choose, but for rounding; returns it."""
    config, keep = run.state.config, state_of(run, key).mask.to_dense()
    blocks = {"block_q": config.block_q, "block_k": config.block_k}
    masses, error = exact_masses(q, k, key_bias, **blocks), mass_rounding(q, k, SCALE, **blocks)
    _, held = select(masses, LAYOUT, replace(config, head_adaptive=False))
    # rounding does not decide which heads give blocks to others
    apart = [held[:, i] - held[:, j] for i in range(H) for j in range(i)]
    assert torch.stack([*apart, *(held - HIGH_RECALL).unbind(1)]).abs().min() > 4 * error
    assert_same_choice(keep, select(masses, LAYOUT, config)[0], masses.double(), error * masses)
    assert not keep.all()
    return keep


def dense(q, k, v, key_bias=None):
    bias = None if key_bias is None else key_bias.double()
    qkv = [x.double() for x in (q, k, v)]
    return reference.dense_attention(*qkv, scale=SCALE, key_bias=bias)[0]


SEQUENCES = [
    # kinds, one pass, what each step's call does
    ("Sss", False, [["dense", "masses"], ["sparse"], ["sparse"]]),
    ("Sss", True, [["dense", "masses"], ["sparse"], ["sparse"]]),  # no earlier LSE yet
    ("DSs", True, [["dense"], ["dense with masses"], ["sparse"]]),
    ("SsSs", False, [["dense", "masses"], ["sparse"], ["masses", "sparse"], ["sparse"]]),
    ("SSSs", False, [["dense", "masses"], ["masses", "sparse"], ["masses", "sparse"], ["sparse"]]),
    ("DSSs", True, [["dense"], ["dense with masses"], ["masses", "sparse"], ["sparse"]]),
]


@pytest.mark.parametrize("kinds, one_pass, did", SEQUENCES, ids=lambda x: str(x)[:5])
def test_each_step_does_its_kind_of_work(make_run, kinds, one_pass, did):
    run = make_run(kinds, Backend(one_pass))
    assert [attend(run, step, tensors(step))[1] for step in range(len(kinds))] == did


def test_the_first_search_answers_with_its_own_dense_output(make_run):
    run, qkv = make_run("Ss"), tensors()
    out, _ = attend(run, 0, qkv)
    assert_within("out", out, dense(*qkv), 1e-5)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("head_adaptive", [False, True], ids=["uniform", "head-adaptive"])
def test_a_sparse_step_attends_what_the_search_chose(make_run, head_adaptive, biased, block_size):
    run = make_run("Ss", head_adaptive=head_adaptive, block_size=block_size)
    blocks = {"block_q": run.state.config.block_q, "block_k": run.state.config.block_k}
    bias = None
    if biased:
        bias = torch.zeros(1, L)
        bias[:, 150:400] = -1e30
    first, later = tensors(0), tensors(1)
    attend(run, 0, first, key_bias=bias)
    out, _ = attend(run, 1, later, key_bias=bias)
    keep = assert_best_choice(run, *first[:2], bias)
    exact, _ = reference.sparse_attention(
        *(x.double() for x in later), keep, **blocks, scale=SCALE, key_bias=bias
    )
    assert_within("out", out, exact, 1e-5)


def test_keeping_everything_equals_dense_at_every_step(make_run):
    run = make_run("SsSs", sparsity=0.0)
    for step in range(4):
        qkv = tensors(step)
        assert_within("out", attend(run, step, qkv)[0], dense(*qkv), 1e-5)


def test_a_conditioning_that_first_appears_late_searches_then(make_run):
    run = make_run("Ssss")
    attend(run, 0)
    assert attend(run, 2, key="late", role="negative")[1] == ["dense", "masses"]
    assert attend(run, 2)[1] == ["sparse"]
    assert attend(run, 3, key="late", role="negative")[1] == ["sparse"]


def test_a_second_call_of_the_same_search_step_runs_sparse(make_run):
    """As heun and cond/uncond windows do."""
    run = make_run("SsSs")
    assert attend(run, 0)[1] == ["dense", "masses"]
    assert attend(run, 0)[1] == ["sparse"]
    assert attend(run, 2)[1] == ["masses", "sparse"]
    assert attend(run, 2)[1] == ["sparse"]


def test_a_later_search_finds_the_new_pattern_with_the_old_lse(make_run):
    run, first, later = make_run("SSs"), tensors(0), tensors(1)
    attend(run, 0, first)
    old = state_of(run).mask.to_dense()
    attend(run, 1, later)
    mask = state_of(run).mask.to_dense()
    assert not torch.equal(mask, old)
    masses = exact_masses(*later[:2])
    _, held = select(masses, LAYOUT, run.state.config)
    assert (held - recall(masses, mask) < 0.02).all()


@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
def test_the_lse_lives_exactly_as_long_as_a_search_needs_it(make_run, one_pass):
    run = make_run("DSsSs", Backend(one_pass))
    if one_pass:
        attend(run, 0)
        assert state_of(run).lse is not None and state_of(run).mask is None
    has_lse = []
    for step in range(1, 5):
        attend(run, step)
        has_lse.append(state_of(run).lse is not None)
    assert has_lse == [True, True, False, False]
    run = make_run("Sss")
    attend(run, 0)
    assert state_of(run).lse is None, "no later search needs it"


def test_only_a_backend_that_searches_in_one_pass_wants_an_lse_before(make_run):
    q, k, v = tensors()
    for one_pass in (False, True):
        run = make_run("DDSs", Backend(one_pass)).state
        assert [run.wants_lse(step, q, k, v) for step in range(4)] == [
            False, one_pass, False, False,
        ]  # fmt: skip


def test_a_replaced_mask_takes_its_prefetched_copy_along(make_run):
    run, forgotten = make_run("SSs"), []
    run.state.cache.forget = forgotten.append
    attend(run, 0)
    assert forgotten == []
    old = state_of(run).mask.bits
    attend(run, 1)
    assert len(forgotten) == 1 and forgotten[0] is old


def test_layers_and_conditionings_do_not_share_masks(make_run):
    run = make_run("Ss")
    for key, seed in (("a", 0), ("b", 1)):
        attend(run, 0, tensors(seed), key=key)
    for key, seed in (("a", 0), ("b", 1)):
        assert_best_choice(run, *tensors(seed)[:2], key=key)


# ---- low precision


def coarse(v):
    return (v * 4).round() / 4


@pytest.fixture
def make_fastest(monkeypatch):
    """make_fastest(run, name): that candidate is the fastest of the run's dense attentions."""

    def make(run, fastest):
        choice = run.state.dense_choice

        def measure(q, k, v, candidates):
            return {name: 1.0 if name == fastest else 2.0 + (name == "host") for name in candidates}

        monkeypatch.setattr(choice, "_measure", measure)
        monkeypatch.setattr(choice, "_candidates", partial(without_cudnn, choice))

    return make


def without_cudnn(choice, backend, scale, precision=None):
    found = DenseChoice._candidates(backend, scale, precision)
    return {name: run for name, run in found.items() if name != "cudnn"}


@pytest.mark.parametrize("block_size", ["64", "128x64"])
def test_sparse_steps_and_later_searches_run_in_the_precision_asked_for(
    make_run, make_fastest, block_size
):
    run = make_run("DSsSs", Backend(one_pass=True), precision="int8", block_size=block_size)
    make_fastest(run, "own")
    did = [attend(run, step, tensors(step))[1] for step in range(5)]
    # the first search stays exact
    assert did == [["dense"], ["dense with masses"], ["int8"], ["int8 masses", "int8"], ["int8"]]
    config = run.state.config
    assert run.backend.asked == (config.block_q, config.block_k, "int8")
    q, k, v = tensors(4)
    out, _ = attend(run, 4, (q, k, v))
    keep = state_of(run).mask.to_dense()
    inputs = [x.double() for x in (q, k, coarse(v))]
    exact, _ = reference.sparse_attention(*inputs, keep, **config.blocks, scale=SCALE)
    assert_within("out", out, exact, 1e-5)
    statistics = run.state.statistics
    assert statistics.low_precision_calls == 4 and not statistics.not_low_precision
    text = "\n".join(statistics.lines())
    assert "Precision: 4 calls in int8\nLater searches in int8: 1 calls" in text
    assert statistics.as_dict()["low_precision_searches"] == 1


def test_precision_does_not_change_what_the_first_search_selects(make_run):
    masks = []
    for precision in ("bf16", "int8", "fp8"):
        run = make_run("DSs", precision=precision)
        for step in range(3):
            attend(run, step, tensors(step))
        masks.append(state_of(run).mask.bits)
    assert all(torch.equal(masks[0], mask) for mask in masks[1:])


def test_a_later_search_stays_exact_where_low_precision_is_not_to_be_had(make_run):
    run = make_run("SsSs", precision="fp8")
    run.backend.refuses = "needs compute capability 8.9 for fp8, got 8.0"
    did = [attend(run, step, tensors(step))[1] for step in range(4)]
    assert did[2] == ["masses", "sparse"] and run.state.statistics.low_precision_searches == 0
    assert not any("Later searches" in line for line in run.state.statistics.lines())


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_nobody_runs_in_low_precision_unasked(make_run, precision):
    run = make_run("Ss", precision=precision)
    assert [attend(run, step)[1] for step in range(2)] == [["dense", "masses"], ["sparse"]]
    assert not any("recision" in line for line in run.state.statistics.lines())


def test_a_declined_call_runs_as_usual_and_is_counted_with_the_reason(make_run):
    run = make_run("Sss", precision="fp8")
    run.backend.refuses = "needs compute capability 8.9 for fp8, got 8.0"
    assert [attend(run, step)[1] for step in range(3)] == [
        ["dense", "masses"], ["sparse"], ["sparse"],
    ]  # fmt: skip
    assert run.state.statistics.not_low_precision == {run.backend.refuses: 2}
    text = "\n".join(run.state.statistics.lines())
    assert "Precision: 0 calls in fp8\nNot in fp8: 2 calls, needs compute capability" in text


def test_a_call_that_the_host_wants_exact_stays_exact(make_run):
    run = make_run("Ss", precision="int8")
    attend(run, 0)
    assert attend(run, 1, low_precision=False)[1] == ["sparse"]
    assert run.state.statistics.not_low_precision == {NOT_ALLOWED: 1}


def test_out_of_memory_while_quantising_runs_as_usual(make_run):
    run, qkv = make_run("Ss", precision="int8"), tensors()
    attend(run, 0, qkv)
    run.backend.fails["int8"] = torch.OutOfMemoryError("CUDA out of memory")
    out, did = attend(run, 1, qkv)
    assert did == ["int8", "sparse"]
    keep = state_of(run).mask.to_dense()
    exact, _ = reference.sparse_attention(*(x.double() for x in qkv), keep, **BLOCKS)
    assert_within("out", out, exact, 1e-5)
    assert sum(run.state.statistics.not_low_precision.values()) == 1


def test_plain_torch_says_why_it_computes_as_it_does(make_run):
    run = make_run("Ss", eager, precision="int8")
    call = Call("layer 0", 0, "positive", 0, LAYOUT, SCALE, run.host)
    for step in range(2):
        run.state.attend(replace(call, step=step), *tensors())
    assert run.state.statistics.not_low_precision == {"plain torch computes in float32": 1}


DENSE_PRECISIONS = [
    # fastest, config, what served, calls in low precision
    ("own int8", {"precision": "int8"}, "int8", 1),
    ("own", {"precision": "int8"}, "dense", 0),
    ("host", {"precision": "int8"}, "host", 0),
    ("own int8", {"precision": "int8", "dense_attention": "host"}, "host", 0),
    ("own int8", {}, "dense", 0),
]


@pytest.mark.parametrize("fastest, config, served, calls", DENSE_PRECISIONS)
def test_a_dense_step_runs_in_low_precision_where_that_is_fastest(
    make_run, make_fastest, fastest, config, served, calls
):
    run, qkv = make_run("DDS", **config), tensors()
    make_fastest(run, fastest)
    out = run.state.dense_steps.serve(*qkv, scale=SCALE, host=run.host)
    statistics = run.state.statistics
    assert statistics.low_precision_calls == calls
    assert run.backend.did == ([] if served == "host" else [served])
    if served == "int8":
        q, k, v = qkv
        assert_within("out", out, dense(q, k, coarse(v)), 1e-5)
        assert statistics.dense_choice == "own int8, not exact"
    elif served == "host":
        assert out is None and statistics.dense_choice == "host"


@pytest.mark.parametrize("fastest, config, served, calls", DENSE_PRECISIONS)
def test_the_dense_step_before_a_search_does_too(
    make_run, make_fastest, fastest, config, served, calls
):
    run, qkv = make_run("DS", Backend(one_pass=True), **config), tensors()
    make_fastest(run, fastest)
    run.state.statistics.dense_choice = "what earlier dense steps said"
    out, did = attend(run, 0, qkv)
    # the host's attention keeps no LSE
    assert did == ["int8" if served == "int8" else "dense"]
    statistics = run.state.statistics
    assert statistics.low_precision_calls == calls
    said = "own int8, not exact" if served == "int8" else "what earlier dense steps said"
    assert statistics.dense_choice == said
    q, k, v = qkv
    assert_within("out", out, dense(q, k, coarse(v) if served == "int8" else v), 1e-5)
    assert attend(run, 1, qkv)[1] == ["dense with masses"]
    # the largest mass of every row
    largest = exact_masses(q, k).argmax(-1, keepdim=True)
    assert state_of(run).mask.to_dense().gather(-1, largest).all()


def test_a_dense_step_before_a_search_that_memory_cannot_quantise_is_exact(make_run, make_fastest):
    run, qkv = make_run("DS", Backend(one_pass=True), precision="int8"), tensors()
    make_fastest(run, "own int8")
    run.backend.fails["int8"] = torch.OutOfMemoryError("CUDA out of memory")
    out, did = attend(run, 0, qkv)
    assert did == ["int8", "dense"]
    assert_within("out", out, dense(*qkv), 1e-5)
    assert sum(run.state.statistics.not_low_precision.values()) == 1


def test_a_dense_call_that_the_host_wants_exact_has_no_coarse_candidate(make_run):
    run = make_run("DDS", precision="int8")
    asked = []
    choice = run.state.dense_choice
    choice.choose = lambda *args, precision, **options: asked.append(precision) or "host"
    options = {"scale": SCALE, "host": run.host}
    run.state.dense_steps.serve(*tensors(), **options, low_precision=False)
    run.state.dense_steps.serve(*tensors(), **options)
    assert asked == [None, "int8"]
    assert run.state.statistics.not_low_precision == {NOT_ALLOWED: 1}


# ---- trouble


@pytest.mark.parametrize("place", range(3), ids="qkv")
@pytest.mark.parametrize("step", [0, 1], ids=["search", "sparse"])
def test_nan_gives_the_dense_result_and_is_reported(make_run, step, place):
    run = make_run("Sss", first=7)
    if step:
        attend(run, 0)
    broken = tensors()
    broken[place][0, 1, 100, 3] = float("nan")
    out, did = attend(run, step, broken)
    assert did[-1] == "host"
    expected = reference.dense_attention(*broken, scale=SCALE)[0]
    assert torch.equal(out.isnan(), expected.isnan())
    # the layer stays dense, another one does not
    assert attend(run, 2)[1] == ["host"]
    assert attend(run, 2, key="other")[1] == ["dense", "masses"]
    run.state.end_step()
    statistics = run.state.statistics
    assert statistics.kept_dense == {NOT_A_NUMBER: 2}
    assert statistics.warnings == [
        f"{NOT_A_NUMBER}: the layers concerned run dense from step {7 + step}"
    ]
    assert state_of(run).mask is None and state_of(run).lse is None


def test_nan_in_a_search_leaves_no_pattern(make_run):
    run = make_run("Ss")
    q, k, v = tensors()
    k[0, 0, 5, 5] = float("nan")
    attend(run, 0, (q, k, v))
    run.state.end_step()
    assert run.state.statistics.patterns == {}


@pytest.mark.parametrize("at", ["dense", "masses"])
def test_out_of_memory_in_the_first_search_keeps_sampling_dense(make_run, at):
    run, qkv = make_run("Sss"), tensors()
    run.backend.fails[at] = torch.OutOfMemoryError("CUDA out of memory")
    out, did = attend(run, 0, qkv)
    assert did[-1] == "host"
    assert_within("out", out, dense(*qkv), 1e-5)
    assert attend(run, 1)[1] == ["host"]
    assert run.state.statistics.kept_dense == {OUT_OF_MEMORY: 2}
    assert run.state.statistics.warnings == [
        f"{OUT_OF_MEMORY}: the layers concerned run dense from step 0"
    ]


def test_out_of_memory_lets_go_of_the_search_before_the_dense_pass(make_run):
    """An exception's traceback holds the frames, and with them the tensors, that ran out."""
    run, alive = make_run("Ss"), []

    def out_of_memory(q, *args, **options):
        large = torch.empty(100)
        alive.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def host(q, k, v):
        alive_now.append(alive[0]() is not None)
        return Host()(q, k, v)

    alive_now = []
    run.backend.block_masses = out_of_memory
    call = Call("layer 0", 0, "positive", 0, LAYOUT, SCALE, host)
    run.state.attend(call, *tensors())
    assert alive_now == [False]


def test_out_of_memory_in_a_later_search_keeps_the_pattern(make_run):
    run = make_run("SSs")
    attend(run, 0)
    old = state_of(run).mask
    run.backend.fails["masses"] = torch.OutOfMemoryError("CUDA out of memory")
    assert attend(run, 1, layer=3)[1] == ["masses", "sparse"]
    assert state_of(run).mask is old and state_of(run).lse is None
    assert attend(run, 1)[1] == ["sparse"], "does not try again in the same step"
    assert run.state.statistics.warnings == [f"{OUT_OF_MEMORY}: layer 3 kept its earlier pattern"]


def test_out_of_memory_in_an_int8_search_measures_as_the_model_computes(make_run):
    run = make_run("SsSs", precision="int8")
    attend(run, 0)
    run.backend.fails["int8 masses"] = torch.OutOfMemoryError("CUDA out of memory")
    assert attend(run, 2)[1] == ["int8 masses", "masses", "int8"]
    assert state_of(run).searched_at == 2
    statistics = run.state.statistics
    assert statistics.low_precision_searches == 0 and not statistics.warnings
    assert statistics.not_low_precision == {OUT_OF_MEMORY: 1}


def test_other_errors_are_not_swallowed(make_run):
    run = make_run("Ss")
    run.backend.fails["masses"] = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        attend(run, 0)


def test_without_a_backend_every_call_runs_on_the_host(make_run, monkeypatch):
    run = make_run("DSs", Backend(one_pass=True))
    monkeypatch.setattr(run_state.attention, "choose", lambda *args: (None, "no backend"))
    assert not run.state.wants_lse(0, *tensors())
    assert [attend(run, step)[1] for step in range(3)] == 3 * [["host"]]
    assert run.state.statistics.kept_dense == {"no backend": 3}


def test_free_drops_every_tensor(make_run):
    run = make_run("DSsSs", Backend(one_pass=True))
    for step in range(3):
        for key in ("a", "b"):
            attend(run, step, key=key)
    states = [state_of(run, key) for key in ("a", "b")]
    found = [weakref.ref(x) for s in states for x in (s.lse, s.mask.bits)]
    found += [weakref.ref(pending[1]) for pending in run.state.findings._pending]
    assert len(found) > 4 and all(ref() is not None for ref in found)
    del states
    run.state.free()
    gc.collect()
    assert [ref() for ref in found] == len(found) * [None]


# ---- what a run tells


def test_patterns_hold_the_true_density_and_recall(make_run):
    run = make_run("DDSs", Backend(one_pass=True), first=3)
    qkv = tensors(batch=2)
    attend(run, 2, qkv, layer=4)
    run.state.end_step()
    ((key, pattern),) = run.state.statistics.patterns.items()
    assert key == (4, "positive") and pattern.step == 5 and pattern.exact
    keep = state_of(run).mask.to_dense()
    true = reference.recall(*(x.double() for x in qkv[:2]), keep, **BLOCKS).mean(0)
    assert pattern.recall == pytest.approx(true.tolist(), abs=1e-5)
    density = keep.double().mean((-1, -2)).mean(0)
    assert pattern.density == pytest.approx(density.tolist(), abs=1e-6)
    assert torch.equal(pattern.block_map, keep[0].to(torch.uint8) * 255)


@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
def test_recall_of_a_search_in_one_pass_is_called_an_estimate(make_run, one_pass):
    run = make_run("DSs", Backend(one_pass))
    if one_pass:
        attend(run, 0, tensors(0))
    attend(run, 1, tensors(1))
    run.state.end_step()
    assert run.state.statistics.exact() == (not one_pass)


def test_recall_of_a_later_search_is_called_an_estimate(make_run):
    run = make_run("SSs")
    attend(run, 0)
    attend(run, 1)
    run.state.end_step()
    assert not run.state.statistics.patterns[0, "positive"].exact
    assert not run.state.statistics.exact()


def test_seconds_are_counted_per_kind_and_video(make_run, monkeypatch):
    run = make_run("DSsSs", Backend(one_pass=False))
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(stopwatch, "time", clock)

    def slow(name, seconds):
        function = getattr(run.backend, name)

        def slowed(*args, **options):
            clock.now += seconds
            return function(*args, **options)

        setattr(run.backend, name, slowed)

    slow("dense_attention", 8.0)
    slow("block_masses", 4.0)
    slow("sparse_attention", 2.0)
    qkv = tensors(batch=2)
    with run.state.timed("dense", qkv[0]):
        clock.now += 8.0
    for step in range(1, 5):
        attend(run, step, qkv)
    timing = run.state.statistics.timing
    assert timing.dense == [4.0, 4.0] and timing.search == [6.0, 6.0]
    assert timing.search_dense == [4.0, 4.0] and timing.search_again == [2.0, 2.0]
    assert timing.sparse == 6 * [1.0]
    # dense, 8 rows of 4 s after the first step; they took 12 s of search, 4 s of search again, 6 s
    assert timing.saved() == pytest.approx(32 - 12 - 4 - 6)


def test_held_memory_is_the_sum_of_masks_and_lse(make_run):
    run = make_run("SsSs")
    for key in ("a", "b"):
        attend(run, 0, key=key)
    one = state_of(run, "a").mask.bits.nbytes + state_of(run, "a").lse.nbytes
    assert run.state.statistics.held_bytes == 2 * one
    run.state.free()
    assert run.state.statistics.held_bytes == 2 * one, "the fullest moment, not the last"


@pytest.mark.parametrize("config", [{}, {"block_size": "128x64"}, {"recall": 0.8}], ids=str)
@pytest.mark.parametrize("kinds", ["Sss", "DSs", "SsSs", "DSSs", "DDD"])
@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
def test_memory_is_predicted_to_the_byte(make_run, kinds, one_pass, config):
    run = make_run(kinds, Backend(one_pass), **config)
    q, k, v = tensors(batch=2)
    run.state.foresee(q, k, v, layers=3, batch=2, layout=LAYOUT)
    for step in range(len(kinds)):
        for layer in range(3):
            if kinds[step] != "D" or run.state.wants_lse(step, q, k, v):
                attend(run, step, (q, k, v), key=layer, layer=layer)
    statistics = run.state.statistics
    assert statistics.held_bytes == statistics.predicted_bytes
    assert (statistics.held_bytes > 0) == ("S" in kinds)
    assert statistics.tokens == L and statistics.layout == LAYOUT.describe()


PLACES = [
    # cache, free bytes, where the cache lives
    ("auto", None, "cpu"),  # no GPU at all
    ("auto", 10**12, "gpu"),
    ("auto", 10**3, "cpu"),  # short of memory
    ("gpu", 10**3, "gpu"),
    ("cpu", 10**12, "cpu"),
]


@pytest.mark.parametrize("cache, free_bytes, place", PLACES)
def test_where_the_cache_lives(make_run, cache, free_bytes, place):
    run = make_run("Ss", cache=cache).state
    run.cache = Cache(cache, free_bytes)
    run.foresee(*tensors(), layers=60, batch=1, layout=LAYOUT)
    assert run.statistics.cache_place == place
    if free_bytes is not None:
        assert run.cache.place == place


def test_the_fastest_exact_attention_serves_a_dense_step(make_run):
    run = make_run("DDS")
    qkv = tensors()
    choice = run.state.dense_choice
    choice.choose = lambda *args, **options: "own"
    out = run.state.dense_steps.serve(*qkv, scale=SCALE, host=run.host)
    assert_within("out", out, dense(*qkv), 1e-5)
    assert len(run.state.statistics.timing.dense) == 1
    choice.choose = lambda *args, **options: "host"
    assert run.state.dense_steps.serve(*qkv, scale=SCALE, host=run.host) is None
    assert run.host.calls == 0, "the caller runs the host itself"
    assert run.state.statistics.dense_choice == "host"


def test_a_new_step_is_noticed_once(make_run, monkeypatch):
    run = make_run("DSs").state
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(run_state, "time", clock)
    entered = []
    for step in (0, 0, 1, 1, 2):
        entered.append(run.enter_step(step))
        clock.now += 1.0
    run.end()
    assert entered == [True, False, True, False, True]
    assert run.statistics.steps == [
        (StepKind.DENSE, 2.0), (StepKind.SEARCH, 2.0), (StepKind.SPARSE, 1.0),
    ]  # fmt: skip
    assert run.statistics.finished


def test_the_summary_of_a_whole_run(make_run):
    run = make_run("DSsSs", sparsity=0.7)
    q, k, v = tensors()
    run.state.foresee(q, k, v, layers=1, batch=1, layout=LAYOUT)
    with run.state.timed("dense", q):
        run.host(q, k, v)
    for step in range(1, 5):
        run.state.enter_step(step)
        attend(run, step)
    run.state.end()
    statistics = run.state.statistics
    statistics.timing.dense = [9.0]
    statistics.timing.search, statistics.timing.search_again = [12.0], [4.0]
    statistics.timing.sparse = [2.0] * 3
    mean, worst = statistics.recall()
    assert 0.5 < worst <= mean <= 1
    # ten blocks: the first is a sink, the others keep three of ten each
    assert statistics.summary() == (
        "640 tokens, steps 0 dense, 1 search, 2 sparse, 3 search, 4 sparse, density 0.37, "
        f"recall {mean:.2f} (estimated), worst head {worst:.2f}, saved 14 s of attention"
    ).replace("14 s", "14.0 s")


def test_an_interrupted_run_frees_without_reading_the_device(make_run):
    run = make_run("Sss")
    attend(run, 0)
    run.state.free()
    run.state.end_step()
    assert run.state.statistics.patterns == {} and not run.state.statistics.finished


@pytest.mark.parametrize("read", [False, True], ids=["before a pattern", "after one"])
def test_an_interrupted_run_says_where_it_was_stopped(make_run, read):
    run = make_run("Sss", first=7)
    for step in range(3 if read else 1):
        run.state.enter_step(step)
        attend(run, step)
    run.state.stop()
    statistics = run.state.statistics
    assert statistics.stopped_at == (9 if read else 7) and not statistics.finished
    (first, *_) = statistics.lines()
    if read:
        assert first.startswith("AdaSpa: stopped at step 9 of 10; until then ")
        assert "density 0." in first
    else:
        assert first == "AdaSpa: stopped at step 7 of 10, before the first pattern"
    assert statistics.as_dict()["stopped_at"] == statistics.stopped_at


# ---- a recall asked for


@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
def test_every_search_for_a_recall_measures_exactly(make_run, one_pass):
    run = make_run("DSsSs", Backend(one_pass), recall=0.8)
    assert not run.state.wants_lse(0, *tensors())
    did = [attend(run, step, tensors(step))[1] for step in range(1, 5)]
    assert did == [["dense", "masses"], ["sparse"], ["dense", "masses"], ["sparse"]]
    run.state.end_step()
    statistics = run.state.statistics
    (pattern,) = statistics.patterns.values()
    assert pattern.exact and pattern.step == 3
    q, k, _ = tensors(3)
    keep = state_of(run).mask.to_dense()
    exact = reference.recall(q.double(), k.double(), keep, **BLOCKS)[0]
    assert (exact >= 0.8 - 2 * mass_rounding(q, k, SCALE)).all()
    assert pattern.recall == pytest.approx(exact.tolist(), abs=1e-5)
    assert statistics.held_bytes == state_of(run).mask.bits.nbytes, "no LSE waits for a search"


def test_what_the_mask_still_holds_is_sampled_before_the_next_search(make_run):
    run = make_run("SssSss", first=4, recall=0.8)
    for step in range(6):
        attend(run, step, tensors(step))
        if step == 2:
            attend(run, step, tensors(step))
            run.state.end_step()
            first = dict(run.state.statistics.samples)
    run.state.end_step()
    statistics = run.state.statistics
    assert statistics.timing.sample and len(statistics.timing.sample) == 2
    ((key, (step, held)),) = first.items()
    assert (key, step) == ((0, "positive"), 6)
    (step, held) = statistics.samples[key]
    assert step == 9
    q, k, _ = tensors(5)
    keep = state_of(run).mask.to_dense()
    exact = reference.recall(q.double(), k.double(), keep, **BLOCKS)[0]
    # 64 of 640 rows
    assert held == pytest.approx(exact.tolist(), abs=0.05)
    (line,) = [line for line in statistics.lines() if line.startswith("Recall asked for")]
    found = statistics.patterns[key].recall
    assert line == (
        f"Recall asked for: 0.8; the searches found {min(found):.3f} to {max(found):.3f} by head; "
        f"in step 9 {sum(held) / 2:.2f} is left, worst head {min(held):.2f} (sampled)"
    )


def test_out_of_memory_while_sampling_costs_the_sample_alone(make_run, monkeypatch):
    def out_of_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run_state, "sampled_recall", out_of_memory)
    run = make_run("Ss", recall=0.8)
    attend(run, 0)
    assert attend(run, 1, layer=5)[1] == ["sparse"]
    run.state.end_step()
    statistics = run.state.statistics
    assert statistics.samples == {}
    assert statistics.warnings == ["out of memory while sampling the recall of layer 5"]


def test_nothing_is_sampled_unasked(make_run):
    run = make_run("Sss")
    for step in range(3):
        attend(run, step)
    run.state.end_step()
    statistics = run.state.statistics
    assert statistics.samples == {} and statistics.timing.sample == []
    assert not any(line.startswith("Recall asked for") for line in statistics.lines())


def test_out_of_memory_in_a_later_exact_search_keeps_the_pattern(make_run):
    run = make_run("SSs", recall=0.8)
    attend(run, 0)
    old = state_of(run).mask
    run.backend.fails["masses"] = torch.OutOfMemoryError("CUDA out of memory")
    assert attend(run, 1, layer=3)[1] == ["dense", "masses", "sparse"]
    assert state_of(run).mask is old
    assert attend(run, 1)[1] == ["sparse"], "does not try again in the same step"
    assert run.state.statistics.warnings == [f"{OUT_OF_MEMORY}: layer 3 kept its earlier pattern"]
