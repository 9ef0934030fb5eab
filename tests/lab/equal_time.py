"""What a run's seconds buy: ways to compute fewer or cheaper steps of 20, by seconds, evaluations and dB.

    python tests/lab/equal_time.py

makes `results/equal_time.json` and tests/bench/results/front.svg of recorded results. Seconds are those of
HunyuanVideo 13B at 720p in bf16, composed of its measured kinds of steps (the row `Balanced` of
tests/bench/results/runs_h200.json, dense ones cuDNN's); dB are of the lab's models.
"""

import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT), str(HERE)]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

from paired import rule_of  # noqa: E402
from plots import lines  # noqa: E402

from sparse_attn.schedule import plan  # noqa: E402
from tests.bench.few_steps import PER_DENSITY, letters  # noqa: E402

RESULTS = HERE / "results"
RUNS = ROOT / "tests" / "bench" / "results" / "runs_h200.json"
STEPS, LAYERS, MEASURED_DENSITY = 20, 60, 0.2
KINDS = {"D": "dense", "S": "search", "s": "sparse", "R": "search_again"}
JUDGES = ("wan128", "joint")


def step_seconds() -> dict[str, float]:
    rows = json.loads(RUNS.read_text())["rows"]
    (row,) = (row for row in rows if row["name"] == "Balanced" and "step_seconds" in row)
    return row["step_seconds"]


def seconds(kinds: dict[str, float], density: float = MEASURED_DENSITY) -> float:
    """Of a run with so many steps of each kind; what is forecast or skipped takes none."""
    took = step_seconds()
    cheaper = LAYERS * PER_DENSITY * (density - MEASURED_DENSITY) / 1000
    more = {"sparse": cheaper, "search_again": cheaper}
    return sum(n * (took[kind] + more.get(kind, 0.0)) for kind, n in kinds.items() if kind in took)


def of_forecasts(name: str) -> list[dict]:
    rows = []
    for row in json.loads((RESULTS / name).read_text())["rows"]:
        kinds = row.get("steps_by_kind", {"dense": row["evaluations"]})
        found = {key: row[key] for key in ("rule", "model", "steps")}
        found |= {"seconds": round(seconds(kinds), 1), "evaluations": row["evaluations"]}
        rows.append({**found, "db": row["db"], "stderr": row["stderr"]})
    return rows


def of_schedules(name: str) -> list[dict]:
    rows = []
    for row in json.loads((RESULTS / name).read_text())["rows"]:
        if row["schedule"] != str(STEPS):
            continue
        sigmas = [1 - i / STEPS for i in range(STEPS + 1)]
        schedule = plan(sigmas, lambda sigma: 1 - sigma, rule_of(row).config(row["schedule"]))
        done = [KINDS[letter] for letter in letters(schedule, False)]
        kinds = {kind: done.count(kind) for kind in dict.fromkeys(done)}
        error = statistics.stdev(row["psnr"]) / len(row["psnr"]) ** 0.5
        found = {"rule": row["rule"], "model": row["model"], "steps": STEPS}
        found |= {"seconds": round(seconds(kinds, row["density"]), 1), "evaluations": STEPS}
        found |= {"db": round(statistics.fmean(row["psnr"]), 2), "stderr": round(error, 2)}
        rows.append(found)
    return rows


def points(rows: list[dict], chosen) -> list[tuple[float, float]]:
    """(seconds, dB) of each rule that both judging models have, mean over them."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["model"] in JUDGES and chosen(row["rule"]):
            found.setdefault(row["rule"], []).append(row)
    both = [pair for pair in found.values() if len(pair) == len(JUDGES)]
    return [
        tuple(statistics.fmean(row[key] for row in pair) for key in ("seconds", "db"))
        for pair in both
    ]


def all_rows() -> list[dict]:
    return of_forecasts("forecast_h200.json") + of_schedules("front_h200.json")


def main():
    rows = all_rows()
    result = {"what": __doc__.splitlines()[0], "model_of_seconds": "HunyuanVideo 13B, 720p, bf16"}
    text = json.dumps({**result, "rows": rows}, indent=1)
    (RESULTS / "equal_time.json").write_text(text + "\n")
    curves = {
        "Skip Steps, dense": points(rows, lambda rule: rule in ("careful", "fast")),
        "Balanced; with Skip Steps": points(
            rows, lambda rule: rule in ("Balanced", "Balanced, careful", "Balanced, fast")
        ),
        "fewer steps, dense": points(rows, lambda rule: rule in ("12 steps", "10 steps")),
        "EasyCache, dense": points(rows, lambda rule: rule.startswith("EasyCache")),
    }
    for density in (0.1, 0.2, 0.3):
        end = f"density {density}"
        curves[f"{end}, 1 to 4 dense steps"] = points(
            rows, lambda rule, end=end: rule.endswith(end)
        )
    lines(
        {name: found for name, found in curves.items() if found},
        "seconds of 20 steps of HunyuanVideo 13B at 720p (composed; H200)",
        "dB to the dense video (wan128, joint)", "20 steps", RUNS.parent / "front.svg",
    )  # fmt: skip


if __name__ == "__main__":
    main()
