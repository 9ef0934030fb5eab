"""Kernels compile in processes of their own, which nothing of a run depends on."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from sparse_attn.config import PRESETS, AdaSpaConfig

pytestmark = pytest.mark.any_comfyui

ROOT = Path(__file__).resolve().parents[2]
WORK = {
    "card": [8, 9],
    "head_dim": 64,
    "dtype": "bfloat16",
    "config": {"tail": "none"},
    "tiles": {},
}
# speaks as a worker does: claims what its first line lists, and takes as long as it says
STAND_IN = """
import json, sys, time
work = json.loads(sys.stdin.readline())
for key in work["keys"]:
    print("claim", key, flush=True)
    if sys.stdin.readline() == "yes\\n":
        time.sleep(work["seconds"])
        if work.get("dies"):
            sys.exit(1)
        print("done", key, flush=True)
sys.stdin.read() if work.get("stays") else None
"""


@pytest.fixture
def compiling(comfyui, monkeypatch, tmp_path):
    """The module, whose workers are stand-ins; one, and none begins to help."""
    from sparse_attn.host import compiling

    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(compiling, "WORKER", script)
    monkeypatch.setattr(compiling, "workers", lambda: 1)
    monkeypatch.setattr(compiling, "load", lambda work: None)
    monkeypatch.setattr(compiling.choice.compiler(), "is_cold", lambda: False)
    compiling.said = []
    monkeypatch.setattr(
        compiling.status, "say", lambda node, text: compiling.said.append((node, text.code))
    )
    yield compiling
    del compiling.said


def until(holds, seconds=30.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def test_a_launch_waits_for_what_is_under_way_and_for_nothing_else(compiling):
    here = compiling.Compiling()
    here.want("7", {"keys": ["a", "b", "c"], "seconds": 0.3})
    until(lambda: here._kernels.get("a") == compiling.CLAIMED)
    here._before_launch("c")
    assert here._kernels["c"] == compiling.DONE, "this process compiles it, so no other one does"
    here._before_launch("b")
    here._before_launch("a")
    assert here._kernels["a"] == compiling.DONE
    assert compiling.said == [("7", "compiling")]
    until(lambda: not here._processes)
    assert here._kernels == dict.fromkeys("abc", compiling.DONE)


def test_a_thread_loads_what_the_processes_have_compiled_and_no_more(compiling, monkeypatch):
    here, loaded, ended = compiling.Compiling(), [], []

    def load(work):
        for key in work["keys"] + ["z"]:
            try:
                here._before_launch(key)
            except compiling.Nothing:
                ended.append(key)
                raise
            loaded.append((key, here._kernels[key]))

    monkeypatch.setattr(compiling, "load", load)
    here.want("7", {"keys": ["a", "b"], "seconds": 0.2})
    # a second one, which begins when the first has ended
    here.want("8", {"keys": ["b", "c"], "seconds": 0.2})
    until(lambda: here._loader is None and not here._processes and len(ended) == 2)
    assert loaded == [(key, compiling.DONE) for key in "abbc"] and ended == ["z", "z"]
    assert not compiling.said and "z" not in here._kernels


def test_what_is_loaded_is_a_run_that_only_this_thread_rehearses(comfyui, monkeypatch):
    from sparse_attn.host import compiling

    seen, cards, compiler = [], [], compiling.choice.compiler()

    class Kernel:
        def run(self, *args, grid, warmup, **kwargs):
            seen.append((args, warmup, threading.current_thread()))
            return SimpleNamespace(run=lambda: None)

    def rehearsed(backend, config, head_dim, dtype):
        assert (config, head_dim, dtype) == (AdaSpaConfig(tail="none"), 64, torch.bfloat16)
        here.run(1, grid=None, warmup=False)
        # the sampler's own launch, meanwhile
        other = threading.Thread(target=lambda: here.run(2, grid=None, warmup=False))
        other.start()
        other.join()

    here, other = Kernel(), Kernel()
    monkeypatch.setattr(compiler, "kernels", lambda: [here, other])
    monkeypatch.setattr(compiling, "rehearse", rehearsed)
    monkeypatch.setattr(compiling.tiles, "stand_for", cards.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    compiling.load({**WORK, "device": "cuda"})
    assert [(args, warmup) for args, warmup, _ in seen] == [((1,), True), ((2,), False)]
    assert cards == [(8, 9)] and "run" not in vars(here) | vars(other)


def test_a_card_that_a_thread_stands_for_is_that_of_no_other(monkeypatch):
    from sparse_attn.backends import tiles

    found = []

    def in_a_thread():
        tiles.stand_for((8, 9))
        found.append(tiles.card_of(torch.device("cpu")))

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert found == [(8, 9)] and tiles.card_of(torch.device("cpu")) == tiles.ANY_CARD


def test_a_worker_that_dies_keeps_no_launch_waiting(compiling):
    here = compiling.Compiling()
    here.want("7", {"keys": ["a"], "seconds": 0.3, "dies": True})
    until(lambda: "a" in here._kernels)
    start = time.monotonic()
    here._before_launch("a")
    assert time.monotonic() - start < compiling.LONGEST_WAIT / 4
    until(lambda: not here._processes)


def test_what_is_slow_gets_help_and_another_node_waits_its_turn(compiling, monkeypatch):
    monkeypatch.setattr(compiling, "workers", lambda: 3)
    monkeypatch.setattr(compiling, "HELP_AFTER", 0.05)
    here, begun, begin = compiling.Compiling(), [], compiling.begin_worker
    monkeypatch.setattr(compiling, "begin_worker", lambda work: begun.append(work) or begin(work))
    first, second = {"keys": ["a", "b"], "seconds": 0.6}, {"keys": [], "seconds": 0}
    here.want("7", first)
    here.want("8", second)
    here.want("9", first)
    until(lambda: len(begun) == 4 and not here._processes)
    assert begun == [json.dumps(first)] * 3 + [json.dumps(second)]


def test_where_nothing_is_in_the_cache_all_begin_at_once(compiling, monkeypatch):
    monkeypatch.setattr(compiling, "workers", lambda: 3)
    monkeypatch.setattr(compiling.choice.compiler(), "is_cold", lambda: True)
    here = compiling.Compiling()
    here.want("7", {"keys": ["a", "b"], "seconds": 0.2})
    assert len(here._processes) == 3
    until(lambda: not here._processes)
    assert here._kernels == dict.fromkeys("ab", compiling.DONE)


def test_a_node_that_is_switched_off_ends_what_only_it_wanted(compiling):
    here, work = compiling.Compiling(), {"keys": [], "seconds": 0, "stays": True}
    here.want("7", work)
    here.want("8", work)
    (process,) = here._processes
    here.want("7", None)
    assert process.poll() is None and here._processes
    here.want("8", None)
    until(lambda: not here._processes)
    assert process.returncode == 0
    here.want("8", work)
    assert here._processes, "it had not finished"
    here.want("8", None)


def test_without_room_for_a_worker_the_launch_says_that_it_waits(compiling, monkeypatch):
    monkeypatch.setattr(compiling, "workers", lambda: 0)
    here = compiling.Compiling()
    here.want("7", {"keys": ["a"], "seconds": 0})
    for key in "ab":
        here._before_launch(key)
    assert compiling.said == [("7", "compiling")] and not here._processes


def test_no_error_reaches_the_node(compiling, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no more processes")

    monkeypatch.setattr(compiling, "work_of", lambda *_: {"keys": []})
    monkeypatch.setattr(compiling, "begin_worker", fail)
    monkeypatch.setattr(compiling, "COMPILING", compiling.Compiling())
    compiling.compile_ahead(None, AdaSpaConfig(), "7")
    assert "the host goes on alone" in caplog.text


def test_cores_and_memory_decide_how_many_work(comfyui, monkeypatch):
    from sparse_attn.host import compiling

    free = [64 << 30]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    manager = compiling.comfy.model_management
    monkeypatch.setattr(manager, "get_free_memory", lambda device: free[0])
    assert compiling.workers() == 4
    free[0] = compiling.SPARE_BYTES + 2 * compiling.WORKER_BYTES
    assert compiling.workers() == 2
    free[0] = compiling.SPARE_BYTES
    assert compiling.workers() == 0
    free[0] = 64 << 30
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    assert compiling.workers() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1))
    assert compiling.workers() == 0


def test_the_work_is_what_decides_the_kernels(comfyui, monkeypatch, tmp_path):
    from sparse_attn.host import compiling

    tuned, folder = compiling.tuned, compiling.folder_paths
    monkeypatch.setattr(folder, "get_user_directory", lambda: str(tmp_path))

    class WanModel:
        dim, num_heads = 512, 4

    card, dtype = [(8, 9)], [torch.bfloat16]
    monkeypatch.setattr(compiling.tiles, "card_of", lambda device: card[0])
    inner = SimpleNamespace(get_dtype_inference=lambda: dtype[0])
    model = SimpleNamespace(
        load_device=torch.device("cuda"), model=inner, get_model_object=lambda _: WanModel()
    )
    work = compiling.work_of(model, AdaSpaConfig(sparsity=0.9, precision="int8"))
    assert work == compiling.work_of(model, AdaSpaConfig(sparsity=0.5, precision="int8"))
    assert (work["card"], work["head_dim"], work["dtype"]) == ((8, 9), 128, "bfloat16")
    assert work["device"] == "cuda"
    assert work["config"]["precision"] == "int8"
    # of every preset all that a search launches by
    for preset in PRESETS.values():
        found = AdaSpaConfig(**compiling.work_of(model, preset)["config"])
        assert found.search_stride == preset.search_stride and found.blocks == preset.blocks
        assert (found.pooled, found.by_similarity) == (preset.pooled, preset.by_similarity)
        assert (found.head_adaptive, found.recall) == (preset.head_adaptive, preset.recall)
    AdaSpaConfig(**work["config"])
    assert work["tiles"] == {}
    (tile, *_) = tuned.candidates()["attention 64"]
    tuned.write(tmp_path / tuned.FILE, (8, 9), {"attention 64": tile})
    # a worker compiles the tiles that the launches will have
    work = json.loads(json.dumps(compiling.work_of(model, AdaSpaConfig())))
    assert work["tiles"] == {"attention 64": [*vars(tile).values()]}
    assert compiling.tiles.attention((8, 9), 64, 128) == tile
    (tmp_path / tuned.FILE).unlink()
    assert compiling.work_of(model, AdaSpaConfig())["tiles"] == {}
    assert compiling.work_of(model, AdaSpaConfig(enabled=False)) is None
    assert compiling.work_of(model, AdaSpaConfig(verdict="dense")) is None
    for card[0] in ("gfx942", (7, 5)):
        assert compiling.work_of(model, AdaSpaConfig()) is None
    card[0], dtype[0] = (8, 9), torch.float32
    assert compiling.work_of(model, AdaSpaConfig()) is None
    model.load_device = torch.device("cpu")
    assert compiling.work_of(model, AdaSpaConfig()) is None


def test_windows_gets_a_quiet_process_of_low_priority(compiling, monkeypatch):
    """Read, not run there."""
    for flag, value in (("BELOW_NORMAL_PRIORITY_CLASS", 0x4000), ("CREATE_NO_WINDOW", 0x8000000)):
        monkeypatch.setattr(subprocess, flag, value, raising=False)
    asked = []

    def popen(command, **options):
        asked.append((command, options))
        return SimpleNamespace(stdin=open(os.devnull, "w"))

    monkeypatch.setattr(subprocess, "Popen", popen)
    compiling.begin_worker("{}")
    ((command, options),) = asked
    assert command == [sys.executable, str(compiling.WORKER)]
    assert options["creationflags"] == 0x8004000 and "preexec_fn" not in options
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == "-1"


def test_a_worker_leaves_in_the_cache_what_it_was_told_to_compile(comfyui, monkeypatch, tmp_path):
    """The script itself, started by its path: nothing is inherited from this process."""
    from sparse_attn.host import compiling

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compiling.choice.compiler().is_cold()
    process = compiling.begin_worker(json.dumps(WORK))
    timer = threading.Timer(400, process.kill)
    timer.start()
    met, wanted = [], "_unpack_mask_kernel"
    assert process.stdin and process.stdout
    for line in process.stdout:
        what, key = line.split(" ", 1)
        met.append((what, key.split()[0]))
        if what == "done":
            break
        process.stdin.write("yes\n" if key.startswith(wanted) else "no\n")
        process.stdin.flush()
    process.stdin.close()
    assert process.wait() == 0
    timer.cancel()
    assert met[0] == ("claim", "_attention_kernel") and met[-1] == ("done", wanted)
    assert [path.name for path in tmp_path.rglob("*.cubin")] == [wanted + ".cubin"]
    assert not compiling.choice.compiler().is_cold()


# begins the worker as ComfyUI does, says its number, and waits to be killed
PARENT = """
import subprocess, sys, time
pipe = subprocess.PIPE
process = subprocess.Popen([sys.executable, sys.argv[1]], stdin=pipe, stdout=pipe)
process.stdin.write(sys.argv[2].encode() + bytes([10]))
process.stdin.flush()
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_ends_with_a_comfyui_that_is_killed_and_leaves_nothing(tmp_path):
    worker = ROOT / "sparse_attn" / "host" / "compile_worker.py"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TMPDIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(worker), json.dumps(WORK)],
        env=env, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdout
    pid = int(parent.stdout.readline())
    until(lambda: list(tmp_path.glob("adaspa-*")))
    parent.kill()
    parent.communicate()
    until(lambda: has_ended(pid))
    assert not list(tmp_path.glob("adaspa-*"))


def has_ended(pid: int) -> bool:
    """Whether a process has ended, whoever is still to ask for its result."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
