"""A run that stops, or that meets trouble: nothing stays behind, and the video still comes out."""

import gc
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from close import assert_within, attention_rounding

from sparse_attn.backends import choice
from sparse_attn.backends.torch import attention
from sparse_attn.backends.torch import block_masses as masses
from sparse_attn.block_mask import BlockMask
from sparse_attn.call import Call
from sparse_attn.config import AdaSpaConfig
from sparse_attn.method.selection import Selection
from sparse_attn.run.dense import HOST_SERVED
from sparse_attn.run.serving import NOT_A_NUMBER, OUT_OF_MEMORY
from sparse_attn.run.state import RunState
from sparse_attn.schedule import plan
from sparse_attn.token_layout import TokenLayout
from tests.host.host_fixtures import assert_same_video, calls, kept_dense, sample, sparse


@pytest.fixture
def watched(monkeypatch):
    """Weak references to every mask and LSE that a run remembers, and the runs themselves."""
    import sparse_attn.host.install as install

    class WatchedRun(RunState):
        def __init__(self, *args):
            super().__init__(*args)
            keep = self.cache.keep

            def noted(tensor):
                stored = keep(tensor)
                found.tensors.append(weakref.ref(stored))
                return stored

            self.cache.keep = noted
            found.runs.append(self)

    found = SimpleNamespace(runs=[], tensors=[])
    monkeypatch.setattr(install, "RunState", WatchedRun)
    return found


def assert_nothing_stays(watched, handle):
    run = watched.runs[-1]
    assert not run.layers and not run.layers.following and not run.readback._patterns
    gc.collect()
    assert len(watched.tensors) >= 4
    assert [ref for ref in watched.tensors if ref() is not None] == []


def stop_at(step, error):
    def callback(number, *args):
        if number == step:
            raise error

    return callback


@pytest.mark.parametrize("kind", ["interrupt", "error"])
def test_stopped_run_leaves_nothing_and_the_next_one_works(load, watched, kind):
    import comfy.model_management

    class Failure(RuntimeError):
        pass

    interrupt = comfy.model_management.InterruptProcessingException
    error = interrupt if kind == "interrupt" else Failure
    model, handle = sparse(load("wan_h64"), search_points=(0.5,))
    with pytest.raises(error):
        sample(model, callback=stop_at(1, error()))
    assert_nothing_stays(watched, handle)
    assert not handle.latest().finished
    # what was found before can still be reported
    said, numbers = handle.latest().lines()[:2]
    assert said == "Stopped at step 2 of 4."
    assert numbers.startswith("288 tokens, steps 1 search, 2 sparse, density")
    assert handle.latest().as_dict()["stopped_at"] == 1

    fresh, _ = sparse(load("wan_h64"), search_points=(0.5,))
    assert torch.equal(sample(model), sample(fresh))
    assert handle.latest().finished


def test_an_error_inside_an_attention_call_leaves_the_rest_to_the_host(load, watched, monkeypatch):
    from sparse_attn.host import status

    class Failure(RuntimeError):
        pass

    def fails(*args, **kwargs):
        raise Failure("no such thing")

    model, handle = sparse(load("hunyuan"))
    # pytest keeps what is logged, and with an error the frames it came through
    monkeypatch.setattr(status.log, "disabled", True)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_attend_rows", fails)
        # the search of step 1 answers with dense attention, made otherwise
        assert_same_video(sample(model), sample(load("hunyuan")))
    assert_nothing_stays(watched, handle)
    run = handle.latest()
    reason = "an error in AdaSpa, Failure('no such thing')"
    assert run.warnings == [f"{reason}: every call runs dense from step 2"]
    # what is left of the call of the model that met it; in later ones ours is not there
    assert run.finished and reason in run.kept_dense
    assert_same_video(sample(model), sample(sparse(load("hunyuan"))[0]))


@pytest.mark.parametrize("where", ["leave_step", "as_pattern"])
def test_an_error_after_the_last_step_is_told_beside_the_verdict(load, watched, monkeypatch, where):
    from sparse_attn.host import install, status

    def fails(*args, **kwargs):
        raise RuntimeError("too late")

    told = []
    monkeypatch.setattr(status.log, "disabled", True)
    monkeypatch.setattr(install, "tell_the_end", lambda *args: told.append(args))
    model, handle = sparse(load("wan_h64"), search_points=(0.5,))
    handle.keeps_pattern = True

    def callback(step, denoised, x, total):
        if step == total - 1:
            monkeypatch.setattr(watched.runs[-1].layers, where, fails)

    video = sample(model, callback=callback)
    assert torch.equal(video, sample(sparse(load("wan_h64"), search_points=(0.5,))[0]))
    assert_nothing_stays(watched, handle)
    run = handle.latest()
    assert run.finished and len(told) == 2 and len(run.results) == 2
    assert run.warnings == ["an error in AdaSpa after the last step, RuntimeError('too late')"]


def test_finished_run_leaves_nothing(load, watched):
    model, handle = sparse(load("wan_h64"), search_points=(0.5,), cache="cpu")
    sample(model)
    assert_nothing_stays(watched, handle)
    assert handle.latest().finished
    assert calls(handle) == {"search": 4, "search_again": 4, "sparse": 12}


# ---- out of memory


def failing(function, when, error):
    """`function`, raising `error` at the calls whose number `when` accepts."""
    made = []

    def replacement(*args, **kwargs):
        made.append(None)
        if when(len(made) - 1):
            raise error
        return function(*args, **kwargs)

    return replacement


def test_out_of_memory_in_a_search_keeps_that_layer_dense(load, monkeypatch):
    # the searches come as layer 0 and 1 of one prompt, then of the other
    short = failing(masses.block_masses, lambda n: n == 1, torch.OutOfMemoryError("no room"))
    monkeypatch.setattr(masses, "block_masses", short)
    model, handle = sparse(load("wan_h64"), sparsity=0.0)
    assert_same_video(sample(model), sample(load("wan_h64")))
    assert kept_dense(handle)[OUT_OF_MEMORY] == 4
    assert len(handle.latest().timing.sparse) == 9
    assert len(handle.latest().patterns) == 3
    (warning,) = handle.latest().warnings
    assert warning.startswith(OUT_OF_MEMORY)
    assert any(OUT_OF_MEMORY in line for line in handle.latest().lines())


def test_out_of_memory_everywhere_equals_dense(load, monkeypatch):
    short = failing(masses.block_masses, lambda n: True, torch.OutOfMemoryError("no room"))
    monkeypatch.setattr(masses, "block_masses", short)
    for name, layers in (("wan_h64", 2), ("hunyuan", 3)):
        model, handle = sparse(load(name))
        assert_same_video(sample(model), sample(load(name)))
        assert kept_dense(handle)[OUT_OF_MEMORY] == layers * 2 * 4
        assert "Every call ran dense" in handle.latest().summary()


def test_out_of_memory_in_a_later_search_keeps_the_earlier_mask(load, monkeypatch):
    short = failing(masses.block_masses, lambda n: n >= 4, torch.OutOfMemoryError("no room"))
    monkeypatch.setattr(masses, "block_masses", short)
    model, handle = sparse(load("wan_h64"), search_points=(0.5,), tail="none")
    out = sample(model)
    assert len(handle.latest().timing.sparse) == 12
    assert {pattern.step for pattern in handle.latest().patterns.values()} == {0}
    assert any(OUT_OF_MEMORY in warning for warning in handle.latest().warnings)
    monkeypatch.undo()
    assert_same_video(out, sample(sparse(load("wan_h64"), tail="none")[0]))


def direct_run(config=None, steps=4):
    sigmas = [1 - i / steps for i in range(steps + 1)]
    return RunState(config or settings(), plan(sigmas, lambda s: 1 - s, config or settings()))


def settings(**fields):
    return AdaSpaConfig(**{"min_tokens": 0, "warmup": 0.0, "sparsity": 0.5, **fields})


def direct_call(step, qkv, key="layer", dense=None):
    def host(heads=None):
        return torch.nn.functional.scaled_dot_product_attention(*qkv, scale=0.125)

    layout = TokenLayout(0, 3, 8, 12)
    return Call(*qkv, 0.125, layout, step, dense or host, role="positive", key=key)


def qkv(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, 288, 64, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("where", ["masses", "selection"])
def test_memory_of_a_failed_search_is_free_before_the_dense_fallback(monkeypatch, where):
    large = []

    def short(*args, **kwargs):
        # what the failed part allocated, or the masses that it was given
        held = torch.ones(1000) if where == "masses" else args[1]
        large.append(weakref.ref(held))
        raise torch.OutOfMemoryError("no room")

    alive = []

    def dense(heads=None):
        alive.extend(ref() is not None for ref in large)
        return torch.zeros(1, 2, 288, 64)

    if where == "masses":
        monkeypatch.setattr(masses, "block_masses", short)
    else:
        monkeypatch.setattr(Selection, "add", short)
    direct_run().attend(direct_call(0, qkv(), dense=dense))
    assert alive == [False]


@pytest.mark.parametrize("tail", ["pooled", "none"])
def test_out_of_memory_in_our_own_dense_attention_gives_the_call_to_the_host(
    load, monkeypatch, tail
):
    """In plain dense steps, and in the dense step before a search, which keeps its LSE."""
    model, handle = sparse(
        load("wan_h64"), warmup=0.5, sparsity=0.0, dense_attention="auto", tail=tail
    )  # fmt: skip
    dense = []

    def attention(q, k, v, *, mask=None, **options):
        if mask is None:
            dense.append(q.shape)
            raise torch.OutOfMemoryError("no room")
        return plain.attention(q, k, v, mask=mask, **options)

    plain = choice.plain_torch()
    backend = replace(plain, attention=attention, one_pass_search=True)
    monkeypatch.setattr(choice, "choose", lambda *args: (backend, "plain torch"))
    assert_same_video(sample(model), sample(load("wan_h64")))
    assert dense and HOST_SERVED in handle.latest().warnings
    # a search has no dense pass either
    assert kept_dense(handle)[OUT_OF_MEMORY] == 8


# ---- messages


@pytest.mark.parametrize("fails", ["_server", "send_sync", "send_progress_text"])
@pytest.mark.parametrize("error", [RuntimeError, OSError, UnicodeEncodeError, AttributeError])
def test_a_message_that_cannot_be_sent_does_not_end_the_sampling(load, monkeypatch, fails, error):
    from sparse_attn.host import status
    from sparse_attn.host.install import install

    def failing(*args, **kwargs):
        failed.append(fails)
        raise error(*(("utf-8", "", 0, 1, "no") if error is UnicodeEncodeError else ("no",)))

    failed = []
    server = SimpleNamespace(
        client_id=None, send_sync=lambda *args: None, send_progress_text=lambda *args: None
    )
    if fails == "_server":
        monkeypatch.setattr(status, "_server", failing)
    else:
        setattr(server, fails, failing)
        monkeypatch.setattr(status, "_server", lambda: server)
    config = AdaSpaConfig(min_tokens=64, warmup=0.0, dense_attention="host")
    model, handle = install(load("wan_h64"), config, node_id="7")
    assert torch.isfinite(sample(model, steps=2)).all()
    # before each step, and at the end
    assert len(failed) == 3 and handle.latest().finished


# ---- NaN


@pytest.mark.parametrize("step", [0, 2], ids=["search", "sparse"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_bad_numbers_give_the_dense_result_and_are_reported(step, bad):
    run = direct_run()
    for now in range(4):
        run.enter_step(now)
        q, k, v = qkv(now)
        if now == step:
            q[0, 1, 100] = bad
        call = direct_call(now, (q, k, v))
        out = run.attend(call)
        if now >= step:
            assert torch.equal(out.isnan(), call.dense().isnan())
            torch.testing.assert_close(out, call.dense(), equal_nan=True)
    run.end()
    statistics = run.statistics
    assert statistics.kept_dense == {NOT_A_NUMBER: 4 - step}
    (warning,) = statistics.warnings
    assert warning.startswith(NOT_A_NUMBER) and warning.endswith(f" from step {step + 1}")
    # a pattern found in bad numbers is not shown
    assert bool(statistics.patterns) == (step == 2)


@pytest.mark.parametrize("step", [0, 2], ids=["search", "sparse"])
def test_nan_in_one_layer_leaves_the_other_layers_sparse(load, monkeypatch, step):
    attend = RunState.attend

    def poisoned(self, call):
        if call.layer == 1 and call.step == step and call.role == "positive":
            sound, q = call.dense(), call.q.clone()
            q[..., 100, 0] = float("nan")
            broken = direct_call(step, (q, call.k, call.v)).dense
            call = replace(call, q=q, dense=broken)
            assert torch.equal(attend(self, call).isnan(), broken().isnan())
            return sound
        return attend(self, call)

    monkeypatch.setattr(RunState, "attend", poisoned)
    model, handle = sparse(load("wan_h64"))
    assert torch.isfinite(sample(model)).all()
    assert kept_dense(handle)[NOT_A_NUMBER] == 4 - step
    # of three layers three sparse calls each, and what the fourth did before
    assert len(handle.latest().timing.sparse) == 9 + step
    assert (0, "positive") in handle.latest().patterns


# ---- threads


def test_two_devices_in_threads_do_not_disturb_each_other():
    def run_of(name, run, into, wait=lambda: None):
        for step in range(4):
            # ComfyUI begins a step when all devices have ended the one before
            wait()
            run.enter_step(step)
            q, k, v = qkv(seed=10 * name)
            for layer in range(3):
                key = (f"device {name}", layer)
                into.append(run.attend(direct_call(step, (q, k, v), key)))

    expected = {}
    for name in (1, 2):
        run_of(name, direct_run(), expected.setdefault(name, []))

    shared, found = direct_run(), {1: [], 2: []}
    wait = threading.Barrier(2, timeout=60).wait
    threads = [threading.Thread(target=run_of, args=(n, shared, found[n], wait)) for n in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shared.layers) == 6
    # a new thread may have other threads of its own for a product, so another order of sums
    for name, outs in expected.items():
        q, k, v = qkv(seed=10 * name)
        for a, b in zip(outs, found[name], strict=True):
            assert_within("out", b, a.double(), 2 * attention_rounding(q, k, v, 0.125))
        assert len(outs) == 12
    assert len(shared.statistics.timing.search) == 6
    assert len(shared.statistics.timing.sparse) == 18


def test_masks_of_the_threads_are_their_own():
    run = direct_run()
    for name in (1, 2):
        run.attend(direct_call(0, qkv(seed=10 * name), (f"device {name}", 0)))
    first, second = (layer.pattern.mask for layer in run.layers.values())
    assert isinstance(first, BlockMask)
    assert not torch.equal(first.bits, second.bits)
