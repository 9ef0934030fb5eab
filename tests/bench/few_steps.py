"""What each step does on schedules of few steps, and what that takes: the table of README.md.

    python tests/bench/few_steps.py

The plans are the pack's own; milliseconds of a run are computed from those of calls.
"""

import sys
from dataclasses import replace
from math import exp
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from sparse_attn.config import PRESETS  # noqa: E402
from sparse_attn.forecast.forecaster import Forecaster  # noqa: E402
from sparse_attn.forecast.plan import plan_forecasts  # noqa: E402
from sparse_attn.schedule import Schedule, StepCounter, StepKind, plan  # noqa: E402

# ms of a call of 24 heads x 119,040 tokens x 128, bfloat16, blocks of 64, H200: dense with its LSE kept,
# the same with masses (tiles.py), masses of all rows (README.md), an order (similarity.py); a sparse
# call with a tail at density 0, and more at 1, by those at 0.1 and 0.2 (results/tail_h200.json)
DENSE, WITH_MASSES, MASSES, ORDER = 290, 298, 148, 12
SPARSE, PER_DENSITY = 10.6, 349
LTX = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)


def simple(steps: int, shift: float) -> tuple[float, ...]:
    """Sigmas of ComfyUI's `simple` scheduler for a flow model."""
    times = (1 - i / steps for i in range(steps + 1))
    return tuple(shift * t / (1 + (shift - 1) * t) for t in times)


def flow(sigma: float, shift: float) -> float:
    """Progress at a sigma of a flow model."""
    return 1 - sigma / (shift - (shift - 1) * sigma)


def ltx(sigma: float, shift: float) -> float:
    """The same of a model whose shift is the exponent of ComfyUI's ModelSamplingFlux."""
    return 1 - sigma / (sigma + (1 - sigma) * exp(shift))


WAN = simple(4, 5.0)
# name, progress at a sigma, shift, sigmas, what `plan` is told of other samplers
CASES = [
    ("Wan 2.2 14B, lightx2v LoRAs, both experts as one", flow, 5.0, WAN, {}),
    ("the same, high-noise expert", flow, 5.0, WAN[:3], {"keeps_pattern": True}),
    ("the same, low-noise expert", flow, 5.0, WAN[2:], {"begins_with_pattern": True}),
    ("Wan 2.1, 6 steps", flow, 5.0, simple(6, 5.0), {}),
    ("MiniMax-H3, turbo LoRA", flow, 12.0, simple(8, 12.0), {}),
    ("LTX-2, distilled", ltx, 2.37, LTX, {}),
    ("LTX-2, distilled, second sampler", ltx, 2.37, (0.85, 0.725, 0.4219, 0.0), {}),
]
PRESETS_SHOWN = ("Balanced", "Quality", "Fast")


def planned(case, preset: str) -> Schedule:
    _, progress, shift, sigmas, more = case
    return plan(sigmas, lambda sigma: progress(sigma, shift), PRESETS[preset], **more)


def letters(schedule: Schedule, begun: bool) -> str:
    """D dense, S first search with dense output, R search with sparse output, s sparse.

    Args:
        begun: whether the run begins with what another one has found, in place of its first search.
    """
    found = ""
    for kind in schedule.kinds:
        if kind is not StepKind.SEARCH:
            found += "D" if kind is StepKind.DENSE else "s"
        elif begun:
            found, begun = found + "s", False
        else:
            sparse = "S" in found or "s" in found or (schedule.sparse_search and "D" in found)
            found += "R" if sparse else "S"
    return found


def forecast_steps(schedule: Schedule, level) -> frozenset[int]:
    """The steps that are forecast where no forecast is off by more than the level's limit."""
    sigmas = schedule.sigmas
    plan_ = plan_forecasts(sigmas, schedule.first_step, schedule.total_steps, schedule)
    never_off = replace(level, limit=float("inf"))
    forecaster = Forecaster(never_off, plan_, StepCounter(sigmas))
    for sigma in sigmas[:-1]:
        if forecaster.forecast(sigma, None) is None:
            forecaster.learn(sigma, torch.ones(1, 1))
    return frozenset(forecaster.statistics.forecast)


def step_names(schedule: Schedule) -> list[str]:
    """What each step of a run is called by `bench_model`."""
    names = []
    for step, kind in enumerate(schedule.kinds):
        name = kind.value
        if kind is StepKind.DENSE and schedule.wants_lse(step):
            name = "dense_with_lse"
        if kind is StepKind.SEARCH and StepKind.SEARCH in schedule.kinds[:step]:
            name = "search_again"
        names.append(name)
    return names


def milliseconds(kinds: str, preset: str) -> float:
    """Of the attention of one layer, a whole run."""
    config = PRESETS[preset]
    sparse = SPARSE + PER_DENSITY * config.density
    masses = MASSES / config.search_stride
    first = kinds.find("S")
    one_pass = first > 0 and kinds[first - 1] == "D"
    search = ORDER + (WITH_MASSES if one_pass else DENSE + masses)
    took = {"D": DENSE, "s": sparse, "S": search, "R": ORDER + masses + sparse}
    return sum(took[kind] for kind in kinds)


def table() -> str:
    lines = [
        "| schedule | steps | " + " | ".join(PRESETS_SHOWN) + " |",
        "| --- | --- | " + " | ".join("---" for _ in PRESETS_SHOWN) + " |",
    ]
    for case in CASES:
        cells = []
        for preset in PRESETS_SHOWN:
            begun = "begins_with_pattern" in case[4]
            kinds = letters(planned(case, preset), begun)
            share = milliseconds(kinds, preset) / (DENSE * len(kinds))
            cells.append(f"`{kinds}` {share:.0%}")
        lines.append(f"| {case[0]} | {len(case[3]) - 1} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
