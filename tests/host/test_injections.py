"""Errors at every call of ours: the video comes out, or the host's own interrupt does."""

import gc
import itertools
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparse_attn.config import MAX_RECALL, AdaSpaConfig
from sparse_attn.patterns.file import save
from sparse_attn.run.state import RunState
from tests.host.host_fixtures import assert_same_video, sample
from tests.host.host_results import write_results
from tests.host.injections import Profiler, places_of

pytestmark = pytest.mark.any_comfyui

# 3 x 8 x 8 = 192 tokens, three blocks
SMALL = (1, 16, 3, 16, 16)
STEPS = 3
USUAL, LONG = 240, 3400
# every block is kept, so the video is the dense one whatever runs dense in the end
BASE = {"min_tokens": 64, "sparsity": 0.0, "warmup": 0.25}
RUNS = {
    "pooled tail": {"search_points": (0.6,), "dense_attention": "auto"},
    "no tail": {"tail": "none", "dense_attention": "host", "cache": "cpu", "block_size": "128x64"},
    "recall": {"recall": MAX_RECALL, "tail": "none", "dense_layers": (0,)},
    "saved pattern": {"tail": "none", "warmup": 0.0},
}


def interrupt():
    import comfy.model_management

    return comfy.model_management.InterruptProcessingException()


ERRORS = {
    "out of memory": lambda: torch.OutOfMemoryError("no room"),
    "RuntimeError": lambda: RuntimeError("broken"),
    "UnicodeError": lambda: UnicodeEncodeError("utf-8", "\udce4", 0, 1, "surrogates not allowed"),
    "OSError": lambda: OSError(28, "no space left on device"),
    "KeyboardInterrupt": KeyboardInterrupt,
    "host's interrupt": interrupt,
}
INTERRUPTS = ("KeyboardInterrupt", "host's interrupt")


class Scene:
    """One configuration in ComfyUI's sampler, with a server that takes messages.

    Args:
        alive: weak references to every tensor that a run kept.
    """

    def __init__(self, load, name: str, folder: Path):
        from sparse_attn.host.install import install
        from sparse_attn.host.pattern_requests import SaveRequest, save_after_run

        config = AdaSpaConfig(**{**BASE, **RUNS[name]})
        self.model, self.handle = install(load("wan_h64"), config, node_id="7")
        if name == "saved pattern":
            numbers = itertools.count()
            request = SaveRequest(
                lambda pattern: save(pattern, folder, f"pattern {next(numbers)}"), every_run=True
            )
            self.model = save_after_run(self.model, self.handle, request)

    def sample(self) -> torch.Tensor:
        return sample(self.model, SMALL, steps=STEPS, cfg=1.0)


@pytest.fixture
def alive(monkeypatch):
    """Weak references to the runs, and to the tensors that they kept."""
    import sparse_attn.host.install as install
    from sparse_attn.host import status

    found = []

    class Watched(RunState):
        def __init__(self, *args):
            super().__init__(*args)
            found.append(weakref.ref(self))
            keep = self.cache.keep

            def noted(tensor):
                stored = keep(tensor)
                found.append(weakref.ref(stored))
                return stored

            self.cache.keep = noted

    monkeypatch.setattr(install, "RunState", Watched)
    server = SimpleNamespace(
        client_id=None, last_prompt_id="1", send_sync=lambda *args: None,
        send_progress_text=lambda *args: None,
    )  # fmt: skip
    monkeypatch.setattr(status, "_server", lambda: server)
    # pytest keeps what is logged, and with an error the frames it came through; so it does with
    # errors that nobody can catch, as those at the close of a generator
    monkeypatch.setattr(status.log, "disabled", True)
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    return found


def inject(scene, host, number, error):
    """One run with an error at one call; what came of it, and the video if there is one."""
    try:
        with Profiler(host, number, error) as profiler:
            out = scene.sample()
    except type(error) as escaped:
        return ("interrupt" if escaped is error else "escaped"), None
    except Exception as other:
        return f"escaped as {type(other).__name__}", None
    return ("video" if profiler.error is None else "not reached"), out


def inject_into(scene, alive, host, count, expected) -> Counter:
    """Inject errors into `count` runs, spread over all calls that the code makes.

    Returns:
        How often (where, error) had which outcome.
    """
    # what is set up once is no part of a run
    scene.sample()
    places, rows = places_of(scene.sample, host), Counter()
    # of each kind of call first one, then the others in turn
    first = list({place: number for number, place in reversed([*enumerate(places)])}.values())
    kinds = itertools.cycle(ERRORS)
    stride = max(1, len(first) // count) if len(first) > count else 1
    numbers = itertools.chain(sorted(first)[::stride], itertools.cycle(range(0, len(places), 7)))
    for number, kind in zip(itertools.islice(numbers, count), kinds, strict=False):
        error = ERRORS[kind]()
        alive.clear()
        outcome, out = inject(scene, host, number, error)
        del error
        if any(ref() is not None for ref in alive):
            gc.collect()
        if any(ref() is not None for ref in alive):
            outcome += ", memory held"
        if out is not None:
            assert_same_video(out, expected)
        rows[str(places[number]), kind, outcome] += 1
    # none of them has left anything behind
    assert_same_video(scene.sample(), expected)
    run = scene.handle.latest()
    assert run.finished and not run.warnings and run.timing.sparse
    return rows


def assert_harmless(rows: Counter) -> None:
    right = {kind: {"video"} for kind in ERRORS}
    for kind in INTERRUPTS:
        right[kind] |= {"interrupt"}
    wrong = {row: n for row, n in rows.items() if row[2] not in right[row[1]] | {"not reached"}}
    assert not wrong, "\n".join(f"{n} {row}" for row, n in wrong.items())


def injected(load, alive, host, folder, name, count) -> Counter:
    expected = sample(load("wan_h64"), SMALL, steps=STEPS, cfg=1.0)
    return inject_into(Scene(load, name, folder), alive, host, count, expected)


@pytest.mark.parametrize("name", RUNS)
def test_an_error_at_a_call_of_ours_costs_no_video(load, comfyui, alive, tmp_path, name):
    rows = injected(load, alive, comfyui, tmp_path, name, USUAL // len(RUNS))
    assert_harmless(rows)
    assert sum(rows.values()) == USUAL // len(RUNS)


@pytest.mark.long
def test_errors_at_every_call_of_ours_cost_no_video(load, comfyui, alive, tmp_path):
    rows = Counter()
    for name in RUNS:
        rows += injected(load, alive, comfyui, tmp_path, name, LONG // len(RUNS))
    fields = ("where", "error", "outcome")
    table = [{**dict(zip(fields, row, strict=True)), "count": n} for row, n in sorted(rows.items())]
    write_results("injections", table, injections=sum(rows.values()))
    assert_harmless(rows)
    reached = sum(n for row, n in rows.items() if row[2] != "not reached")
    assert reached >= 3000
