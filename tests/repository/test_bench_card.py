"""The line that owners of a card paste, and who measures it."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.backends.test_tiles import ARCHS
from tests.bench import bench_card
from tests.bench.bench_tritons import faults
from tests.tools import commands

LINE = (bench_card.ROOT / "tests" / "bench" / "cards.md").read_text("utf-8")


def full_line(more: int = 0) -> dict:
    """As long a line as a card may give, and `more` characters of reasons."""
    names = ["sdpa", "cudnn", "kitchen8", "sol20", "sol10", "sage", "search", "again", "again_8"]
    names += ["step", "step_8"]
    names += [
        f"{x}{s}" for x in ("dense", "64x64@0.2", "64x64@0.1", "128x64@0.2") for s in ("", "_8")
    ]
    shape = {
        "size": [40, 40, 75_600, 128], "first_s": 123.4, "peak_mib": 12_345,
        "ms": dict.fromkeys(names, 1234.5), "error": dict.fromkeys(names, 0.0023),
    }  # fmt: skip
    return {
        "v": 1, "gpu": "NVIDIA GeForce RTX 4090 Laptop GPU", "before": ["580.159.04"] * 5,
        "versions": dict.fromkeys(bench_card.PACKAGES, "2.11.0+cu130"),
        "shapes": dict.fromkeys(bench_card.SHAPES, shape),
        "absent": {"ours": more * "x"}, "kernels": {f"kernel {i}": [0, 229_752] for i in range(40)},
    }  # fmt: skip


def test_the_longest_line_is_below_4_kb_and_keeps_every_figure():
    line = full_line()
    text = bench_card.as_line(line)
    assert len(text.encode()) < 4096 and "\n" not in text
    assert json.loads(text)["shapes"] == line["shapes"]
    assert bench_card.as_line({"shapes": {}, "kernels": {}}) == '{"shapes":{},"kernels":{}}'
    with pytest.raises(ValueError, match="characters long"):
        bench_card.as_line({"gpu": 5000 * "x"})


def test_figures_stay_where_reasons_and_registers_have_no_room():
    line = full_line(more=5000)
    assert json.loads(bench_card.as_line(line)).keys() == line.keys() - {"absent", "kernels"}


def test_heads_are_left_out_until_a_dense_call_takes_a_tenth_of_a_second(monkeypatch):
    now, per_head = [0.0], 0.021
    monkeypatch.setattr(bench_card.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "randn", lambda *size, **more: torch.zeros(size))

    def attend(q, k, v):
        now[0] += per_head

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    layout = bench_card.SHAPES["wan-33k"][0]
    assert bench_card.heads_for(layout, 40, 128) == 5
    assert bench_card.heads_for(layout, 3, 128) == 3, "no more than the model has"
    per_head = 9.0
    assert bench_card.heads_for(layout, 40, 128) == 1


def test_what_the_driver_says_is_told_or_left_out(monkeypatch):
    monkeypatch.setattr(bench_card.shutil, "which", lambda name: name)
    answer = SimpleNamespace(returncode=0, stdout="580.1, 450.00, [N/A], 9501, 51\n")
    monkeypatch.setattr(bench_card.subprocess, "run", lambda *args, **more: answer)
    assert bench_card.smi() == ["580.1", "450.00", "[N/A]", "9501", "51"]
    answer.returncode = 9
    assert bench_card.smi() == []
    monkeypatch.setattr(bench_card.shutil, "which", lambda name: None)
    assert bench_card.smi() == []


@pytest.mark.parametrize(
    ("device", "extra", "prepares", "file"),
    [
        ("cuda", [], False, "bench_card.py"),
        ("cuda", ["--tune", "--user-directory", "x"], False, "tune_tiles.py"),
        ("cuda", ["--rounds", "2"], True, "bench_attention.py"),
        ("cpu", [], True, "bench_eager.py"),
        ("cpu", ["--tune"], True, "tune_tiles.py"),
    ],
)
def test_bench_installs_nothing_where_this_python_reaches_the_gpu(
    monkeypatch, device, extra, prepares, file
):
    ran, prepared = [], []
    env = SimpleNamespace(python="prepared", device=device, variables=dict)

    def prepare(*args):
        prepared.append(args)
        return env

    monkeypatch.setattr(commands, "probe", lambda python: {"device": device})
    monkeypatch.setattr(commands, "prepared", prepare)
    monkeypatch.setattr(commands, "call", lambda command, env=None: ran.append(command) or 0)
    assert commands.bench(SimpleNamespace(), extra) == 0
    (command,) = ran
    assert command[0] == ("prepared" if prepares else sys.executable)
    assert command[1].endswith(file) and command[2:] == extra and bool(prepared) == prepares


def test_the_page_names_every_entry_of_the_line():
    for name in ("sdpa", "cudnn", "kitchen8", "sol20", "sol10", "sage", "64x64@0.2", "first_s"):
        assert f"`{name}`" in LINE, name


def test_the_page_tells_of_every_fault_of_a_release_of_triton():
    file = bench_card.ROOT / "tests" / "bench" / "results" / "tritons.json"
    releases = json.loads(file.read_text("utf-8"))["releases"]
    assert {version.rpartition(".")[0] for version in releases} >= {"3.6", "3.7", "3.8", "3.9"}
    # all of it is of one state of the kernels, which the page names
    (commit,) = {answer["commit"] for answers in releases.values() for answer in answers}
    assert f"commit {commit}" in LINE
    # and every release was asked for the same
    asked = [
        {answer["arch"]: sorted(x["kernel"] for x in answer["kernels"]) for answer in answers}
        for answers in releases.values()
    ]
    assert all(kernels == asked[0] and set(kernels) == set(ARCHS) for kernels in asked)
    rows = [line for line in LINE.splitlines() if line.startswith("| 3.")]
    for version, answers in releases.items():
        (row,) = (row for row in rows if row.startswith(f"| {version} |"))
        for answer in answers:
            assert f"sm_{answer['arch']}" in row and not answer.get("failed")
            for fault in faults(answer["kernels"]):
                name, _, what = fault.partition(": ")
                assert f"`{name}`" in row and what.split()[0] in row, f"{version}: {fault}"
