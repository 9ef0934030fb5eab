"""AdaSpa on the workers of Raylight, which run one video on several GPUs.

Raylight's workers are processes of their own, each with a model and a sampler. A function is sent to
them by value; it loads this pack from its folder there. What a worker's run was comes back as bytes,
and the parts of all workers are joined into one run for the report.
"""

import io
import json
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comfy.patcher_extension
import torch

from ..config import AdaSpaConfig
from ..run.dense import DenseChoice
from ..run.handle import RunHandle
from ..run.statistics import Pattern, Patterns, RunStatistics
from . import pattern_requests, status
from .install import install, tell_the_end
from .ulysses import sequence_parallel

ROOT = Path(__file__).resolve().parents[2]
# under this name a worker imports the pack
WORKER_PACKAGE = "adaspa_on_worker"
# names the wrapper of the diffusion model on a worker
RANKS = "adaspa_ranks"


# ---- on the node's side


def install_on(workers: list, config: AdaSpaConfig, node_id: str | None = None) -> "RankedHandle":
    """Patch the model of every worker (actors of Ray), and return the handle of their runs.

    Args:
        node_id: the node that shows the progress of the first worker, or None.
    """
    import ray
    from ray.util.queue import Queue

    read, lines = reader(), Queue(actor_options={"num_cpus": 0})
    patches = [sender(config, node_id, lines.actor), *[sender(config)] * (len(workers) - 1)]
    try:
        ray.get([w.model_function_runner.remote(p) for w, p in zip(workers, patches, strict=True)])
    except BaseException:
        _close(lines)
        raise
    handle = RankedHandle(
        config,
        lambda: ray.get([w.model_function_runner_get_values.remote(read) for w in workers]),
    )
    # the queue's end ends the thread
    weakref.finalize(handle, _close, lines).atexit = False
    passing = threading.Thread(target=_pass_on, args=(lines, weakref.ref(handle)), daemon=True)
    passing.start()
    return handle


def _pass_on(lines, handle: "weakref.ref[RankedHandle]") -> None:
    """Show the first worker's messages on its node until the queue is closed; the last for all."""
    while True:
        try:
            text, data = json.loads(lines.get())
        except Exception:
            # closed, or Ray has ended
            return
        _show(text, data, handle)


def _show(text: str, data: dict, handle: "weakref.ref[RankedHandle]") -> None:
    try:
        whole = handle() if data.get("done") else None
        if whole is not None and whole.tell_the_end(data["node"], data["step"]):
            return
    except Exception:
        status.log.warning("AdaSpa: the workers' runs could not be joined", exc_info=True)
    status.deliver(text, data)


def _close(lines) -> None:
    try:
        lines.shutdown(force=True)
    except Exception:
        status.log.debug("AdaSpa: Ray has ended before its node", exc_info=True)


def sender(config: AdaSpaConfig, node_id: str | None = None, lines=None) -> Callable:
    """Return what a worker calls with its ModelPatcher to get it patched.

    It is sent by value, so nothing in it may refer to this module.

    Args:
        node_id: the node that shows this worker's progress, or None.
        lines: the actor of a `ray.util.queue.Queue` that takes its messages.
    """
    root, package, settings = str(ROOT), WORKER_PACKAGE, dict(vars(config))

    def patch(model):
        import importlib.util
        import sys
        from pathlib import Path

        if package not in sys.modules:
            spec = importlib.util.spec_from_file_location(package, Path(root) / "__init__.py")
            assert spec and spec.loader
            sys.modules[package] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[package])
        name = package + ".sparse_attn.host.raylight"
        return importlib.import_module(name).patched(model, settings, node_id, lines)

    return patch


def reader() -> Callable:
    """Return what a worker calls with its ModelPatcher to hand its runs back."""
    package = WORKER_PACKAGE

    def read(model):
        import sys

        there = sys.modules.get(package + ".sparse_attn.host.raylight")
        return None if there is None else there.packed(model)

    return read


class RankedHandle(RunHandle):
    """The ADASPA socket of several workers.

    Args:
        fetch: fetch() -> what `packed` gave on each worker, by rank.
    """

    def __init__(self, config: AdaSpaConfig, fetch: Callable[[], list[bytes | None]]):
        self._fetch = fetch
        super().__init__(config)

    @property
    def runs(self):
        ranks = [unpacked(data) for data in self._fetch() if data is not None]
        # a rank that was replaced knows fewer runs
        return [joined(list(runs)) for runs in zip(*ranks, strict=False)] if ranks else []

    @runs.setter
    def runs(self, runs):  # pyright: ignore[reportIncompatibleVariableOverride]
        """Nothing is kept here."""

    def serves(self, socket: RunHandle) -> bool:
        return self is socket

    def tell_the_end(self, node_id: str, step: int) -> bool:
        """Show how the latest run of all workers went, if they know one."""
        run = self.latest()
        if run is not None:
            tell_the_end(node_id, run, step)
            self.note(self.metadata)
        return run is not None


class _Unpickler(pickle.Unpickler):
    """Reads classes that a worker knows under the name of its own copy of the pack."""

    def find_class(self, module: str, name: str):
        here = __name__.removesuffix("sparse_attn.host.raylight")
        if module.startswith(WORKER_PACKAGE + "."):
            module = here + module.removeprefix(WORKER_PACKAGE + ".")
        return super().find_class(module, name)


def unpacked(data: bytes) -> list[RunStatistics]:
    """The runs that `packed` packed."""
    return _Unpickler(io.BytesIO(data)).load()


# ---- on a worker


def patched(model, settings: dict, node_id: str | None = None, lines=None):
    """Return a clone of a worker's ModelPatcher that samples with AdaSpa.

    Args:
        settings: the fields of an `AdaSpaConfig`. node_id, lines: as in `sender`.
    """
    config = AdaSpaConfig(**settings)
    if config.verdict == "auto":
        # each would find out for itself, and they must agree
        config = replace(config, verdict="sparse")
    status.relay(node_id, lines and lines.put_nowait.remote)
    model, handle = install(model, config, node_id)
    handle.dense_choice = DenseChoice(config.dense_attention, measures=False)
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    model.remove_wrappers_with_key(kind, RANKS)
    if config.enabled:
        model.add_wrapper_with_key(kind, RANKS, sequence_parallel)
    return model


def packed(model) -> bytes | None:
    """The runs of a worker's model, or None where AdaSpa is not on it."""
    handle = model.get_attachment(pattern_requests.HANDLE)
    return None if handle is None else pickle.dumps(list(handle.runs))


# ---- joining


def joined(ranks: list[RunStatistics]) -> RunStatistics:
    """One run of several ranks: heads in the order of the ranks, times of the slowest."""
    first = ranks[0]
    if len(ranks) == 1:
        return first
    slowest = max(ranks, key=lambda run: run.timing.spent())
    return replace(
        first,
        backend=first.backend and f"{first.backend}, on {len(ranks)} GPUs",
        timing=slowest.timing,
        steps=[
            (kind, max(run.steps[i][1] for run in ranks if i < len(run.steps)))
            for i, (kind, _) in enumerate(first.steps)
        ],
        patterns=_joined_patterns([run.patterns for run in ranks]),
        memory=replace(first.memory, held_bytes=max(run.memory.held_bytes for run in ranks)),
        kept_dense=_joined_counts([run.kept_dense for run in ranks]),
        beside=_joined_counts([run.beside for run in ranks]),
        unseen=_joined_counts([run.unseen for run in ranks]),
        warnings=_joined_warnings([run.warnings for run in ranks]),
    )


def _joined_patterns(ranks: list[Patterns]) -> Patterns:
    """Heads of all ranks; a rank that kept a layer dense has all its blocks and all the weight."""
    whole = Patterns()
    for key in dict.fromkeys(key for patterns in ranks for key in patterns):
        found = [patterns.get(key) for patterns in ranks]
        one = next(pattern for pattern in found if pattern is not None)
        parts = [pattern or _dense_like(one) for pattern in found]
        similar = [pattern.similar for pattern in parts]
        whole[key] = replace(
            one,
            exact=all(pattern.exact for pattern in parts),
            density=[x for pattern in parts for x in pattern.density],
            recall=[x for pattern in parts for x in pattern.recall],
            block_map=torch.cat([pattern.block_map for pattern in parts]),
            similar=None if None in similar else [x for some in similar for x in some or ()],
        )
    for key in dict.fromkeys(key for patterns in ranks for key in patterns.samples):
        samples = [patterns.samples[key] for patterns in ranks if key in patterns.samples]
        whole.samples[key] = samples[0][0], [x for _, recall in samples for x in recall]
    return whole


def _dense_like(pattern: Pattern) -> Pattern:
    heads = len(pattern.density)
    return replace(
        pattern,
        exact=True,
        density=[1.0] * heads,
        recall=[1.0] * heads,
        block_map=torch.full_like(pattern.block_map, 255),
        similar=None if pattern.similar is None else [0.0] * heads,
    )


def _joined_counts(ranks: list[Counter[str]]) -> Counter[str]:
    """Reasons that all ranks have as often stand once; others say which rank."""
    whole: Counter[str] = Counter()
    for reason in dict.fromkeys(reason for counts in ranks for reason in counts):
        counts = [rank[reason] for rank in ranks]
        if len(set(counts)) == 1:
            whole[reason] = counts[0]
        else:
            whole.update({f"GPU {i}: {reason}": n for i, n in enumerate(counts) if n})
    return whole


def _joined_warnings(ranks: list[list[str]]) -> list[str]:
    shared = [warning for warning in ranks[0] if all(warning in other for other in ranks)]
    own = [
        f"GPU {i}: {warning}"
        for i, warnings in enumerate(ranks)
        for warning in warnings
        if warning not in shared
    ]
    return shared + own
