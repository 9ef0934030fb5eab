"""README's table of whole runs, and the fewest seconds that a preset's dense steps and density leave possible.

    python tests/bench/bound_runs.py

Both are of recorded figures. The bound: attention is taken to be all that can be spared. A run of which D steps end in dense attention (the first
search's among them) and s in sparse attention takes no less than D + s times the rest of a step, D times
dense attention and s times the density's share of it: as if searches, orders, permuting, quantising and
tails took nothing, and a sparse kernel were as fast by block as a dense one. Dense attention is the pack's own,
in INT8 where the preset is run in it, which is the fastest here. Writes `bounds` into results/runs_h200.json.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sparse_attn.config import PRESETS  # noqa: E402
from sparse_attn.forecast.plan import LEVELS  # noqa: E402
from sparse_attn.schedule import plan  # noqa: E402
from tests.bench.few_steps import flow, forecast_steps, letters, simple  # noqa: E402

RESULTS = ROOT / "tests" / "bench" / "results"
RUNS, LENGTH = RESULTS / "runs_h200.json", RESULTS / "length_h200.json"
# model and layers of it
WAN, HUNYUAN = ("Wan 2.2 14B", 4), ("HunyuanVideo 13B", 60)
# of ComfyUI's schedules for them
SHIFTS = {WAN: 8.0, HUNYUAN: 7.0}
PAPER = "Paper at 0.9, 128x64"
# of 832x480
SMALL_TOKENS = 32760
# model, seconds of video, preset, Skip Steps, steps, asked and what lies beyond it: seconds, or times as fast
# as the fastest exact dense run where `gain` is true
ASKED = [
    (WAN, 5, "Balanced", "", 4, 2.8, 2.5, False),
    (WAN, 5, "Balanced", "", 8, 4.9, 4.3, False),
    (WAN, 5, "Balanced", "", 20, 10.2, 9.3, False),
    (WAN, 5, "Balanced", "fast", 20, 6.8, 5.8, False),
    (HUNYUAN, 5, "Balanced", "", 50, 350, 310, False),
    (HUNYUAN, 5, "Balanced", "fast", 50, 215, 180, False),
    (HUNYUAN, 24, PAPER, "", 50, 4.5, None, True),
    (HUNYUAN, 24, "Balanced", "", 50, 6, None, True),
    (HUNYUAN, 24, "Balanced", "fast", 50, 8, None, True),
]  # fmt: skip


def run_rows(model: tuple[str, int], name: str) -> list[dict]:
    """Rows of a contestant at 720p with compiled kernels."""
    wanted = *model, name, False
    rows = json.loads(RUNS.read_text())["rows"]
    found = (row for row in rows if row["tokens"] != SMALL_TOKENS)
    return [r for r in found if (r["model"], r["layers"], r["name"], r["cold"]) == wanted]


def step_parts(model: tuple[str, int], seconds: int, exact: bool) -> tuple[float, float]:
    """Seconds of a step without its attention, and of its dense attention."""
    if model == WAN:
        names = "attention that returns v", "AdaSpa's dense attention, int8"
        rows = [run_rows(model, name)[-1] for name in names]
        rest, whole = (row["seconds"] / row["steps"] for row in rows)
        return rest, whole - rest
    found = json.loads(LENGTH.read_text())
    entry = found["lengths"][f"{seconds} s"]
    times = found["layers"] * found["heads"] / found["heads_measured"] / 1000
    dense = entry["dense_ms"]
    fastest = min(s for name, s in dense.items() if name != "ours, int8")
    return entry["rest_of_a_step_s"], times * (fastest if exact else dense["ours, int8"])


def step_counts(model: tuple[str, int], preset: str, level: str, steps: int) -> tuple[int, int]:
    """Steps that end in dense attention, and sparse ones; those that are forecast are neither."""
    shift = SHIFTS[model]
    config = PRESETS["Paper" if preset == PAPER else preset]
    schedule = plan(simple(steps, shift), lambda sigma: flow(sigma, shift), config)
    left_out = forecast_steps(schedule, LEVELS[level]) if level else ()
    done = [x for i, x in enumerate(letters(schedule, False)) if i not in left_out]
    dense = sum(x in "DS" for x in done)
    return dense, len(done) - dense


def measured(model: tuple[str, int], seconds: int, preset: str, level: str, steps: int) -> float:
    """Of the run as it is, in INT8; of 24 s by the composed runs."""
    if seconds == 24:
        name = preset if preset == PAPER else f"{preset}, int8"
        runs = json.loads(LENGTH.read_text())["lengths"]["24 s"]["settings"][name]["runs_s"]
        return runs[level or "all steps"]
    name = f"{preset}, int8" + (f", Skip Steps {level}" if level else "")
    return next(row["seconds"] for row in run_rows(model, name) if row["steps"] == steps)


def whole_runs() -> str:
    """The page's table: the latest row of each contestant and number of steps, four layers."""
    rows = [r for r in json.loads(RUNS.read_text())["rows"] if not (r["composed"] or r["cold"])]
    rows = [r for r in rows if (r["model"], r["layers"]) == WAN and r["tokens"] != SMALL_TOKENS]
    lines = ["| seconds (dB) | 4 steps | 8 steps | 20 steps | peak, GiB |", "| --- " * 5 + "|"]
    for name in dict.fromkeys(r["name"] for r in rows):
        own = {r["steps"]: r for r in rows if r["name"] == name}
        cells = []
        for steps in (4, 8, 20):
            row = own.get(steps)
            db = f" ({row['db']:.1f})" if row and row["db"] else ""
            cells.append(f"{row['seconds']:.2f}{db}" if row else "")
        peak = max(r["peak_gib"] for r in own.values())
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {peak:.1f} |")
    return "\n".join(lines)


def bounds() -> list[dict]:
    found = []
    for model, seconds, preset, level, steps, asked, beyond, gain in ASKED:
        paper = preset == PAPER
        rest, dense = step_parts(model, seconds, exact=paper)
        ends_dense, sparse = step_counts(model, preset, level, steps)
        density = 0.1 if paper else PRESETS[preset].density
        least = (ends_dense + sparse) * rest + (ends_dense + sparse * density) * dense
        took = measured(model, seconds, preset, level, steps)
        row = {
            "model": model[0], "layers": model[1], "video_s": seconds, "preset": preset, "skip_steps": level, "steps": steps,
            "asked": asked, "beyond": beyond, "unit": "times" if gain else "s",
            "dense_steps": ends_dense, "sparse_steps": sparse, "density": round(density, 2),
            "rest_of_a_step_s": round(rest, 3), "dense_attention_of_a_step_s": round(dense, 3),
            "measured": took, "bound": round(least, 2),
        }  # fmt: skip
        if gain:
            exact_rest, exact_dense = step_parts(model, seconds, exact=True)
            best = steps * (exact_rest + exact_dense)
            row |= {"measured": round(best / took, 2), "bound": round(best / least, 2)}
        reached = (lambda x, to: x >= to) if gain else (lambda x, to: x <= to)
        row["can_be_reached"] = reached(row["bound"], asked)
        row["beyond_can_be"] = None if beyond is None else reached(row["bound"], beyond)
        found.append(row)
    return found


def table(rows: list[dict]) -> str:
    lines = ["| run | asked | measured | bound |", "| --- | --- | --- | --- |"]
    for row in rows:
        unit = "x" if row["unit"] == "times" else " s"
        name = row["preset"] + (f", Skip Steps {row['skip_steps']}" if row["skip_steps"] else "")
        asked = f"{row['asked']:g}{unit}" + (f" ({row['beyond']:g})" if row["beyond"] else "")
        lines.append(
            f"| {row['model']}, {row['layers']} layers, {row['steps']} steps, {row['video_s']} s of video: {name} | {asked} | "
            f"{row['measured']:g}{unit} | {row['bound']:g}{unit} |"
        )
    return "\n".join(lines)


def main():
    result = json.loads(RUNS.read_text())
    result["bounds"] = bounds()
    RUNS.write_text(json.dumps(result, indent=1) + "\n")
    print(whole_runs(), table(result["bounds"]), sep="\n\n")


if __name__ == "__main__":
    main()
