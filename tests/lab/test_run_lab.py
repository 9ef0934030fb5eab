"""What `run_lab.py` makes of its contestants, with videos that cost nothing."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

LAB = Path(__file__).resolve().parent
sys.path[:0] = [str(LAB), str(LAB.parent / "tiny_model")]

import contestants  # noqa: E402
import generation  # noqa: E402
import run_lab  # noqa: E402

from sparse_attn.token_layout import TokenLayout  # noqa: E402

LAYOUT = TokenLayout(before=9, frames=8, height=9, width=11)


def lab_of(run, tmp_path):
    """A lab whose one model does what `run(rule)` does."""
    options = Namespace(task=False, seconds=1e9, out=tmp_path / "lab.json")
    lab = run_lab.Lab(options)
    lab.subjects["tiny"] = SimpleNamespace(
        dense=lambda steps: torch.zeros(1, 3, 2, 16, 16), run=lambda rule, schedule: run(rule),
        readable=False, prompts=[], layout=LAYOUT,
    )  # fmt: skip
    return lab


def test_a_rule_is_as_dense_as_the_one_that_asks_for_a_recall(tmp_path):
    asked = []

    def run(rule):
        asked.append(rule.density)
        kept = 0.37 if rule.recall else rule.density
        return generation.Run(torch.full((1, 3, 2, 16, 16), 0.5), density=kept)

    lab = lab_of(run, tmp_path)
    lab.job("tiny", "20", 0.2, contestants.RECALL)
    assert asked == [0.2, 0.2, 0.37, 0.37] and not lab.failed
    rows = json.loads((tmp_path / "lab.json").read_text())["rows"]
    assert [row["density_kept"] for row in rows] == [0.37] * 4
    assert {row["density"] for row in rows} == {0.2}, "of one place, so that they are compared"


def test_a_contestant_that_fails_is_named_and_the_others_run(tmp_path, monkeypatch):
    def run(rule):
        if rule.score == "exact mass":
            raise RuntimeError("no room")
        return generation.Run(torch.full((1, 3, 2, 16, 16), 0.5))

    lab = lab_of(run, tmp_path)
    monkeypatch.setattr(run_lab, "Lab", lambda options: lab)
    words = ["--comfyui", "", "--no-task", "--jobs", "20:0.2:tail error", "--out", "unused"]
    monkeypatch.setattr(sys, "argv", ["run_lab.py", *words])
    with pytest.raises(SystemExit, match=r"Not sampled:\ntiny 20 exact masses.*no room"):
        run_lab.main()
    found = json.loads((tmp_path / "lab.json").read_text())
    assert len(found["rows"]) == len(found["failed"]) == 1
    lab.job("tiny", "20", 0.2, contestants.RECALL[2:])
    assert "was not sampled before" in lab.failed[-1]
