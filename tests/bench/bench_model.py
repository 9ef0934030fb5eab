"""A run of ComfyUI's own HunyuanVideo 13B, composed of measured steps, on random weights.

    python tests/bench/bench_model.py --out results.json

Samples a twentieth of the layers (one double, two single blocks) at full width and length, through
the node's patch and ComfyUI's sampler, and times every kind of step. A whole model's step is what
lies outside the layers plus twenty times the layers; `--whole` builds all 60 instead. Random weights
say nothing of quality.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.tools import comfy_inprocess

comfy_inprocess.start()

import comfy.model_management  # noqa: E402
import torch  # noqa: E402

from sparse_attn.config import AdaSpaConfig  # noqa: E402
from sparse_attn.run.dense import DenseChoice  # noqa: E402
from tests.bench.real_stacks import STACKS  # noqa: E402
from tests.bench.record import facts  # noqa: E402
from tests.bench.stack_runs import StackRuns  # noqa: E402

DOUBLE, SINGLE = 20, 40
# one for measuring which dense attention is fastest, and one that is measured
ORDER = (
    "first", "dense", "dense_with_lse", "search", "sparse", "sparse", "search_again", "sparse"
)  # fmt: skip
BASE = AdaSpaConfig(
    sparsity=0.8, warmup=3 / 8, search_points=(6 / 8,), min_tokens=0, cache="gpu", tail="none"
)
VARIANTS = {
    "bf16, 64x64": {},
    "bf16, 128x64": {"block_size": "128x64"},
    "bf16, 128x64, pooled tail": {"block_size": "128x64", "tail": "pooled"},
    "int8, 128x64": {"block_size": "128x64", "precision": "int8"},
    "int8, 128x64, pooled tail": {"block_size": "128x64", "precision": "int8", "tail": "pooled"},
}
# 0-9 dense, 10 search, 11-29 sparse, 30 search from the cached LSE, 31-49 sparse
RUN = {"dense": 9, "dense_with_lse": 1, "search": 1, "sparse": 38, "search_again": 1}
CUDNN = "dense, cuDNN"
DEFAULT = "dense, ComfyUI's default"


class CudnnWherePresent(DenseChoice):
    def fastest(self, call, candidates):
        return "cudnn" if "cudnn" in candidates else "host"


class LayerClock:
    """Seconds that every model call spends between its first and its last layer."""

    def __init__(self, diffusion, device):
        self.device, self.seconds = device, []
        diffusion.double_blocks[0].register_forward_pre_hook(self._begin)
        diffusion.single_blocks[-1].register_forward_hook(self._end)

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _begin(self, *_):
        self.began = self._now()

    def _end(self, *_):
        self.seconds.append(self._now() - self.began)


class ModelRuns(StackRuns):
    """What is measured on part of the model, or all of it."""

    def __init__(self, whole: bool, small: bool, device):
        self.times = 1 if whole else DOUBLE
        double, single = DOUBLE // self.times, SINGLE // self.times
        stack = STACKS["hunyuan"]
        settings = {**stack.settings, "depth": double, "depth_single_blocks": single}
        stack = replace(stack, settings=settings, layers=double + single)
        super().__init__(stack, small, device)
        self.clock = LayerClock(self.patcher.model.diffusion_model, device)

    def steps(self, model, steps, shapes=None, **options) -> list[float]:
        """Seconds of every step of the whole model."""
        self.clock.seconds = []
        _, meter = self.sample(model, steps, shapes, **options)
        layers = self.clock.seconds
        return [all_ + (self.times - 1) * x for all_, x in zip(meter.seconds, layers, strict=True)]

    def dense(self) -> dict:
        """A step with ComfyUI's default attention, and one with cuDNN's."""
        model, handle = self.install(self.patcher, BASE)
        handle.dense_choice = CudnnWherePresent("auto")
        return {
            DEFAULT: self.steps(self.patcher, 2)[1],
            CUDNN: self.steps(model, len(ORDER), last_step=2)[1],
        }

    def variant(self, options) -> dict:
        config = replace(BASE, **options)
        short, _ = self.install(self.patcher, config)
        # compiles the kernels
        self.steps(short, len(ORDER), self.stack.short_shapes())
        model, handle = self.install(self.patcher, config)
        steps = self.steps(model, len(ORDER))
        statistics = handle.latest()
        self.check(statistics, len(ORDER), self.shapes)
        found = {}
        for kind, seconds in zip(ORDER, steps, strict=True):
            found.setdefault(kind, []).append(seconds)
        return {
            "step_seconds": {kind: mean(seconds) for kind, seconds in found.items()},
            "tokens": statistics.tokens,
            "density": statistics.patterns.density(),
            "dense_choice": statistics.dense_choice,
            "low_precision_calls": statistics.low_precision.calls,
            "not_low_precision": dict(statistics.low_precision.declined),
            "timing": {
                kind: mean(seconds)
                for kind in ("dense", "sparse", "search", "search_dense", "search_again")
                if (seconds := getattr(statistics.timing, kind, None))
            },
        }


def compose(step_seconds: dict, dense_steps: dict, baselines: dict) -> dict:
    """A run of 50 steps whose dense ones, up to the search, are those of `dense_steps`."""
    took = sum(
        count * (dense_steps if kind.startswith("dense") else step_seconds)[kind]
        for kind, count in RUN.items()
    )
    runs = {name: sum(RUN.values()) * seconds for name, seconds in baselines.items()}
    return {
        "seconds": took,
        "over_cudnn": runs[CUDNN] / took,
        "over_default": runs[DEFAULT] / took,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="narrow and short, to try the script")
    parser.add_argument("--whole", action="store_true", help="build and measure all 60 layers")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    bench = ModelRuns(options.whole, options.small, comfy.model_management.get_torch_device())
    # what does not depend on length
    bench.steps(bench.patcher, 1, bench.stack.short_shapes())
    result = {
        "what": "seconds of HunyuanVideo 13B's steps, random weights, density 0.2",
        "layers_measured": bench.stack.layers,
        "dense_step_seconds": bench.dense(),
        "run_of_50": RUN,
        "variants": {},
        "runs": {},
        **facts(),
    }
    baselines = result["dense_step_seconds"]
    print({name: round(seconds, 2) for name, seconds in baselines.items()}, flush=True)
    exact = None
    for name in options.variants:
        found = result["variants"][name] = bench.variant(VARIANTS[name])
        found["errors"], bench.errors = bench.errors, []
        steps = found["step_seconds"]
        exact = exact or steps
        result["runs"][name] = compose(steps, steps, baselines)
        if "precision" in VARIANTS[name]:
            result["runs"][f"{name}, dense steps exact"] = compose(steps, exact, baselines)
        shown = " ".join(f"{kind} {seconds:.2f}" for kind, seconds in steps.items())
        print(f"{name}: {shown}; {found['dense_choice']}; {found['errors']}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{'run of 50 steps':48}{'s':>8}{'x cuDNN':>9}{'x default':>11}")
    for name, run in result["runs"].items():
        print(f"{name:48}{run['seconds']:8.0f}{run['over_cudnn']:9.2f}{run['over_default']:11.2f}")


if __name__ == "__main__":
    main()
