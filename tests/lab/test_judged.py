"""Rules are chosen on some models and judged on the others: `tests/lab/judged.py`."""

import json
import sys
from pathlib import Path

import pytest

LAB = Path(__file__).resolve().parent
sys.path[:0] = [str(LAB), str(LAB.parent / "tiny_model")]

import judged  # noqa: E402
from rule import PAPER  # noqa: E402

from sparse_attn.config import PRESETS  # noqa: E402

JUDGED = json.loads((LAB / "results" / "judged.json").read_text())


def rows(gains, settings=None):
    """{model: row} of two videos each, so many dB over 20."""
    return {
        model: {"psnr": [20.0 + gain, 22.0 + gain], "settings": settings or {"again": [0.6]}}
        for model, gain in gains.items()
    }


def by_side(choosing: float, judging: float, settings=None):
    sides = zip(judged.SPLIT, (choosing, judging), strict=True)
    return rows({model: gain for models, gain in sides for model in models}, settings)


def data(**rules):
    found = {("20", 0.2, PAPER.name): by_side(0.0, 0.0)}
    return {"rows": found | {("20", 0.2, name): rule for name, rule in rules.items()}}


def test_a_winner_is_worth_what_the_other_models_say():
    choosing, judging = judged.SPLIT
    plain, lucky = by_side(1.0, 3.0), by_side(5.0, -1.0)
    longer = by_side(9.0, 9.0, {"again": [0.6], "warmup": 0.3})
    by_choosing, by_judging = judged.winners(
        data(plain=plain, lucky=lucky, longer=longer, partial=rows({choosing[0]: 9.0}))
    )
    assert by_choosing["rule"] == "lucky" and by_choosing["rules_compared"] == 2
    gains = [by_choosing[part]["gain_db"] for part in ("choosing", "judging")]
    assert gains == [5.0, -1.0]
    found = (by_choosing["gap_db"], by_choosing["verdict"], by_choosing["place_by_judges"])
    assert found == (6.0, "fails", 2)
    assert by_judging["rule"] == "plain" and by_judging["judging"]["models"] == list(choosing)
    assert by_judging["choosing"]["wins"] == by_judging["choosing"]["videos"] == 2 * len(judging)
    assert by_judging["judging"] == {
        "models": list(choosing), "gain_db": 1.0, "stderr": 0.0, "wins": 2 * len(choosing),
        "videos": 2 * len(choosing), "perceptual": None,
    }  # fmt: skip


def test_a_claim_that_only_one_side_sampled_is_judged_by_that_side():
    name, other = judged.EARLIER.name, judged.TWO.name
    found = data(**{name: by_side(2.0, 1.0), other: rows(dict.fromkeys(judged.SPLIT[1], 0.5))})
    (row,) = [r for r in judged.claims(found) if r["claim"] == "second search at 0.45 over 0.6"]
    assert (row["choosing"], row["gap_db"], row["judging"]["gain_db"]) == (None, None, 0.5)
    assert "| 20, 0.2 | not sampled | +0.5 ± 0.0 (4 of 4) |  | holds |" in judged.table([row])


def test_a_rule_at_half_the_density_is_compared_with_the_whole_one():
    name = judged.EARLIER.name
    found = data(**{name: by_side(2.0, 1.0)})
    found["rows"]["20", 0.1, name] = by_side(-1.0, -2.0)
    halves = [
        row for row in judged.claims(found) if "half the density over the paper" in row["claim"]
    ]
    assert [row["judging"]["gain_db"] for row in halves] == [-2.0, -1.0]
    assert {row["density"] for row in halves} == {0.1}


def test_a_lead_within_two_errors_is_open():
    words = [judged.verdict({"gain_db": g, "stderr": 1.0}) for g in (2.1, 1.9, -1.9, -2.1)]
    assert words == ["holds", "open", "open", "fails"]


def test_the_perceptual_distance_is_told_where_it_was_measured():
    mine, base = rows({"tiny": 1.0}), rows({"tiny": 0.0})
    mine["tiny"]["perceptual"], base["tiny"]["perceptual"] = [0.1, 0.2], [0.4, 0.3]
    assert judged.side(mine, base, ("tiny",))["perceptual"] == pytest.approx(-0.2)


def test_the_recorded_judgement_is_that_of_the_recorded_results():
    recorded = judged.recorded(judged.RESULTS / name for name in JUDGED["files"])
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


def test_the_first_step_judged_on_a_cpu_is_that_of_its_videos():
    told = json.loads((judged.RESULTS / "first_step_judged_cpu.json").read_text())
    (row,) = told["rows"]
    mine, base = (
        {
            model: {
                column: [
                    v[column] for v in told["videos"] if (v["model"], v["rule"]) == (model, rule)
                ]
                for column in ("psnr", "perceptual")
            }
            for model in judged.SPLIT[1]
        }
        for rule in (row["rule"], row["base"])
    )
    found = judged.side(mine, base, judged.SPLIT[1])
    assert found == row["judging"] | {
        "perceptual": pytest.approx(row["judging"]["perceptual"], abs=1e-4)
    }
    assert judged.verdict(found) == row["verdict"]
    page = (LAB / "README.md").read_text(encoding="utf-8")
    assert (
        f"{found['gain_db']:+.2f} ± {found['stderr']:.2f} dB ({found['wins']} of 16 videos" in page
    )
