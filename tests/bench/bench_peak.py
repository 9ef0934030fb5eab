"""The peak of a run's GPU memory above that of ComfyUI's default, and whether it passes under a cap.

    python tests/bench/bench_peak.py --out peak.json
    python tests/bench/bench_peak.py --models wan --layers all --steps 3 --out peak.json
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python tests/bench/bench_peak.py --cap 12 --out peak.json
    python tests/bench/bench_peak.py --cap 16 --layers all --offload --steps 3 --out peak.json

Layers of a model at real width and length through ComfyUI's sampler, weights on the GPU: two steps by
ComfyUI's default, and a dense step, a search, a sparse step, a search again and a sparse step of ours. GiB;
the cap is of 10^9 bytes. Offloaded weights lie on the CPU, and ComfyUI loads as many as the cap has room for.
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
from tests.bench import real_stacks  # noqa: E402
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


def limit(device, cap: float):
    """Let this process take `cap` bytes of the GPU, and ComfyUI plan with them."""
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(cap / whole, device)
    free_of = comfy.model_management.get_free_memory

    def free(dev=None, torch_free_too=False):
        if dev is not None and dev.type == "cpu":
            return free_of(dev, torch_free_too)
        held = torch.cuda.memory_allocated(device)
        beside = torch.cuda.memory_reserved(device) - held
        return (cap - held, beside) if torch_free_too else cap - held

    comfy.model_management.get_free_memory = free


def row_of(runs: StackRuns, setting: str, steps: int) -> dict:
    """A run; `above` is the peak of every step above what lay there before, weights above all."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    config, model, handle = SETTINGS[setting], runs.patcher, None
    if config is not None:
        model, handle = runs.install(runs.patcher, config)
    row = {"setting": setting, "before": round(before / GIB, 3)}
    weights = model.model_size()
    try:
        _, meter = runs.sample(model, 2 if config is None else steps)
    except torch.OutOfMemoryError as error:
        return {**row, "passes": False, "why": str(error)[:160]}
    row |= {"passes": True, "above": [round((peak - before) / GIB, 3) for peak in meter.peaks]}
    row["weights"] = round(weights / GIB, 2)
    row["weights_on_gpu"] = round(model.loaded_size() / GIB, 2)
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
    parser.add_argument("--offload", action="store_true", help="one model, under --cap")
    parser.add_argument("--layers", choices=("2", "4", "all"), default="4")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=5, help="of ours")
    parser.add_argument("--small", action="store_true", help="narrow and short, to try the script")
    parser.add_argument("--cap", type=float, help="GB that this process may take")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go as JSON")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    device = comfy.model_management.get_torch_device()
    if options.cap and not options.offload:
        limit(device, options.cap * 1e9)
    result = {**facts(), "cap": options.cap, "rows": []}
    for name in options.models:
        stack = real_stacks.STACKS[name]
        settings = {**stack.settings, **LAYERS[name][options.layers]}
        runs = StackRuns(dataclasses.replace(stack, settings=settings), options.small, device)
        if options.offload:
            runs.patcher = real_stacks.offloaded(runs.patcher)
            torch.cuda.empty_cache()
            limit(device, options.cap * 1e9)
        for setting in options.settings:
            row = {"model": name, "layers": options.layers, **row_of(runs, setting, options.steps)}
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            keep(options.out, result)
        del runs


if __name__ == "__main__":
    main()
