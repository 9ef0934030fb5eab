"""What a sparse call of 24 heads x 119,040 tokens x 128 takes, and a run, from what was measured."""

import json
from pathlib import Path

from rule import OP_SCORES, PAPER, Rule, first_search

RESULTS = Path(__file__).parents[1] / "bench" / "results"
BENCH = RESULTS / "attention_h200.json"
TAIL_BENCH = RESULTS / "tail_h200.json"
STEPS_BENCH = RESULTS / "hunyuan_video_steps_h200.json"
EXTRAS = Path(__file__).parent / "results" / "h200_costs.json"
LAYERS = 60  # of that model
SHAPE = "hunyuan-720p-129f"
EVERY_STEP = "pooled scores and lists"


def kernel_times(path: Path = BENCH) -> dict[int, dict[float, float]]:
    """{query block: {density: ms}} of the pack's sparse kernel with key blocks of 64."""
    rows = json.loads(path.read_text())["shapes"][SHAPE]["rows"]
    times: dict[int, dict[float, float]] = {}
    for row in rows:
        for block_q in (64, 128):
            if row["name"] == f"ours, sparse {block_q}x64 at {row['density']}":
                times.setdefault(block_q, {})[row["density"]] = row["ms"]
    return times


def op_times(path: Path = BENCH) -> dict[float, float]:
    """{density: ms} of comfy-kitchen's `sol_attn`."""
    rows = json.loads(path.read_text())["shapes"][SHAPE]["rows"]
    return {r["density"]: r["ms"] for r in rows if r["name"].startswith("comfy-kitchen sol_attn")}


def arranged_tail_ms(block_q: int, path: Path = TAIL_BENCH) -> float:
    """What compact blocks and a pooled tail add to a call of the pack, mean over densities."""
    rows = json.loads(path.read_text())["rows"]
    extra = [r["whole_ms"] - r["plain_ms"] for r in rows if r["blocks"] == f"{block_q}x64"]
    return sum(extra) / len(extra)


def recorded_extras(path: Path = EXTRAS) -> dict[str, float]:
    """ms that means, tail, order and scoring at every step add to such a call."""
    return json.loads(path.read_text())["extra_ms"]


def line(points: dict[float, float]) -> tuple[float, float]:
    """(ms at density 0, ms per density) by least squares."""
    n = len(points)
    x, y = list(points), list(points.values())
    mx, my = sum(x) / n, sum(y) / n
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    slope /= sum((a - mx) ** 2 for a in x)
    return my - slope * mx, slope


def call_ms(rule, extras: dict[str, float]) -> float | None:
    """Time of one sparse call, None where no kernel of that kind was measured.

    Args:
        extras: ms of what comes on top, as `recorded_extras` gives them.
    """
    if rule.score in OP_SCORES:
        return op_times().get(rule.density)
    if rule.recall or rule.as_dense_as:
        return None  # its density is found on the way
    points = kernel_times().get(rule.block_q)
    if points is None or rule.block_k != 64 or rule.precision not in ("auto", "bf16"):
        return None
    start, slope = line(points)
    ms = start + slope * rule.density
    if rule.tail == "pooled" and rule.order != "raster":
        return ms + arranged_tail_ms(rule.block_q)
    if rule.tail == "pooled":
        ms += extras["block means"] + extras["tail"]
    elif rule.tail != "none":
        return None
    ms += extras["order"] if rule.order != "raster" else 0.0
    return ms + (extras[EVERY_STEP] if rule.every_step else 0.0)


def run_seconds(rule: Rule, schedule: str, extras) -> float | None:
    """A run of HunyuanVideo's 720p steps, composed of measured ones; only sparse calls differ.

    Rules that choose blocks at every step need no search: a dense step takes its place.
    """
    now = call_ms(rule, extras)
    if now is None:
        return None
    tail = rule.tail != "none" and not rule.every_step
    measured = json.loads(STEPS_BENCH.read_text())["variants"]
    seconds = measured["bf16, 128x64" + (", pooled tail" if tail else "")]["step_seconds"]
    known = Rule("measured", 0.2, block_q=128)
    known = known.but("measured", order="position", tail="pooled") if tail else known
    moved = LAYERS * (now - call_ms(known, extras)) / 1000
    steps, first = first_search(rule, schedule)
    again = sum(first < step < steps for step in {round(share * steps) for share in rule.again})
    search = seconds["dense" if rule.every_step else "search"]
    rest = steps - first - 1 - again
    # a later search answers its step with a sparse call too
    sparse = again * (seconds["search_again"] + moved) + rest * (seconds["sparse"] + moved)
    return first * seconds["dense"] + search + sparse


def dense_seconds(schedule: str) -> float:
    """The same run with cuDNN's dense attention throughout."""
    seconds = json.loads(STEPS_BENCH.read_text())["dense_step_seconds"]["dense, cuDNN"]
    return first_search(PAPER, schedule)[0] * seconds


def density_at(ms: float, rule, extras) -> float | None:
    """The density at which `rule` takes `ms`."""
    now = call_ms(rule, extras)
    if now is None:
        return None
    return rule.density + (ms - now) / line(kernel_times()[rule.block_q])[1]
