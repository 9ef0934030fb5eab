"""What longer videos gain: HunyuanVideo 720p from 5 to 24 s, calls and the rest of a step measured.

    python tests/bench/bench_length.py --out tests/bench/results/length_h200.json

Calls are of some of the 24 heads, and their time is taken times as many more; q, k and v are random, with
neighbours alike. The rest of a step, three layers and what lies around them at the full width, is timed
with attention that returns v, and stands for all 60. Runs of 50 steps are composed of both. Whole steps of
these layers with Balanced in INT8, a first search and a sparse one, stand beside what they are composed of.
`--plot` draws the gains of a result instead.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.tools import comfy_inprocess  # noqa: E402

comfy_inprocess.start()

import comfy.model_management  # noqa: E402
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from sparse_attn.backends.choice import choose  # noqa: E402
from sparse_attn.backends.cudnn import cudnn_serves, torch_cudnn  # noqa: E402
from sparse_attn.config import PRESETS  # noqa: E402
from sparse_attn.forecast.plan import LEVELS  # noqa: E402
from sparse_attn.run.dense import OWN, OWN_INT8, DenseChoice  # noqa: E402
from sparse_attn.schedule import plan  # noqa: E402
from sparse_attn.token_layout import TokenLayout  # noqa: E402
from tests.bench import bench_model  # noqa: E402
from tests.bench.few_steps import flow, forecast_steps, simple, step_names  # noqa: E402
from tests.bench.layer_calls import DIM, HEADS, LENGTHS, TEXT, LayerRun, inputs  # noqa: E402
from tests.bench.record import facts, keep  # noqa: E402
from tests.lab.plots import lines  # noqa: E402

LAYERS = 60
ORDER = ("dense_with_lse", "search", "sparse", "search_again", "sparse")
# the paper's at 24 s: sparsity 0.9, searches at 10 and 30 of 50
PAPER = replace(PRESETS["Paper"], sparsity=0.9)
SETTINGS = {
    "Paper at 0.9": PAPER,
    "Balanced": PRESETS["Balanced"],
    "Balanced, int8": replace(PRESETS["Balanced"], precision="int8"),
    "Fast, int8": replace(PRESETS["Fast"], precision="int8"),
    "Paper at 0.9, 128x64": replace(PAPER, block_size="128x64"),
    "Fast": PRESETS["Fast"],
    "no tail at 0.9, 128x64": replace(PAPER, head_adaptive=False, block_size="128x64"),
}
STEPS, SHIFT = 50, 7.0
INT8 = "ours, int8"
NEVER = float("inf")


class Int8WhereItServes(DenseChoice):
    """Measures nothing within a step that is timed."""

    def fastest(self, call, candidates):
        return OWN_INT8 if OWN_INT8 in candidates else OWN


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run, repeats: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def dense_seconds(qkv) -> dict:
    def flash():
        if not cudnn_serves(qkv[0]):
            return torch.nn.functional.scaled_dot_product_attention(*qkv)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*qkv)

    runs = {"flash, ComfyUI's default": flash}
    if cudnn_serves(qkv[0]):
        runs["cuDNN"] = lambda: torch_cudnn(*qkv, scale=DIM**-0.5)
    backend, _ = choose(*qkv, 64, 64)
    if backend is not None:
        runs["ours"] = lambda: backend.attention(*qkv, scale=DIM**-0.5)
        if backend.quantised_attention is not None:
            runs[INT8] = lambda: backend.quantised_attention(*qkv, scale=DIM**-0.5)
    return {name: timed(run, 2) for name, run in runs.items() if run() is not None}


def exact(seconds: dict[str, float]) -> float:
    """Of the fastest exact attention."""
    return min(s for name, s in seconds.items() if name != INT8)


def call_seconds(config, qkv, layout, repeats: int, choice: DenseChoice) -> dict[str, float]:
    """Of every kind of step of `ORDER`."""
    run = LayerRun(replace(config, cache="gpu", min_tokens=0), "DSsSs", qkv, layout, choice)
    found = {}
    for step, name in enumerate(ORDER):
        call = run.enter(step)
        if name == "dense_with_lse":
            # which attention is fastest is measured at the first call of a shape
            call()
        found[name] = timed(call, repeats if name == "sparse" else 1)
    run.end()
    return found


def rest_seconds(bench, frames: int) -> float:
    """A whole step of the whole model without its attention over the video."""

    def override(func, q, k, v, heads, *args, **options):
        if q.shape[-2] <= TEXT:
            return func(q, k, v, heads, *args, **options)
        if options.get("skip_reshape"):
            return v.transpose(1, 2).flatten(2)
        return v

    model = bench.patcher.clone()
    inner = {**model.model_options.get("transformer_options", {})}
    model.model_options = {**model.model_options, "transformer_options": inner}
    inner["optimized_attention_override"] = override
    shape = bench.shapes[0]
    return bench.steps(model, 2, ((*shape[:2], frames, *shape[3:]),))[1]


def whole_steps(bench, frames: int) -> dict[str, float]:
    """Whole steps of the whole model through the node: a first search and a sparse step."""
    config = replace(SETTINGS["Balanced, int8"], warmup=0.0, search_points=(), min_tokens=0)
    model, handle = bench.install(bench.patcher, config)
    handle.dense_choice = Int8WhereItServes("auto")
    shape = bench.shapes[0]
    search, *_, sparse = bench.steps(model, 3, ((*shape[:2], frames, *shape[3:]),))
    return {"search": round(search, 3), "sparse": round(sparse, 3)}


def runs_of(config, calls: dict, rest: float, times: float) -> dict[str, float]:
    """Seconds of 50 steps, without and with Skip Steps."""
    schedule = plan(simple(STEPS, SHIFT), lambda sigma: flow(sigma, SHIFT), config)
    names, found = step_names(schedule), {}
    for level in ("", *LEVELS):
        skipped = forecast_steps(schedule, LEVELS[level]) if level else ()
        found[level or "all steps"] = round(
            sum(
                rest + LAYERS * times * calls[name]
                for step, name in enumerate(names)
                if step not in skipped
            ),
            1,
        )
    return found


def gains(result: dict) -> dict[str, list[tuple[float, float]]]:
    """By setting, (thousands of tokens, times as fast as the fastest dense run)."""
    curves: dict[str, list] = {}
    for entry in result["lengths"].values():
        best, tokens = exact(entry["dense_runs_s"]), entry["tokens"] / 1000
        for name, found in entry["settings"].items():
            for level, seconds in found["runs_s"].items():
                if level == "careful" or (level == "fast" and "int8" not in name):
                    continue
                shown = name + (", Skip Steps fast" if level == "fast" else "")
                curves.setdefault(shown, []).append((tokens, best / seconds))
    return curves


def plot(result: dict, path: Path) -> None:
    title = "a run of 50 steps over the fastest dense one (HunyuanVideo 720p, composed; H200)"
    lines(gains(result), "thousands of tokens", "times as fast", title, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--whole", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--small", action="store_true", help="a few tokens, to try the script")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no setting after this")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, metavar="SVG", help="of the result in OUT, instead")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.out.read_text()), options.plot)
        return
    torch.set_grad_enabled(False)
    began, device = time.perf_counter(), comfy.model_management.get_torch_device()
    bench = bench_model.ModelRuns(False, options.small, device)
    result = {
        "what": "calls in ms, of the measured heads; runs of 50 steps of HunyuanVideo 13B, composed, in s",
        "heads_measured": options.heads, "heads": HEADS, "layers": LAYERS, "lengths": {},
        **facts(),
    }  # fmt: skip
    times = HEADS / options.heads
    warm, choice = set(), DenseChoice("auto")
    for length in options.lengths:
        frames = LENGTHS[length] // (16 if options.small else 1)
        height, width = (4, 8) if options.small else (45, 80)
        layout = TokenLayout(0, frames, height, width, TEXT)
        rest = rest_seconds(bench, frames)
        qkv = inputs(layout.tokens, options.heads, device)
        dense = dense_seconds(qkv)
        entry = result["lengths"][length] = {
            "tokens": layout.tokens, "rest_of_a_step_s": round(rest, 3),
            "dense_ms": {name: round(1e3 * s, 2) for name, s in dense.items()},
            "dense_runs_s": {
                name: round(STEPS * (rest + LAYERS * times * s), 1) for name, s in dense.items()
            },
            "settings": {},
        }  # fmt: skip
        print(length, entry, flush=True)
        for name in options.settings:
            if time.perf_counter() - began > options.seconds:
                print(f"No time for {name}.", flush=True)
                continue
            if name not in warm:
                warm.add(name)
                call_seconds(SETTINGS[name], qkv, layout, 1, choice)
            calls = call_seconds(SETTINGS[name], qkv, layout, 3, choice)
            # a plainly dense step is left to the fastest
            low = "int8" in name
            calls["dense"] = min(exact(dense), dense.get(INT8, NEVER) if low else NEVER)
            runs = runs_of(SETTINGS[name], calls, rest, times)
            entry["settings"][name] = {
                "ms": {kind: round(1e3 * s, 2) for kind, s in calls.items()}, "runs_s": runs,
            }  # fmt: skip
            best = exact(entry["dense_runs_s"])
            default = entry["dense_runs_s"]["flash, ComfyUI's default"]
            over = {k: f"{best / s:.2f}x, {default / s:.2f}x default" for k, s in runs.items()}
            print(" ", name, entry["settings"][name]["ms"], over, flush=True)
            keep(options.out, result)
        del qkv
        if options.whole and entry["settings"]:
            entry["whole_steps_s"] = whole_steps(bench, frames)
            print(" ", entry["whole_steps_s"], flush=True)
            keep(options.out, result)


if __name__ == "__main__":
    main()
