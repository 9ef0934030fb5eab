"""Steps of a few real-size layers of six families, through the node's patch.

    python tests/bench/bench_families.py --out results.json

ComfyUI's own classes and sampler, random weights, real lengths. Then, on Wan: a pattern carried from
one expert to the other, a pattern file, and a cache on the CPU. Random weights say nothing of quality.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.tools import comfy_inprocess

comfy_inprocess.start()

import comfy.model_management  # noqa: E402
import torch  # noqa: E402

from sparse_attn.config import AdaSpaConfig  # noqa: E402
from sparse_attn.host import pattern_requests as patterns  # noqa: E402
from sparse_attn.patterns import file as pattern_files  # noqa: E402
from tests.bench.real_stacks import STACKS  # noqa: E402
from tests.bench.record import facts  # noqa: E402
from tests.bench.stack_runs import StackRuns, relative  # noqa: E402

# an all-kept step of bf16 kernels may differ from the host's by this much
ROUNDING = 0.03
BASE = AdaSpaConfig(sparsity=0.8, warmup=0.0, min_tokens=0, cache="gpu")
# dense (and measuring who is fastest), dense, dense with LSE, search, sparse
WARM = replace(BASE, warmup=3 / 5)
# how the second expert is made
EXPERTS = {
    "weights 5 % apart": {"shift": 0.05},
    "weights 20 % apart": {"shift": 0.2},
    "unrelated weights": {"seed": 7},
}


class Bench(StackRuns):
    """What is measured on one stack."""

    def steps(self) -> dict:
        """Seconds of every kind of step, and what the sparse ones hold."""
        stack = self.stack
        short = stack.short_shapes()
        # compiles the kernels
        self.sample(self.patcher, 1, short)
        self.sparse(WARM, 5, short)
        self.sparse(BASE, 2, short)

        _, host = self.sample(self.patcher, 2)
        _, kept_all, _ = self.sparse(replace(BASE, sparsity=0.0), 2)
        _, fifth, at_fifth = self.sparse(BASE, 2)
        _, tenth, at_tenth = self.sparse(replace(BASE, sparsity=0.9), 2)
        _, whole, in_whole = self.sparse(WARM, 5)
        error = relative(kept_all.change, host.change)
        if not error < ROUNDING:
            self.errors.append(f"keeping all blocks differs from dense by {error:.2e}")
        seconds = {
            "host_default": host.seconds[1],
            "dense": whole.seconds[1],
            "dense_with_lse": whole.seconds[2],
            "search": whole.seconds[3],
            "search_without_lse": fifth.seconds[0],
            "all_kept": kept_all.seconds[1],
            "sparse_0.2": whole.seconds[4],
            "sparse_0.1": tenth.seconds[1],
        }
        return {
            "video": stack.video,
            "tokens": in_whole.tokens,
            "layout": in_whole.layout,
            "heads": stack.heads,
            "head_dim": stack.head_dim,
            "block_size": BASE.block_size,
            "layers": stack.layers,
            "of_layers": stack.of_layers,
            "seconds": seconds,
            "speed_up_of_a_step": {
                name: seconds["dense"] / seconds[name] for name in ("sparse_0.2", "sparse_0.1")
            },
            "relative_difference_from_dense": {
                "all_kept": error,
                "sparse_0.2": relative(fifth.change, host.change),
                "sparse_0.1": relative(tenth.change, host.change),
            },
            "peak_bytes": {
                "host_default": host.peaks[1:],
                "dense_with_lse": whole.peaks[2:3],
                "search": whole.peaks[3:4],
                "search_without_lse": fifth.peaks[:1],
                "sparse_0.2": whole.peaks[4:],
            },
            "taken_per_step": stack.layers,
            "declined_per_step": stack.declined_calls(self.shapes, in_whole.tokens),
            "statistics": {
                "0.2": in_whole.as_dict(),
                "0.2 without warm-up": at_fifth.as_dict(),
                "0.1": at_tenth.as_dict(),
            },
        }

    def experts(self) -> dict:
        """The second expert begins with the first one's pattern: one like it, one that is not."""
        # warms up what a carried pattern runs beside the kernels
        self.pair(self.patcher, self.stack.short_shapes())
        result = {}
        for name, options in EXPERTS.items():
            result[name], first = self.pair(self.build(**options), self.shapes)
        return {"experts": result, "file": self.file(first.pattern)}

    def pair(self, low_expert, shapes):
        """Two of 20 steps with either; returns what happened and the handle of the first."""
        half, rest = {"last_step": 2}, {"start_step": 2, "last_step": 4}
        high, handle = self.install(self.patcher, BASE, part="high noise")
        low, _ = self.install(low_expert, BASE, first=handle, part="low noise")
        latent, first = self.sample(high, 20, shapes, **half)
        _, second = self.sample(low, 20, shapes, latent, **rest)
        found, used = handle.runs[-2], handle.latest()
        alone, own = self.install(low_expert, BASE)
        _, searched = self.sample(alone, 20, shapes, latent, **rest)
        self.errors += used.warnings
        if used.carried + sum(used.not_carried.values()) != self.stack.layers:
            self.errors.append("layers neither carried nor searched")
        return {
            "high_noise_steps": first.seconds,
            "low_noise_steps": second.seconds,
            "low_noise_steps_with_its_own_search": searched.seconds,
            "recall_check_seconds_of_a_layer": used.timing.carry,
            "search_seconds_of_a_layer": own.latest().timing.search,
            "carried": used.carried,
            "not_carried": dict(used.not_carried),
            "recall_when_found": found.recall()[0],
            "recall_of_used_patterns": used.recall()[0],
            "recall_is": used.recall_label() or "exact",
            "recall_of_its_own_search": own.latest().patterns.recall()[0],
        }, handle

    def file(self, few) -> dict:
        """Save and load the pattern of as many layers as the whole model has, and sample with it."""
        names, layers = list(few.layers), list(few.layers.values())
        many = {}
        for n in range(self.stack.of_layers):
            layer = layers[n % len(layers)]
            name = names[0]._replace(block_index=n)
            many[name] = replace(layer, bits=layer.bits.clone())
        with tempfile.TemporaryDirectory() as folder:
            path, pattern = Path(folder) / "pattern.safetensors", replace(few, layers=many)
            saved = clock(lambda: pattern_files.save(pattern, path.parent, path.stem))
            size = path.stat().st_size
            read = {}
            loaded = clock(lambda: read.update(pattern=pattern_files.load(path)))
        model, socket = self.install(self.patcher, BASE)
        model = patterns.begin_with(model, socket, read["pattern"])
        _, meter = self.sample(model, 20, last_step=2)
        run = socket.latest()
        if run.reuse.masks != self.stack.layers:
            self.errors.append(
                f"loaded pattern: {run.reuse.masks} masks used, {dict(run.reuse.refused)}"
            )
        return {
            "layers": len(many),
            "bytes": size,
            "save_seconds": saved,
            "load_seconds": loaded,
            "steps": meter.seconds,
            "carried": run.reuse.masks,
            "recall_when_found": mean(run.reuse.recall),
            "recall_here_sampled": run.patterns.recall()[0],
        }

    def caches(self) -> dict:
        """Masks and LSE on the GPU and in pinned CPU memory: search, sparse, search again, sparse."""
        config = replace(BASE, search_points=(0.5,))
        self.sparse(config, 4, self.stack.short_shapes())
        result, outs = {}, {}
        for place in ("gpu", "cpu", "cpu", "gpu"):
            out, meter, run = self.sparse(replace(config, cache=place), 4)
            outs.setdefault(place, []).append(out)
            result.setdefault(place, []).append(meter.seconds)
            result[f"{place}_held_bytes"] = run.memory.held_bytes
            if self.device.type == "cuda" and run.memory.place != place:
                self.errors.append(f"the cache is on the {run.memory.place}, not on the {place}")
        (gpu, gpu_again), (cpu, cpu_again) = outs["gpu"], outs["cpu"]
        result["same_video"] = {
            "gpu, again": torch.equal(gpu, gpu_again),
            "cpu, again": torch.equal(cpu, cpu_again),
            "gpu and cpu": torch.equal(gpu, cpu),
        }
        if not all(result["same_video"].values()):
            self.errors.append("the videos of one seed differ")
        return result


def clock(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def row(name, entry) -> str:
    seconds, run = entry["seconds"], entry["statistics"]["0.2"]
    times = " ".join(f"{seconds[kind]:8.3f}" for kind in seconds)
    gaps = entry["relative_difference_from_dense"]
    return (
        f"{name:10} {entry['tokens']:7} {times}  "
        f"{run['dense_call_seconds'] * 1e3:6.1f}/{run['sparse_call_seconds'] * 1e3:6.1f} ms  "
        f"density {run['density']:.3f} recall {run['recall']:.2f}  all-kept {gaps['all_kept']:.1e} "
        f"sparse {gaps['sparse_0.2']:.1e}  held {run['held_bytes'] / 2**20:.1f} of "
        f"{run['predicted_bytes'] / 2**20:.1f} MiB  {len(entry['errors'])} errors"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="narrow and short, to try the script")
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--skip", nargs="*", choices=("steps", "experts", "caches"), default=())
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after this long")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    torch.set_grad_enabled(False)
    device = comfy.model_management.get_torch_device()
    result = {"what": "a few layers of ComfyUI's video models, random weights", "stacks": {}}
    if options.out and options.out.exists():
        # parts can be measured one by one
        result = json.loads(options.out.read_text())
    parts = [(name, "steps") for name in options.stacks if "steps" not in options.skip]
    # the patterns and caches of one model stand for all
    extra = [("wan", part) for part in ("experts", "caches") if part not in options.skip]
    if "wan" in options.stacks:
        at = parts.index(("wan", "steps")) if ("wan", "steps") in parts else 0
        parts[at:at] = extra
    bench = None
    for name, part in parts:
        if time.perf_counter() - began > options.seconds:
            print(f"{name} {part}: no time left", flush=True)
            continue
        begun = time.perf_counter()
        entry = {}
        try:
            if bench is None or bench.stack is not STACKS[name]:
                bench = None
                release()
                bench = Bench(STACKS[name], options.small, device)
            entry = getattr(bench, part)()
            entry["errors"], bench.errors = bench.errors, []
        except Exception:
            entry["errors"] = [traceback.format_exc(limit=4)]
        took = time.perf_counter() - begun
        print(f"{name} {part}: {took:.1f} s, errors {entry['errors']}", flush=True)
        entry = {"model": STACKS[name].name, **entry, **facts()}
        if part == "steps":
            result["stacks"][name] = entry
        else:
            result[part] = entry
        if options.out:
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    done = {name: entry for name, entry in result["stacks"].items() if "seconds" in entry}
    if done:
        print("stack tokens", *next(iter(done.values()))["seconds"])
    for name, entry in done.items():
        print(row(name, entry))
    for part in ("experts", "caches"):
        print(json.dumps(result.get(part, {}), indent=1))


def release():
    """Let go of the model before."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


if __name__ == "__main__":
    main()
