"""Kernels compile in the background, from the moment a node executes.

A few processes of low priority rehearse the run and leave its binaries in Triton's cache. A launch
whose binary one of them is at waits for it; one that none has begun compiles by itself, and none begins
it any more. A thread follows them, rehearses the run too, and so loads what they have compiled. Nothing of
this can fail a run: without it each launch compiles what it needs.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import comfy.model_management
import folder_paths
import torch

from ..backends import choice, tiles, tuned
from ..config import AdaSpaConfig
from ..run.rehearsal import rehearse
from ..sentences import Sentence
from . import status
from .families import family_of
from .guard import go_on_without_us

WORKER = Path(__file__).with_name("compile_worker.py")
MOST_WORKERS = 4
# of the computer's memory: what a process takes, and what is left to others
WORKER_BYTES, SPARE_BYTES = 1 << 30, 4 << 30
# of a first kernel, after which the others begin too, where some of ours are in the cache already: what is
# there needs no help
HELP_AFTER = 0.5
# a launch that has waited so long compiles by itself
LONGEST_WAIT = 120.0
CLAIMED, DONE = "claimed", "done"
# settings that decide which kernels a run launches
DECIDE = (
    "block_size", "head_adaptive", "precision", "query_stride", "recall", "tail", "token_order"
)  # fmt: skip


class Nothing(Exception):
    """Nobody compiles what the thread that loads would need next."""


class Compiling:
    """What compiles in the background of this process."""

    def __init__(self):
        self._change = threading.Condition()
        # node -> what it wants, in the order in which they asked; what was begun, and what is under way
        self._wanted: dict[str, str] = {}
        self._begun: set[str] = set()
        self._current: str | None = None
        self._processes: list[subprocess.Popen] = []
        self._kernels: dict[str, str] = {}
        self._take_back: Callable = lambda: None
        self._said = False
        self._loader: threading.Thread | None = None

    def want(self, node_id: str, work: dict | None) -> None:
        """Compile `work` for a node, and no longer what it wanted before."""
        with self._change:
            self._wanted.pop(node_id, None)
            if work is not None:
                self._wanted[node_id] = json.dumps(work)
            if self._current not in self._wanted.values():
                self._end()
            self._begin_next()

    def _end(self) -> None:
        """End every process: each sees its input end. What is not finished may be wanted again."""
        self._begun.discard(self._current or "")
        for process in self._processes:
            assert process.stdin
            process.stdin.close()

    def _begin_next(self) -> None:
        waiting = [work for work in self._wanted.values() if work not in self._begun]
        if self._processes or not waiting:
            return
        self._current = waiting[0]
        self._begun.add(self._current)
        self._kernels, self._said = {}, False
        self._take_back()
        self._take_back = choice.before_launches(torch.device("cuda"), self._before_launch)
        at_once = workers() if choice.compiler().is_cold() else min(1, workers())
        self._begin(self._current, at_once)
        if self._processes and self._loader is None:
            self._loader = threading.Thread(target=self._load, daemon=True)
            self._loader.start()

    def _load(self) -> None:
        """Launch in this process what the others compile, as soon as they have."""
        loaded = None
        while True:
            with self._change:
                if self._current in (None, loaded):
                    self._loader = None
                    self._end_of_launches()
                    return
                loaded = self._current
            try:
                load(json.loads(loaded))
            except Nothing:
                # what is not loaded by now is at its first launch
                pass
            except Exception as error:
                go_on_without_us(error)

    def _end_of_launches(self) -> None:
        """Come before launches no longer than it is of use."""
        if not self._processes and self._loader is None:
            self._take_back()

    def _begin(self, work: str, number: int) -> None:
        for _ in range(number):
            process = begin_worker(work)
            self._processes.append(process)
            threading.Thread(target=self._serve, args=(process, work), daemon=True).start()

    def _serve(self, process: subprocess.Popen, work: str) -> None:
        """Answer a process until it ends."""
        mine = None
        try:
            for line in process.stdout or ():
                what, _, key = line.strip().partition(" ")
                if what == "claim":
                    mine = key if self._claim(process, key) else None
                    if mine is not None and len(self._kernels) == 1:
                        threading.Timer(HELP_AFTER, self._help, (work, key)).start()
                elif what == "done":
                    self._set(key, DONE)
        except (OSError, ValueError):
            # its input was closed
            pass
        finally:
            process.wait()
            with self._change:
                self._processes.remove(process)
                if mine is not None and self._kernels.get(mine) == CLAIMED:
                    # it ended in the middle, and whoever waits compiles by itself
                    del self._kernels[mine]
                self._change.notify_all()
                if not self._processes:
                    self._end_of_launches()
                    self._begin_next()

    def _claim(self, process: subprocess.Popen, key: str) -> bool:
        with self._change:
            free = key not in self._kernels
            if free:
                self._kernels[key] = CLAIMED
        assert process.stdin
        process.stdin.write("yes\n" if free else "no\n")
        process.stdin.flush()
        return free

    def _set(self, key: str, state: str) -> None:
        with self._change:
            self._kernels[key] = state
            self._change.notify_all()

    def _help(self, work: str, key: str) -> None:
        with self._change:
            if self._processes and self._kernels.get(key) == CLAIMED:
                self._begin(work, workers() - len(self._processes))

    def _before_launch(self, key: str) -> None:
        """Wait where a process compiles what a launch needs."""
        if threading.current_thread() is self._loader:
            with self._change:
                self._change.wait_for(lambda: self._kernels.get(key) == DONE or not self._processes)
                if self._kernels.get(key) != DONE:
                    raise Nothing
            return
        try:
            with self._change:
                state = self._kernels.get(key)
                if state == DONE:
                    return
                if not self._said:
                    self._said = True
                    for node in self._wanted:
                        status.say(node, Sentence("compiling"))
                if state is None:
                    self._kernels[key] = DONE
                else:
                    self._change.wait_for(lambda: self._kernels.get(key) != CLAIMED, LONGEST_WAIT)
                self._end_of_launches()
        except Exception as error:
            go_on_without_us(error)


COMPILING = Compiling()


def compile_ahead(model, config: AdaSpaConfig, node_id: str) -> None:
    """Begin to compile what a ModelPatcher will launch, as far as it is known before it samples.

    Raises nothing.
    """
    try:
        COMPILING.want(node_id, work_of(model, config))
    except Exception as error:
        go_on_without_us(error)


def load(work: dict) -> None:
    """Load the binaries that a run will launch.

    Without memory of the GPU: where ComfyUI pages weights in and out of it (DynamicVRAM), comfy-aimdo may
    move pages at every allocation, and has no lock.
    """
    config, dtype = AdaSpaConfig(**work["config"]), getattr(torch, work["dtype"])
    loading = choice.loading_kernels(tuple(work["card"]))
    with torch.no_grad(), torch.cuda.device(torch.device(work["device"])), loading as backend:
        rehearse(backend, config, work["head_dim"], dtype)


def work_of(model, config: AdaSpaConfig) -> dict | None:
    """What decides the kernels of a model's runs, or None where it will launch none."""
    device, inner = model.load_device, model.get_model_object("diffusion_model")
    family, _ = family_of(inner)
    if not config.enabled or config.verdict == "dense":
        return None
    if family is None or family.head_dim is None:
        return None
    if device.type != "cuda" or choice.why_no_triton():
        return None
    card, dtype = tiles.card_of(device), model.model.get_dtype_inference()
    head_dim = family.head_dim(inner)
    if not choice.compiler().serves(card, head_dim, dtype):
        return None
    tuned.use(Path(folder_paths.get_user_directory()) / tuned.FILE, card)
    found, _ = tiles.in_use(card)
    settings = {name: value for name, value in asdict(config).items() if name in DECIDE}
    named = str(dtype).removeprefix("torch.")
    work = {"card": card, "device": str(device), "head_dim": head_dim, "dtype": named}
    values = {name: list(vars(tile).values()) for name, tile in found.items()}
    return {**work, "config": settings, "tiles": values}


def workers() -> int:
    """How many processes this computer has room for beside ComfyUI; at most `MOST_WORKERS`."""
    if not sys.executable:
        return 0
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    return max(0, min(MOST_WORKERS, cores - 1, int((free - SPARE_BYTES) // WORKER_BYTES)))


def begin_worker(work: str) -> subprocess.Popen:
    """A process that compiles `work`. It inherits nothing but the environment, and needs no GPU."""
    # a process that sees the GPU would take memory of it
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "PYTHONUTF8": "1"}
    flags = ("BELOW_NORMAL_PRIORITY_CLASS", "CREATE_NO_WINDOW")
    process = subprocess.Popen(
        [sys.executable, str(WORKER)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, encoding="utf-8", env=environment,
        creationflags=sum(getattr(subprocess, flag, 0) for flag in flags),
    )  # fmt: skip
    assert process.stdin
    try:
        process.stdin.write(work + "\n")
        process.stdin.flush()
    except OSError:
        # it has ended already
        pass
    return process
