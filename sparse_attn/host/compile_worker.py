"""Compiles the kernels of a run, as a process of its own; see `compiling.py`. Run by its path.

The first line of standard input says of which run. Before a kernel it asks "claim KEY" and is
answered "yes" or "no"; "done KEY" follows. It ends with its input, so with the process that began it.
"""

import json
import os
import queue
import shutil
import sys
import tempfile
import threading
from importlib import import_module


def main() -> None:
    # beside this file lie modules of the pack, which nothing may take for others
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(__file__)]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path.insert(0, root)
    if hasattr(os, "nice"):
        os.nice(10)
    answers = queue.SimpleQueue()
    tempfile.tempdir = tempfile.mkdtemp(prefix="adaspa-")
    threading.Thread(target=_listen, args=(answers,), daemon=True).start()
    try:
        _compile(json.loads(answers.get()), answers)
    finally:
        _leave_nothing()


def _listen(answers: queue.SimpleQueue) -> None:
    for line in sys.stdin:
        answers.put(line.strip())
    _leave_nothing()
    # also in the middle of a compilation
    os._exit(0)


def _leave_nothing() -> None:
    shutil.rmtree(str(tempfile.tempdir), ignore_errors=True)


def _compile(work: dict, answers: queue.SimpleQueue) -> None:
    import torch

    torch.set_num_threads(1)
    config = import_module("sparse_attn.config").AdaSpaConfig(**work["config"])
    choice = import_module("sparse_attn.backends.choice")
    rehearse = import_module("sparse_attn.run.rehearsal").rehearse

    def say(*words: str) -> None:
        sys.stdout.write(" ".join(words) + "\n")
        sys.stdout.flush()

    def claim(key: str) -> bool:
        say("claim", key)
        return answers.get() == "yes"

    def done(key: str) -> None:
        say("done", key)

    card, tiles = tuple(work["card"]), choice.tiles
    tiles.use(card, {name: tiles.Tile(*tile) for name, tile in work["tiles"].items()}, "")
    backend = choice.compiling_kernels(card, claim, done)
    for bias in (False, True):
        rehearse(backend, config, work["head_dim"], getattr(torch, work["dtype"]), bias)


if __name__ == "__main__":
    main()
