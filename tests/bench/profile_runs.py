"""Where the seconds of a run go: the kernels of every step by what they do, and the gaps between them.

    python tests/bench/profile_runs.py --out results.json

Samples two layers of Wan 2.2 14B at 720p with torch's profiler, after a run that compiles, waiting for the GPU
before and after every step. Milliseconds are of these layers and what lies around them.
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.tools import comfy_inprocess  # noqa: E402

comfy_inprocess.start()

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

from tests.bench import bench_runs  # noqa: E402
from tests.bench.record import facts, keep  # noqa: E402

RUNS = (("Balanced, int8", 8), (bench_runs.DEFAULT, 2))
# what a kernel does, by its name; the first that fits
GROUPS = {
    "attention": r"hopper_(quantised_)?attention|_attention_kernel|flash_fwd|sdpa",
    "masses": r"masses_kernel",
    "quantising": r"^_(rows|values|sums|finish)_kernel",
    "permuting": r"^_permute_kernel",
    "orders": r"^_(direction|along|sort|features)_kernel|radix_sort|gemm_f32f32",
    "scores and choice": r"^_(scores|deviation|row_wise_top_k|unpack_mask)_kernel",
    "linear layers": r"nvjet|xmma|gemm",
}
OTHER = "elementwise, norms and copies"


def group_of(kernel: str) -> str:
    return next((name for name, words in GROUPS.items() if re.search(words, kernel)), OTHER)


def profiled(runs, contestant, steps: int) -> list[dict]:
    """Of every step: ms by group, ms in which no kernel ran, and how many kernels."""
    marks = []

    def enter(*_):
        torch.cuda.synchronize()
        marks.append(record_function(f"STEP {len(marks)}"))
        marks[-1].__enter__()

    def leave(*_):
        torch.cuda.synchronize()
        marks[-1].__exit__(None, None, None)

    model = runs.patcher.model.diffusion_model
    hooks = model.register_forward_pre_hook(enter), model.register_forward_hook(leave)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        runs.run(contestant, steps)
    for hook in hooks:
        hook.remove()
    spans, kernels = {}, []
    for event in found.profiler.kineto_results.events():
        begin, took, name = event.start_ns() / 1e6, event.duration_ns() / 1e6, event.name()
        on_gpu = str(event.device_type()).endswith("CUDA")
        if name.startswith("STEP "):
            if not on_gpu:
                spans[int(name[5:])] = begin, begin + took
        elif on_gpu:
            kernels.append((begin, begin + took, name))
    return [step_of(kernels, *spans[step]) for step in sorted(spans)]


def step_of(kernels: list[tuple[float, float, str]], begin: float, end: float) -> dict:
    groups, idle, until, count = defaultdict(float), 0.0, begin, 0
    for first, last, name in sorted(kernels):
        if begin <= first <= end:
            groups[group_of(name)] += last - first
            idle, until, count = idle + max(0.0, first - until), max(until, last), count + 1
    return {
        "ms": round(end - begin, 2), "idle_ms": round(idle, 2), "kernels": count,
        "by_group_ms": {name: round(ms, 2) for name, ms in sorted(groups.items())},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.model, options.small = "wan", False
    torch.set_grad_enabled(False)
    runs = bench_runs.Runs(options)
    known = {x.name: x for x in (*bench_runs.ours(), *bench_runs.rivals(runs.device))}
    result = {"what": __doc__.splitlines()[0], "layers": options.layers, "runs": {}, **facts()}
    for name, steps in RUNS:
        runs.warm_up(known[name])
        runs.run(known[name], steps)
        result["runs"][f"{name}, {steps} steps"] = profiled(runs, known[name], steps)
        keep(options.out, result)
        for number, step in enumerate(result["runs"][f"{name}, {steps} steps"], 1):
            print(name, number, step, flush=True)


if __name__ == "__main__":
    main()
