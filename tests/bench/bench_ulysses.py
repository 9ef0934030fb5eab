"""Time one video's layers on several GPUs: Ulysses' all-to-alls around the pack's attention.

    torchrun --nproc_per_node 2 tests/bench/bench_ulysses.py --out results.json
    torchrun --nproc_per_node 2 tests/bench/bench_ulysses.py --small        # gloo, tries the script

A layer of each model at its real width and length, on random weights, through the node's patch and
ComfyUI's sampler: on rank 0 alone, then on all ranks. Every kind of step is timed twice, whole and
as attention calls alone; a step's time is that of the slowest rank. Any number of ranks that divides
the heads works.
"""

import argparse
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.tools import comfy_inprocess  # noqa: E402

comfy_inprocess.start()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from sparse_attn.config import AdaSpaConfig  # noqa: E402
from sparse_attn.host.raylight import patched  # noqa: E402
from tests.bench.real_stacks import STACKS  # noqa: E402
from tests.bench.record import facts  # noqa: E402
from tests.bench.stack_runs import StackRuns, relative  # noqa: E402
from tests.host import ranks  # noqa: E402

MODELS = ("hunyuan", "wan")
DENSITIES = (0.2, 0.1)
# what each step of a run does; the first also pays for what is set up once
KINDS = ("first", "dense", "search", "sparse", "sparse", "search_again", "sparse", "sparse")


def config(density: float, precision: str) -> AdaSpaConfig:
    return AdaSpaConfig(
        sparsity=1 - density, warmup=2 / 8, search_points=(5 / 8,), min_tokens=0, cache="gpu",
        block_size="128x64", precision=precision, token_order="position",
    )  # fmt: skip


def timed_run(runs: StackRuns, density: float, precision: str, everyone: bool):
    """Latents, and milliseconds of a step and of its attention calls by kind of step."""
    model = patched(runs.patcher, vars(config(density, precision)))
    out, meter = runs.sample(model, len(KINDS))
    statistics = model.get_attachment("adaspa").latest()
    timing = statistics.timing
    if not timing.sparse:
        raise SystemExit(f"nothing ran sparse: {dict(statistics.kept_dense)}")
    seconds = torch.tensor(meter.seconds, dtype=torch.float64)
    if everyone:
        seconds = seconds.to(runs.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
    steps: dict[str, list[float]] = {}
    for kind, took in zip(KINDS, seconds.tolist(), strict=True):
        steps.setdefault(kind, []).append(took)
    del steps["first"]
    calls = {kind: getattr(timing, kind) for kind in ("dense", "search", "search_again", "sparse")}
    return (
        out,
        {kind: 1e3 * median(took) for kind, took in steps.items()},
        {kind: 1e3 * median(took) for kind, took in calls.items() if took},
    )


def all_to_all(engine, heads: int, head_dim: int, tokens: int, device, repeats: int = 5) -> float:
    """Milliseconds of the all-to-alls of one call: q, k and v there, the output back."""
    from yunchang.comm.all_to_all import SeqAllToAll4D

    world = dist.get_world_size()
    x = torch.randn(1, tokens // world, heads, head_dim, device=device, dtype=torch.bfloat16)
    group, times = engine.ulysses_pg, []
    for _ in range(repeats + 1):
        _wait(device)
        dist.barrier()
        start = time.perf_counter()
        q, _, _ = (SeqAllToAll4D.apply(group, x, 2, 1) for _ in range(3))
        SeqAllToAll4D.apply(group, q, 1, 2)
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return median(times[1:])


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, small: bool, device, engine, precisions, densities) -> list[dict]:
    rank, world = dist.get_rank(), dist.get_world_size()
    stack, rows = STACKS[name], []

    def add(gpus, precision, density, times, kind_of, identical=None):
        rows.extend(
            {"model": name, "gpus": gpus, "kind": kind_of.format(kind), "precision": precision,
             "density": density, "ms": round(ms, 3), "identical": identical}
            for kind, ms in times.items()
        )  # fmt: skip

    alone = {}
    runs = StackRuns(stack, small, device)
    for precision in precisions:
        if rank == 0:
            # what is compiled is compiled in this one
            timed_run(runs, densities[0], precision, False)
        for density in densities:
            if rank == 0:
                out, steps, calls = timed_run(runs, density, precision, False)
                alone[precision, density] = out
                add(1, precision, density, steps, "step {}")
                add(1, precision, density, calls, "{}")
            dist.barrier()
    ranks.share(runs.patcher.model.diffusion_model, engine, world, rank)
    for precision in precisions:
        timed_run(runs, densities[0], precision, True)
        for density in densities:
            out, steps, calls = timed_run(runs, density, precision, True)
            if rank == 0:
                error = relative(out.float(), alone[precision, density].float())
                same = True if error == 0 else error
                add(world, precision, density, steps, "step {}", same)
                add(world, precision, density, calls, "{}", same)
    heads = runs.patcher.model.diffusion_model.num_heads
    tokens = 1024 if small else 119_040 if name == "hunyuan" else 75_600
    ms = all_to_all(engine, heads, stack.head_dim, tokens - tokens % world, device)
    add(world, "bf16", None, {"all_to_all": ms}, "{}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--precisions", nargs="+", default=("bf16", "int8"))
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--small", action="store_true", help="narrow models, on the CPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu") if args.small else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if args.small else "nccl", timeout=timedelta(minutes=5))
    engine = ranks.engine_of("yunchang", rank, world)
    rows = []
    with torch.inference_mode():
        for name in args.models:
            rows += measure(name, args.small, device, engine, args.precisions, args.densities)
            if rank == 0 and args.out:
                args.out.write_text(json.dumps({**facts(), "rows": rows}, indent=1) + "\n")
    for row in rows if rank == 0 else ():
        print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
