"""Rules are chosen on some models and judged on the others: `tests/lab/judged.py`."""

import json
import sys
from pathlib import Path

import pytest

LAB = Path(__file__).resolve().parent
sys.path[:0] = [str(LAB), str(LAB.parent / "tiny_model")]

import judged  # noqa: E402
import paired  # noqa: E402
from rule import PAPER  # noqa: E402

from sparse_attn.config import PRESETS  # noqa: E402

JUDGED = json.loads((LAB / "results" / "judged.json").read_text())


def rows(gains, settings=None):
    """{model: row} of two videos each, so many dB over 20."""
    return {
        model: {"psnr": [20.0 + gain, 22.0 + gain], "settings": settings or {"again": [0.6]}}
        for model, gain in gains.items()
    }


def data(**rules):
    found = {("20", 0.2, PAPER.name): rows(dict.fromkeys(("tiny", "wan128", "joint"), 0.0))}
    return {"rows": found | {("20", 0.2, name): rule for name, rule in rules.items()}}


def test_a_winner_is_worth_what_the_other_models_say():
    plain = rows({"tiny": 1.0, "wan128": 2.0, "joint": 4.0})
    lucky = rows({"tiny": 5.0, "wan128": -1.0, "joint": -1.0})
    longer = rows(dict.fromkeys(("tiny", "wan128", "joint"), 9.0), {"again": [0.6], "warmup": 0.3})
    by_tiny, by_others = judged.winners(
        data(plain=plain, lucky=lucky, longer=longer, partial=rows({"tiny": 9.0}))
    )
    assert by_tiny["rule"] == "lucky" and by_tiny["rules_compared"] == 2
    assert by_tiny["choosing"]["gain_db"] == 5.0 and by_tiny["judging"]["gain_db"] == -1.0
    assert (by_tiny["gap_db"], by_tiny["verdict"], by_tiny["place_by_judges"]) == (6.0, "fails", 2)
    assert by_others["rule"] == "plain" and by_others["judging"]["models"] == ["tiny"]
    assert by_others["choosing"]["wins"] == by_others["choosing"]["videos"] == 4
    assert by_others["judging"] == {
        "models": ["tiny"], "gain_db": 1.0, "stderr": 0.0, "wins": 2, "videos": 2,
        "perceptual": None,
    }  # fmt: skip


def test_a_lead_within_two_errors_is_open():
    words = [judged.verdict({"gain_db": g, "stderr": 1.0}) for g in (2.1, 1.9, -1.9, -2.1)]
    assert words == ["holds", "open", "open", "fails"]


def test_the_perceptual_distance_is_told_where_it_was_measured():
    mine, base = rows({"tiny": 1.0}), rows({"tiny": 0.0})
    mine["tiny"]["perceptual"], base["tiny"]["perceptual"] = [0.1, 0.2], [0.4, 0.3]
    assert judged.side(mine, base, ("tiny",))["perceptual"] == pytest.approx(-0.2)


def test_the_recorded_judgement_is_that_of_the_recorded_results():
    recorded = paired.load(LAB / "results" / "second_weights" / name for name in JUDGED["files"])
    found = judged.winners(recorded) + judged.claims(recorded)
    assert json.loads(json.dumps(found)) == JUDGED["rows"]
    tables = judged.table(JUDGED["rows"])
    page = (LAB / "README.md").read_text(encoding="utf-8")
    assert [line for line in tables.splitlines() if line not in page] == []
    assert all(row["judging"]["videos"] >= 8 for row in found)


@pytest.mark.parametrize("claim", [c for c in judged.CLAIMS if c.field], ids=lambda c: c.text)
def test_what_does_not_hold_on_the_judges_is_no_default(claim):
    field, value = claim.field
    assert all(getattr(PRESETS[preset], field) == value for preset in claim.presets)
    said = [row["verdict"] for row in JUDGED["rows"] if row["claim"] == claim.text]
    assert said and "fails" not in said
