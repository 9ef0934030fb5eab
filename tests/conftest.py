import os
import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# Tests multiply small matrices, and a second thread waits more than it works: 128 x 64 times
# 64 x 128 took 0.1 ms alone and 15 ms in two threads, on two cores that others wanted too
# (OpenBLAS 0.3.31). NumPy reads this as it is imported, PyTorch is told below.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

from tests.host.host_fixtures import (
    comfy_server,  # noqa: F401
    comfyui,  # noqa: F401
    imports_frozen,  # noqa: F401
    load,  # noqa: F401
    loaded_models,  # noqa: F401
    model_paths,  # noqa: F401
    pace,  # noqa: F401
)

pytest_plugins = ["tests.tools.long_tests"]

TILES = "tests.backends.test_tiles"

# must be decided before triton is imported: without a GPU every kernel runs interpreted
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)


def pytest_collection_finish(session):
    """Let the compiler work through what `test_tiles` asks of it while other tests run."""
    modules = {item.module.__name__: item.module for item in session.items}
    wanted = TILES in modules and len(modules) > 1 and find_spec("triton")
    # several processes of pytest have each collected everything, and leave no core idle
    beside = "PYTEST_XDIST_WORKER" in os.environ
    if wanted and not beside and not session.config.option.collectonly:
        modules[TILES].PROCESSES.begin(at_a_time=1)


def pytest_collection_modifyitems(items):
    # what takes longest first: where it is handed out to several processes, none waits for it
    items.sort(key=lambda item: (item.path.stem != "test_tiles", not asks_for_server(item.path)))


@cache
def asks_for_server(file: Path) -> bool:
    """Whether a function of a test file, or of the conftest beside it, takes `comfy_server`."""
    sources = [x for x in (file, file.with_name("conftest.py")) if x.is_file()]
    taken = re.compile(r"def \w+\([^)]*\bcomfy_server\b")
    return any(taken.search(x.read_text(encoding="utf-8")) for x in sources)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Hand out a file at a time, and those of the server all to one process, which starts it once."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "server" if asks_for_server(config.rootpath / file) else file

    return Scheduling(config, log)


def pytest_sessionfinish(session):
    if TILES in sys.modules:
        sys.modules[TILES].PROCESSES.end()


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run of a test."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """What is never written must be seen: floats start as NaN, integers as nonsense."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        if x.is_meta:
            return x
        if x.is_floating_point():
            return x.fill_(float("nan"))
        if x.dtype in (torch.int32, torch.int64):
            return x.fill_(2**30)
        return x

    monkeypatch.setattr(torch, "empty", poisoned)
