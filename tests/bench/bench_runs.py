"""Whole sampler runs, timed as a whole: ComfyUI's default, rivals, and every preset, on random weights.

    python tests/bench/bench_runs.py --out tests/bench/results/runs_h200.json
    python tests/bench/bench_runs.py --layers 40 --steps 8 --out runs_40.json

Samples some layers of a model at its real width and length through ComfyUI's sampler, at cfg 1.
Each contestant runs twice at its first number of steps; the second counts. Sequences of any length are
sparse. The first runs of all on a
machine, which compile, are `cold`: each in a process with an empty folder of compiled kernels. Random
weights say nothing of quality, so `db` is empty; the lab has it. Rivals run where they are installed.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.tools import comfy_inprocess  # noqa: E402

comfy_inprocess.start()

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import torch  # noqa: E402

from sparse_attn.backends.cudnn import cudnn_serves, torch_cudnn  # noqa: E402
from sparse_attn.config import PRESETS  # noqa: E402
from sparse_attn.forecast.plan import LEAST_STEPS, LEVELS  # noqa: E402
from sparse_attn.host import forecast  # noqa: E402
from sparse_attn.host.install import install  # noqa: E402
from tests.bench import real_stacks  # noqa: E402
from tests.bench.record import facts  # noqa: E402

STEPS = (4, 8, 20)
# share of the steps that a rival runs dense first, as ComfyUI's own sparse node does
DENSE_SHARE = 0.2
LOW = {"precision": "int8"}
WIDE = {"precision": "int8", "block_size": "128x64"}
COLD = {"Balanced": {}, "Balanced, int8": LOW}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to sample.

    Args:
        model: model(patcher, steps) -> (patched model, what tells afterwards what it did).
    """

    name: str
    precision: str
    settings: dict
    model: Callable
    forecast: bool = False


def of_preset(preset: str, name: str, changes: dict, level: str = "") -> Contestant:
    config = dataclasses.replace(PRESETS[preset], min_tokens=0, **changes)

    def model(patcher, steps):
        patched, handle = install(patcher, config)
        if level:
            patched = forecast.install(patched, LEVELS[level])
        return patched, lambda: handle.latest().summary()

    precision = config.low_precision or "bf16"
    return Contestant(name, precision, {"preset": preset, **changes}, model, bool(level))


def attended_by(serve) -> Callable:
    """A contestant's `model` whose attention is serve(step, q, k, v, func, heads) -> [B, L, C]."""

    def model(patcher, steps):
        seen = []

        def override(func, q, k, v, heads, *args, **options):
            sigma = float(options["transformer_options"]["sigmas"].flatten()[0])
            if sigma not in seen:
                seen.append(sigma)
            dense = seen.index(sigma) < -(-steps * DENSE_SHARE // 1)
            # cross-attention has keys of its own
            if q.shape[1] != k.shape[1]:
                return func(q, k, v, heads, *args, **options)
            rows = [x.unflatten(-1, (heads, -1)) for x in (q, k, v)]
            return serve(dense, rows).flatten(2)

        patched = patcher.clone()
        options = patched.model_options
        inner = {**options.get("transformer_options", {})}
        patched.model_options = {**options, "transformer_options": inner}
        inner["optimized_attention_override"] = override
        return patched, lambda: f"{len(seen)} steps seen"

    return model


def by_cudnn(rows):
    """[B, L, H, D] by torch's cuDNN attention."""
    q, k, v = (x.transpose(1, 2) for x in rows)
    return torch_cudnn(q, k, v, scale=q.shape[-1] ** -0.5)[0].transpose(1, 2)


def rivals(device) -> list[Contestant]:
    """Of what is installed here."""
    found = [Contestant("ComfyUI's default", "bf16", {}, lambda patcher, _: (patcher, str))]
    probe = torch.zeros(1, 1, 64, 128, device=device, dtype=torch.bfloat16)
    if not cudnn_serves(probe):
        return found
    found.append(
        Contestant("cuDNN dense", "bf16", {}, attended_by(lambda dense, rows: by_cudnn(rows)))
    )
    try:
        import comfy_kitchen as kitchen
    except ImportError:
        return found
    for budget in ({"tau": 1.3}, {"topk_ratio": 0.2}, {"topk_ratio": 0.1}):
        for low in (False, True):

            def serve(dense, rows, budget=budget, low=low):
                if not dense:
                    return kitchen.sol_attn(*rows, **budget)
                return kitchen.int8_attention(*rows) if low else by_cudnn(rows)

            shown = " ".join(f"{name} {value}" for name, value in budget.items())
            steps = "int8" if low else "bf16"
            settings = {**budget, "dense_share": DENSE_SHARE, "dense_steps": steps}
            name = f"comfy-kitchen sol_attn {shown}, dense steps {steps}"
            found.append(Contestant(name, "int8", settings, attended_by(serve)))
    return found


def ours() -> list[Contestant]:
    found = []
    for preset in PRESETS:
        found.append(of_preset(preset, preset, {}))
        if preset != "Paper":
            found.append(of_preset(preset, f"{preset}, int8", LOW))
            found.append(of_preset(preset, f"{preset}, int8, 128x64", WIDE))
    for level in LEVELS:
        found.append(of_preset("Balanced", f"Balanced, int8, Skip Steps {level}", LOW, level))
    return found


class Runs:
    """A model on a device, and runs of it."""

    def __init__(self, options):
        self.options = options
        self.device = comfy.model_management.get_torch_device()
        stack = real_stacks.STACKS[options.model]
        if options.layers:
            settings = {**stack.settings, "num_layers": options.layers}
            stack = dataclasses.replace(stack, settings=settings, layers=options.layers)
        self.stack = stack
        self.shapes = stack.short_shapes() if options.small else stack.shapes
        self.patcher = real_stacks.build(stack, self.device, small=options.small)
        self.text = real_stacks.conditioning(stack, options.small)

    @property
    def tokens(self) -> int:
        frames, height, width = self.shapes[0][2:]
        return frames * (height // 2) * (width // 2)

    def run(self, contestant: Contestant, steps: int, cold: bool = False) -> dict:
        model, told = contestant.model(self.patcher, steps)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        out = comfy.sample.sample(
            model, real_stacks.noise(self.shapes), steps, 1.0, "euler", "simple", self.text,
            self.text, real_stacks.empty(self.shapes), disable_pbar=True, seed=0,
        )  # fmt: skip
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        if not bool(torch.isfinite(out).all()):
            raise RuntimeError(f"{contestant.name}: NaN or infinity in the result.")
        return {
            "name": contestant.name,
            "settings": contestant.settings,
            "model": self.stack.name,
            "layers": self.stack.layers,
            "tokens": self.tokens,
            "precision": contestant.precision,
            "forecast": contestant.forecast,
            "steps": steps,
            "seconds": round(seconds, 3),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
            "cold": cold,
            "composed": False,
            "db": None,
            "told": told(),
        }


def cold_rows(options) -> list[dict]:
    """The very first run with kernels of ours, each in a process that finds none compiled."""
    rows = []
    for name in COLD:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "row.json"
            command = [sys.executable, __file__, "--one", name, "--model", options.model]
            command += ["--layers", str(options.layers), "--steps", "8", "--out", str(out)]
            command += ["--small"] * options.small
            environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder) / "cache")}
            subprocess.run(command, env=environment, check=True)
            rows += json.loads(out.read_text())["rows"]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(real_stacks.STACKS), default="wan")
    parser.add_argument("--layers", type=int, default=4, help="0 takes the stack's own")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--only", nargs="+", help="names of contestants begin with one of these")
    parser.add_argument("--small", action="store_true", help="narrow and short, to try the script")
    parser.add_argument("--cold", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--one", choices=list(COLD), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    result = {"what": "seconds of whole sampler runs, random weights, cfg 1", "rows": [], **facts()}

    def add(row):
        result["rows"].append(row)
        memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:6.2f} GiB "
        cold = ", cold" if row["cold"] else ""
        print(
            f"{row['steps']:3d} steps {row['name'] + cold:55} {row['seconds']:8.2f} s {memory}"
            f"{row['told'][:100]}",
            flush=True,
        )
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    if options.one:
        contestant = of_preset("Balanced", options.one, COLD[options.one])
        add(Runs(options).run(contestant, options.steps[0], cold=True))
        return
    # before the model takes the memory here
    for row in cold_rows(options) if options.cold else []:
        add(row)
    runs = Runs(options)
    for contestant in [*rivals(runs.device), *ours()]:
        if options.only and not contestant.name.startswith(tuple(options.only)):
            continue
        for steps in options.steps:
            if contestant.forecast and steps < LEAST_STEPS:
                continue
            if steps == options.steps[0] or contestant.forecast:
                runs.run(contestant, steps)
            add(runs.run(contestant, steps))


if __name__ == "__main__":
    main()
