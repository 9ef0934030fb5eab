"""The peak of a run's GPU memory above that of ComfyUI's default, and whether it passes under a cap.

    python tests/bench/bench_peak.py --out peak.json
    python tests/bench/bench_peak.py --models wan --layers all --steps 3 --out peak.json
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python tests/bench/bench_peak.py --cap 12 --out peak.json

Layers of a model at real width and length through ComfyUI's sampler, weights on the GPU: two steps by
ComfyUI's default, and a dense step, a search, a sparse step, a search again and a sparse step of ours. GiB;
the cap is of 10^9 bytes.
"""

import argparse
import dataclasses
import gc
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.tools import comfy_inprocess  # noqa: E402

comfy_inprocess.start()

import comfy.model_management  # noqa: E402
import torch  # noqa: E402

from sparse_attn.config import PRESETS  # noqa: E402
from tests.bench.real_stacks import STACKS  # noqa: E402
from tests.bench.record import facts, keep  # noqa: E402
from tests.bench.stack_runs import StackRuns  # noqa: E402

GIB = 2**30
# how many layers of which kind
LAYERS = {
    "wan": {"2": {}, "4": {"num_layers": 4}, "all": {"num_layers": 40}},
    "hunyuan": {
        "2": {}, "4": {"depth": 2, "depth_single_blocks": 2},
        "all": {"depth": 20, "depth_single_blocks": 40},
    },
}  # fmt: skip
BASE = dataclasses.replace(
    PRESETS["Balanced"], min_tokens=0, cache="gpu", search_gap=0, search_points=(0.6,), warmup=0.13
)
SETTINGS = {"default": None, "bf16": BASE, "int8": dataclasses.replace(BASE, precision="int8")}


def row_of(runs: StackRuns, setting: str, steps: int) -> dict:
    """A run; `above` is the peak of every step above what lay there before, weights above all."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    config, model, handle = SETTINGS[setting], runs.patcher, None
    if config is not None:
        model, handle = runs.install(runs.patcher, config)
    row = {"setting": setting, "before": round(before / GIB, 3)}
    try:
        _, meter = runs.sample(model, 2 if config is None else steps)
    except torch.OutOfMemoryError as error:
        return {**row, "passes": False, "why": str(error)[:160]}
    row |= {"passes": True, "above": [round((peak - before) / GIB, 3) for peak in meter.peaks]}
    row["reserved"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    if handle is not None:
        row["steps"] = [kind.value for kind in handle.latest().schedule.kinds]
        held = handle.latest().memory
        row["held"] = round(held.held_bytes / GIB, 3)
        row["as_predicted"] = held.held_bytes == held.predicted_bytes
        row["warnings"] = handle.latest().warnings
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--layers", choices=("2", "4", "all"), default="4")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=5, help="of ours")
    parser.add_argument("--small", action="store_true", help="narrow and short, to try the script")
    parser.add_argument("--cap", type=float, help="GB that this process may take")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go as JSON")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    device = comfy.model_management.get_torch_device()
    if options.cap:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap * 1e9 / whole, device)
    result = {**facts(), "cap": options.cap, "rows": []}
    for name in options.models:
        stack = STACKS[name]
        settings = {**stack.settings, **LAYERS[name][options.layers]}
        runs = StackRuns(dataclasses.replace(stack, settings=settings), options.small, device)
        for setting in options.settings:
            row = {"model": name, "layers": options.layers, **row_of(runs, setting, options.steps)}
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            keep(options.out, result)
        del runs


if __name__ == "__main__":
    main()
