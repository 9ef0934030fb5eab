"""Compares ways not to compute every step, on whole generations of the lab's models.

    python tests/lab/run_forecast.py --comfyui PATH --models tiny wan128 --out OUT/forecast.json

Every contestant samples the prompts and seeds of the dense run, one by one, since a gate or a cache
decides for a whole batch. Rows count the calls of the model that were really made, and the steps of
each kind, on average; `equal_time.py` makes seconds of a large model of them. The result is rewritten
after every row; with `--more` rows of an earlier result are kept and not made again.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT), str(ROOT / "tests" / "tiny_model"), str(HERE)]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

import check_model  # noqa: E402
import generation  # noqa: E402
import procedural_video as video  # noqa: E402
import torch  # noqa: E402
from models import MODELS  # noqa: E402
from run_lab import latent_size  # noqa: E402

from sparse_attn.config import PRESETS  # noqa: E402
from sparse_attn.forecast import forecaster, polynomial  # noqa: E402
from sparse_attn.forecast.plan import LEVELS, Level  # noqa: E402
from sparse_attn.video_metrics import mean_squared_error, psnr  # noqa: E402
from tests.bench.record import facts  # noqa: E402

NEVER = float("inf")
# equal videos have 100 dB
LEAST_ERROR = 1e-10
NAMES = ("constant", "linear", "quadratic")


def forecast(level: Level):
    def install(model):
        from sparse_attn.host.forecast import install

        forecaster.extrapolate = polynomial.extrapolate
        return install(model, level)

    return install


class Remembers:
    """Forecasts from all predictions of a run, in place of the polynomial through the last ones.

    `of(sigmas, predictions, at)` has them oldest first, float32, and at least two.
    """

    def __init__(self, of, in_row: int):
        self.of, self.in_row = of, in_row

    def __call__(self, model):
        from sparse_attn.host.forecast import install

        known: dict[float, torch.Tensor] = {}

        def extrapolate(points, at):
            # another run has begun
            if known and points[-1][0] > min(known):
                known.clear()
            known.update((sigma, prediction.float()) for sigma, prediction in points)
            sigmas = sorted(known, reverse=True)
            found = self.of(sigmas, [known[sigma] for sigma in sigmas], at)
            return found.to(points[0][1].dtype)

        forecaster.extrapolate = extrapolate
        return install(model, Level(1, self.in_row, NEVER))


def chebyshev(sigmas, predictions, at, degree=4, ridge=0.1):
    """Chebyshev polynomials in sigma, fitted to all predictions by ridge regression.

    After Spectrum (arXiv 2603.01623). Sigma is mapped to [-1, 1]; flow models begin at 1 and end at 0.
    """
    x = torch.tensor([*sigmas, at], dtype=torch.float64) * 2 - 1
    terms = [torch.ones_like(x), x]
    while len(terms) <= degree:
        terms.append(2 * x * terms[-1] - terms[-2])
    basis = torch.stack(terms, 1)
    known, here = basis[:-1], basis[-1]
    normal = known.T @ known + ridge * torch.eye(degree + 1, dtype=x.dtype)
    weights = here @ torch.linalg.solve(normal, known.T)
    return sum(float(w) * p for w, p in zip(weights, predictions, strict=True))


def cache(node: str, threshold: float):
    """ComfyUI's own node with its defaults but for the threshold."""

    def install(model):
        from comfy_extras import nodes_easycache

        return getattr(nodes_easycache, node).execute(model, threshold, 0.15, 0.95, False).args[0]

    return install


def contestants(steps: int) -> dict[str, tuple]:
    """By name, what is done to the model, and the steps that are sampled."""
    found: dict[str, tuple] = {name: (forecast(level), steps) for name, level in LEVELS.items()}
    for fewer in (0.7, 0.65, 0.6, 0.5):
        found[f"{round(fewer * steps)} steps"] = lambda model: model, round(fewer * steps)
    for threshold in (0.05, 0.1, 0.2, 0.02):
        found[f"LazyCache {threshold}"] = cache("LazyCacheNode", threshold), steps
        found[f"EasyCache {threshold}"] = cache("EasyCacheNode", threshold), steps
    for in_row, name in ((1, "every other"), (2, "two of three"), (3, "three of four")):
        for degree, shape in enumerate(NAMES):
            found[f"{name}, {shape}"] = forecast(Level(degree, in_row, NEVER)), steps
        found[f"{name}, Chebyshev"] = Remembers(chebyshev, in_row), steps
        found[f"{name}, damped by channel"] = forecast(Level(1, in_row, NEVER, True)), steps
    return found


def entries(steps: int, presets) -> dict[str, tuple]:
    """The contestants without AdaSpa and behind each preset: (preset or None, install, steps)."""
    found: dict[str, tuple] = {preset: (preset, lambda model: model, steps) for preset in presets}
    for name, how in contestants(steps).items():
        found[name] = None, *how
        found |= {f"{preset}, {name}": (preset, *how) for preset in presets}
    return found


def kinds_done(told) -> list[str]:
    """What each step of a run with AdaSpa did, by the names of `bench_model`'s steps."""
    kinds, owed = [], False
    for step, planned in enumerate(told.step_kinds()):
        left_out = planned != "forecast" and told.was_skipped(step)
        kind = "skipped" if left_out else planned
        # a search that a cache has skipped takes place at the next step
        if kind == "sparse" and owed:
            kind = "search"
        owed = left_out and (owed or planned == "search")
        if kind == "search" and (told.schedule.sparse_search or "sparse" in kinds):
            kind = "search_again"
        kinds.append(kind)
    return kinds


class Calls:
    """Counts the calls that a model makes of its first block."""

    def __init__(self, patcher):
        inner = patcher.model.diffusion_model
        blocks = getattr(inner, "double_blocks", None) or inner.blocks
        self.calls = 0
        blocks[0].register_forward_pre_hook(self.count)

    def count(self, *_):
        self.calls += 1


class Contest:
    def __init__(self, name: str, options):
        self.subject = generation.subject(name, options.comfyui, options.seeds, options.latent)
        self.counter = Calls(self.subject.model)
        self.dense: list[torch.Tensor] = []

    def sample(self, preset, install, steps: int, seed: int):
        """A video [1, 3, F, Y, X] in [0, 1], the model's evaluations, and the steps by kind."""
        from sparse_attn.host.install import install as install_adaspa

        model, handle = self.subject.model, None
        if preset:
            model, handle = install_adaspa(model, replace(PRESETS[preset], min_tokens=0))
        before, inputs = self.counter.calls, (self.subject.prompts, self.subject.noise())
        prompts, noise = (x[seed : seed + 1] for x in inputs)
        found = check_model.generate(
            install(model), prompts, self.subject.latent, steps, 0, noise=noise
        )
        calls = self.counter.calls - before
        kinds = kinds_done(handle.latest()) if handle else ["dense"] * calls
        return video.decode(found).clamp(0, 1), calls, Counter(kinds)

    def row(self, preset, install, steps: int, whole: int) -> dict:
        seeds = range(len(self.subject.prompts))
        if not self.dense:
            self.dense = [self.sample(None, lambda model: model, whole, i)[0] for i in seeds]
        found = [self.sample(preset, install, steps, i) for i in seeds]
        pairs = zip(self.dense, [made for made, _, _ in found], strict=True)
        db = [psnr(max(mean_squared_error(a, b), LEAST_ERROR)) for a, b in pairs]
        kinds = sum((kinds for _, _, kinds in found), Counter())
        return {
            "steps": steps,
            "evaluations": statistics.fmean(calls for _, calls, _ in found),
            "steps_by_kind": {kind: n / len(found) for kind, n in kinds.items()},
            "db": round(statistics.fmean(db), 2),
            "stderr": round(statistics.stdev(db) / len(db) ** 0.5, 2) if len(db) > 1 else None,
            "by_seed": [round(x, 2) for x in db],
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", required=True)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["tiny"])
    parser.add_argument("--out", type=Path, required=True, help="file of the results")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--latent", type=latent_size, help="TxHxW instead of the models' own")
    parser.add_argument("--presets", nargs="*", choices=tuple(PRESETS), default=[])
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no contestant after this")
    parser.add_argument("--rules", nargs="+", help="some of the contestants, by name")
    parser.add_argument("--more", type=Path, help="an earlier result to go on from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.more.read_text())["rows"] if options.more else []
    contests, start = {}, time.perf_counter()
    # rule by rule, so that a limit of time leaves all models with equally many
    for rule, (preset, install, steps) in entries(options.steps, options.presets).items():
        for name in options.models:
            wanted = not options.rules or rule in options.rules
            wanted = wanted and time.perf_counter() - start < options.seconds
            if not wanted or any((row["rule"], row["model"]) == (rule, name) for row in rows):
                continue
            contest = contests.setdefault(name, None) or Contest(name, options)
            contests[name] = contest
            began = time.perf_counter()
            found = contest.row(preset, install, steps, options.steps)
            rows.append({"rule": rule, "model": name, **found})
            print(rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
            result = {
                "what": "whole generations against the dense one of the same seed, PSNR in dB",
                "latent": options.latent,
                "seeds": options.seeds,
                "rows": rows,
                **facts(),
            }
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
