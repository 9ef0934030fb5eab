"""What the first run on a machine loses against the next one, with kernels that compile in the background.

    python tests/bench/bench_first_use.py --out first_use.json
    python tests/bench/bench_first_use.py --dynamic-vram --out first_use.json
    python tests/bench/bench_first_use.py --workers 0 --wait 0 --out first_use.json

Two layers of Wan 2.2 14B at real width and length, 8 steps, Balanced in eight bits, through ComfyUI's
sampler: a dense step, then what the node does when it executes, a wait as for a text encoder, and two
runs. Needs ComfyUI at COMFYUI_PATH. Triton's cache is a new folder.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.tools import comfy_inprocess  # noqa: E402

if "--dynamic-vram" in sys.argv:
    from comfy_aimdo import control

    control.init()
comfy_inprocess.start()

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import torch  # noqa: E402

from sparse_attn.config import PRESETS  # noqa: E402
from sparse_attn.host import compiling  # noqa: E402
from sparse_attn.host.install import install  # noqa: E402
from tests.bench import real_stacks  # noqa: E402
from tests.bench.record import facts, keep  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=4, help="most processes that compile")
    parser.add_argument("--wait", type=float, default=20.0, help="seconds before the first step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dynamic-vram", action="store_true", help="as ComfyUI pages weights")
    parser.add_argument("--small", action="store_true", help="narrow and short, to try the script")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go as JSON")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    device = comfy.model_management.get_torch_device()
    stack = real_stacks.STACKS["wan"]
    patcher = real_stacks.build(stack, device, small=options.small)
    if options.dynamic_vram:
        patcher = real_stacks.paged(patcher)
    shapes = stack.short_shapes() if options.small else stack.shapes
    text = real_stacks.conditioning(stack, options.small)
    config = dataclasses.replace(PRESETS["Balanced"], min_tokens=0, precision="int8")

    def sample(model, steps) -> tuple[float, list[float]]:
        """Seconds of a run, and of every step."""
        began, ends = time.perf_counter(), []

        def ended(*_):
            if device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter() - began)

        comfy.sample.sample(
            model, real_stacks.noise(shapes), steps, 1.0, "euler", "simple", text, text,
            real_stacks.empty(shapes), disable_pbar=True, seed=0, callback=ended,
        )  # fmt: skip
        ended()
        steps = [round(b - a, 2) for a, b in itertools.pairwise([0.0, *ends[:-1]])]
        return ends[-1], steps

    # what the host loads by itself
    sample(patcher, 1)
    compiling.MOST_WORKERS = options.workers
    began = time.perf_counter()
    compiling.compile_ahead(patcher, config, "1")
    model, handle = install(patcher, config, "1")
    execute = time.perf_counter() - began
    print(f"the node has executed; the runs begin in {options.wait:g} s", flush=True)
    time.sleep(options.wait)
    done = [list(compiling.COMPILING._kernels.values()).count(compiling.DONE)]
    first, first_steps = sample(model, options.steps)
    told = handle.latest()
    done.append(list(compiling.COMPILING._kernels.values()).count(compiling.DONE))
    second, second_steps = sample(install(patcher, config, "1")[0], options.steps)
    result = {
        **facts(), "cores": os.cpu_count(), "workers": min(options.workers, compiling.workers()),
        "dynamic_vram": options.dynamic_vram, "kernels_before_and_after": done,
        "wait": options.wait, "node_seconds": round(execute, 2), "first": round(first, 2),
        "second": round(second, 2), "lost": round(first - second, 2),
        "first_steps": first_steps, "second_steps": second_steps,
        "told": told.summary(), "warnings": [str(x) for x in told.warnings],
    }  # fmt: skip
    keep(options.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        main()
