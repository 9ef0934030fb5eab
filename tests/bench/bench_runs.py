"""Whole sampler runs, timed as a whole: ComfyUI's default, rivals, and every preset, on random weights.

    python tests/bench/bench_runs.py --out tests/bench/results/runs_h200.json
    python tests/bench/bench_runs.py --layers 40 --runs "Balanced, int8:8" --out runs_40.json
    python tests/bench/bench_runs.py --compose --out runs_50.json

Samples some layers of a model at its real width and length through ComfyUI's sampler, at cfg 1.
Each contestant runs on one layer first, which compiles and is not counted; the node is the same in both
runs, as when a graph is queued again, and has measured which dense attention is fastest. Sequences of any length are
sparse. The first runs of all on a machine, which compile, are `cold`: each in a process with an empty
folder of compiled kernels. Random weights say nothing of quality, so `db` is empty; the lab has it.
Rivals run where they are installed. The result is rewritten after every row. `--compose` makes runs of
50 steps of HunyuanVideo 13B of the measured kinds of steps of a twentieth of its layers instead.
"""

import argparse
import dataclasses
import functools
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

from sparse_attn.backends.choice import choose  # noqa: E402
from sparse_attn.backends.cudnn import cudnn_serves, torch_cudnn  # noqa: E402
from sparse_attn.config import PRESETS  # noqa: E402
from sparse_attn.forecast.plan import LEAST_STEPS, LEVELS  # noqa: E402
from sparse_attn.host import forecast  # noqa: E402
from sparse_attn.host.install import install  # noqa: E402
from sparse_attn.schedule import plan  # noqa: E402
from tests.bench import bench_model, real_stacks  # noqa: E402
from tests.bench.few_steps import flow, forecast_steps, simple, step_names  # noqa: E402
from tests.bench.record import facts  # noqa: E402

STEPS = (4, 8, 20)
# share of the steps that a rival runs dense first, as ComfyUI's own sparse node does
DENSE_SHARE = 0.2
LOW = {"precision": "int8"}
WIDE = {"precision": "int8", "block_size": "128x64"}
COLD = {"Balanced": {}, "Balanced, int8": LOW}
WARM_STEPS = 8
DEFAULT = "ComfyUI's default"
NO_ATTENTION = "attention that returns v"
OWN_INT8 = "AdaSpa's dense attention, int8"
# runs of more steps than this come last where they are slow and their time is that of fewer, times more
FEW = 8
COMPOSED_STEPS, COMPOSED_SHIFT = 50, 7.0
# what is composed, by preset: the precisions
COMPOSED = {"Balanced": ("int8", "bf16"), "Fast": ("int8", "bf16"), "Quality": ("int8",)}


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

    @functools.cache
    def model(patcher):
        patched, handle = install(patcher, config)
        if level:
            patched = forecast.install(patched, LEVELS[level])
        return patched, lambda: handle.latest().summary()

    precision = config.low_precision or "bf16"
    settings = {"preset": preset, **changes}
    return Contestant(name, precision, settings, lambda patcher, _: model(patcher), bool(level))


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


def by_own_int8(rows):
    """The same by the pack's own dense attention in INT8, where it serves."""
    q, k, v = (x.transpose(1, 2) for x in rows)
    backend, why = choose(q, k, v, 64, 64)
    if backend is None or backend.quantised_attention is None:
        raise RuntimeError(f"No INT8 attention: {why}.")
    return backend.quantised_attention(q, k, v, scale=q.shape[-1] ** -0.5)[0].transpose(1, 2)


def bounds() -> list[Contestant]:
    """What no schedule changes: a model without attention, and its fastest dense attention."""
    return [
        Contestant(NO_ATTENTION, "bf16", {}, attended_by(lambda dense, rows: rows[2])),
        Contestant(OWN_INT8, "int8", {}, attended_by(lambda dense, rows: by_own_int8(rows))),
    ]


def rivals(device) -> list[Contestant]:
    """Of what is installed here."""
    found = [Contestant(DEFAULT, "bf16", {}, lambda patcher, _: (patcher, str))]
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
    for preset in ("Balanced", "Fast", "Quality", "Paper"):
        found.append(of_preset(preset, preset, {}))
        if preset != "Paper":
            found.append(of_preset(preset, f"{preset}, int8", LOW))
    for level in LEVELS:
        found.append(of_preset("Balanced", f"Balanced, int8, Skip Steps {level}", LOW, level))
    found += [of_preset(x, f"{x}, int8, 128x64", WIDE) for x in ("Balanced", "Fast", "Quality")]
    return found


def jobs(device, all_steps) -> list[tuple[Contestant, int]]:
    """What is run, the most telling first, since a limit of time may end it."""
    mine, theirs = ours(), rivals(device)
    first = [mine[1], theirs[0], *theirs[2:3], *(x for x in mine if x.forecast), mine[0], *bounds()]
    rest = [x for x in (*mine, *theirs) if x not in first]
    rest.sort(key=lambda x: (x.precision == "bf16", "128x64" in x.name))
    slow = [theirs[0], *(x for x in theirs if x not in first)]
    found = [(x, steps) for x in (*first, *rest) for steps in all_steps]
    found = [(x, steps) for x, steps in found if not x.forecast or steps >= LEAST_STEPS]
    return sorted(found, key=lambda job: job[0] in slow and job[1] > FEW)


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

    def warm_up(self, contestant: Contestant) -> None:
        """Run the first layer alone: its kernels are those of all layers."""
        diffusion = self.patcher.model.diffusion_model
        lists = [
            (n, x) for n, x in diffusion.named_children() if isinstance(x, torch.nn.ModuleList)
        ]
        name, layers = max(lists, key=lambda found: len(found[1]))
        setattr(diffusion, name, layers[:1])
        try:
            self.run(contestant, LEAST_STEPS if contestant.forecast else WARM_STEPS)
        finally:
            setattr(diffusion, name, layers)

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
    for name in options.cold:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "row.json"
            command = [sys.executable, __file__, "--one", name, "--model", options.model]
            command += ["--layers", str(options.layers), "--steps", "8", "--out", str(out)]
            command += ["--small"] * options.small
            environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder) / "cache")}
            subprocess.run(command, env=environment, check=True)
            rows += json.loads(out.read_text())["rows"]
    return rows


def composed_rows(options):
    """Runs of 50 steps of HunyuanVideo 13B: every step takes what one of its kind was measured to."""
    bench = bench_model.ModelRuns(False, options.small, comfy.model_management.get_torch_device())
    bench.steps(bench.patcher, 1, bench.stack.short_shapes())
    row = {
        "model": "HunyuanVideo 13B", "layers": 60, "tokens": None, "steps": COMPOSED_STEPS,
        "peak_gib": None, "cold": False, "composed": True, "db": None, "forecast": False,
    }  # fmt: skip
    for name, seconds in bench.dense().items():
        yield {
            **row, "name": DEFAULT if name == bench_model.DEFAULT else "cuDNN dense",
            "settings": {}, "precision": "bf16",
            "seconds": round(COMPOSED_STEPS * seconds, 1), "told": f"{seconds:.2f} s a step",
        }  # fmt: skip
    sigmas = simple(COMPOSED_STEPS, COMPOSED_SHIFT)
    for preset, precisions in COMPOSED.items():
        config = PRESETS[preset]
        schedule = plan(sigmas, lambda sigma: flow(sigma, COMPOSED_SHIFT), config)
        kept = {
            name: getattr(config, name)
            for name in ("sparsity", "tail", "token_order", "head_adaptive", "query_stride")
        }
        if preset == next(iter(COMPOSED)):
            # compiles what depends on the length
            bench.variant({**kept, "precision": precisions[0]})
        for precision in precisions:
            found = bench.variant({**kept, "precision": precision})
            took = found["step_seconds"]
            for level in ("", *LEVELS):
                skipped = forecast_steps(schedule, LEVELS[level]) if level else frozenset()
                names = [x for i, x in enumerate(step_names(schedule)) if i not in skipped]
                name = preset + (f", {precision}" if precision != "bf16" else "")
                counts = {kind: names.count(kind) for kind in dict.fromkeys(names)}
                yield {
                    **row, "name": name + (f", Skip Steps {level}" if level else ""),
                    "settings": {"preset": preset, "precision": precision}
                    | ({"forecast_steps": len(skipped)} if level else {}),
                    "precision": precision, "tokens": found["tokens"], "forecast": bool(level),
                    "seconds": round(sum(n * took[kind] for kind, n in counts.items()), 1),
                    "step_seconds": {kind: round(seconds, 3) for kind, seconds in took.items()},
                    "told": ", ".join(
                        f"{n} {kind} {took[kind]:.2f} s" for kind, n in counts.items()
                    ),
                }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(real_stacks.STACKS), default="wan")
    parser.add_argument("--layers", type=int, default=4, help="0 takes the stack's own")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--runs", nargs="+", help="these alone, in this order: NAME:STEPS,STEPS")
    parser.add_argument("--small", action="store_true", help="narrow and short, to try the script")
    parser.add_argument("--cold", nargs="*", choices=list(COLD), default=list(COLD))
    parser.add_argument("--compose", action="store_true", help="50 steps of HunyuanVideo instead")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after this long")
    parser.add_argument("--one", choices=list(COLD), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    torch.set_grad_enabled(False)
    result = {"what": "seconds of whole sampler runs, random weights, cfg 1", "rows": [], **facts()}

    def add(row):
        result["rows"].append(row)
        memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:6.2f} GiB "
        cold = ", cold" if row["cold"] else ""
        print(
            f"{row['steps']:3d} steps {row['name'] + cold:55} {row['seconds']:8.2f} s {memory}"
            f"{row['told'][:160]}",
            flush=True,
        )
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    if options.one:
        contestant = of_preset("Balanced", options.one, COLD[options.one])
        add(Runs(options).run(contestant, options.steps[0], cold=True))
        return
    if options.compose:
        for row in composed_rows(options):
            add(row)
        return
    # before the model takes the memory here
    for row in cold_rows(options):
        add(row)
    runs = Runs(options)
    warm = set()
    wanted = jobs(runs.device, options.steps)
    if options.runs:
        known = {contestant.name: contestant for contestant, _ in wanted}
        asked = (word.rsplit(":", 1) for word in options.runs)
        wanted = [(known[name], int(n)) for name, steps in asked for n in steps.split(",")]
    for contestant, steps in wanted:
        if time.perf_counter() - began > options.seconds:
            print(f"No time for {contestant.name}, {steps} steps.", flush=True)
            continue
        try:
            if contestant.name not in warm:
                warm.add(contestant.name)
                runs.warm_up(contestant)
            add(runs.run(contestant, steps))
        except Exception as error:
            # one contestant must not cost the others their turn
            print(f"{contestant.name}, {steps} steps: {error}", flush=True)


if __name__ == "__main__":
    main()
