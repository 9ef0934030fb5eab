"""What every kind of call takes on a GPU above q, k and v, and what groups of heads cost in time.

HunyuanVideo's attention, 24 heads of 128 in bfloat16, at 5 to 24 s of 720p. "above" is the peak above
q, k, v and what the run holds already; "work" is that without the answer and what the call adds to
what is held. "all heads" lifts the limit on the workspace.

    python tests/bench/bench_memory.py --out results/memory.json
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from sparse_attn import head_groups  # noqa: E402
from sparse_attn.call import Call  # noqa: E402
from sparse_attn.config import AdaSpaConfig  # noqa: E402
from sparse_attn.orders import similarity  # noqa: E402
from sparse_attn.orders.position import serpentine_order  # noqa: E402
from sparse_attn.run.dense import DenseChoice  # noqa: E402
from sparse_attn.run.state import RunState  # noqa: E402
from sparse_attn.schedule import Schedule, StepKind  # noqa: E402
from sparse_attn.token_layout import TokenLayout  # noqa: E402
from tests.bench.record import facts  # noqa: E402

HEADS, DIM, GIB = 24, 128, 2**30
KINDS = {"D": StepKind.DENSE, "S": StepKind.SEARCH, "s": StepKind.SPARSE}
NAMES = {"D": "dense, keeps an LSE", "S": "search", "s": "sparse"}
# latent frames of 45 x 80 tokens
LENGTHS = {"5 s": 33, "10 s": 63, "16 s": 97, "24 s": 145}
SETTINGS = {
    "tail 64x64": {},
    "tail 64x64 int8": {"precision": "int8"},
    "tail 128x64": {"block_size": "128x64"},
    "none 128x64": {"tail": "none", "block_size": "128x64"},
    "Paper": {"tail": "none", "head_adaptive": True},
}
ALL_HEADS = 1 << 42


def inputs(layout):
    """q, k, v [1, H, L, D] over the host's memory; neighbours are alike."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    found = []
    for _ in range(3):
        x = torch.empty(1, layout.tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        for h in range(HEADS):
            size = layout.tokens, DIM
            base = torch.randn(size[0] // 400 + 1, DIM, device="cuda", generator=generator)
            noise = torch.randn(size, device="cuda", generator=generator)
            x[0, :, h] = base.repeat_interleave(400, 0)[: size[0]] + 0.5 * noise
        found.append(x.transpose(1, 2))
    return found


def run_of(steps: str, density: float, **fields) -> RunState:
    config = AdaSpaConfig(sparsity=1 - density, cache="gpu", min_tokens=0, **fields)
    sigmas = tuple(float(x) for x in range(len(steps), 0, -1))
    kinds = tuple(KINDS[x] for x in steps)
    return RunState(config, Schedule(kinds, 0, len(steps), sigmas), DenseChoice("host"))


def steps_of(qkv, layout, steps: str, repeats: int, density: float, fields: dict) -> list[dict]:
    """What every step of a run took; sparse steps are repeated."""
    run, rows = run_of(steps, density, **fields), []
    place = serpentine_order(layout, qkv[0].device)
    for step, kind in enumerate(steps):
        call = Call(
            *qkv, DIM**-0.5, layout, step=step, dense=lambda heads=None: 1 / 0, key="layer",
            by_position=place,
        )  # fmt: skip
        run.enter_step(step)
        seconds = []
        for _ in range(repeats if kind == "s" else 1):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            out = run.attend(call)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            del out
        name = "search again, and sparse" if kind == "S" and "S" in steps[:step] else NAMES[kind]
        rows.append(
            {
                "step": name,
                "ms": round(1000 * statistics.median(seconds), 1),
                "above_gib": round((peak - before) / GIB, 3),
                "work_gib": round((peak - max(after, before)) / GIB, 3),
            }
        )
    assert not run.statistics.warnings and not run.statistics.kept_dense, run.statistics.warnings
    held = run.layers["layer"].nbytes()
    run.free()
    return [*rows, {"step": "held after the run, one layer", "gib": round(held / GIB, 4)}]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--workspaces", nargs="+", type=int, default=[], help="MiB; 0 is all heads")
    parser.add_argument("--steps", default="DSsSs", help="D dense, S search, s sparse")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="where the figures go as JSON")
    args = parser.parse_args()
    report = {**facts(), "density": args.density, "heads": HEADS, "dim": DIM, "runs": []}
    own = head_groups.WORKSPACE_BYTES >> 20
    for length in args.lengths:
        layout = TokenLayout(0, LENGTHS[length], 45, 80, 256)
        qkv = inputs(layout)
        for setting in args.settings:
            for mib in args.workspaces or [own]:
                head_groups.WORKSPACE_BYTES = mib << 20 or ALL_HEADS
                similarity.WORKSPACE_BYTES = 512 << 20
                torch.cuda.empty_cache()
                rows = steps_of(
                    qkv, layout, args.steps, args.repeats, args.density, SETTINGS[setting]
                )
                entry = {"length": length, "tokens": layout.tokens, "setting": setting}
                entry |= {"workspace_mib": mib or "all heads", "steps": rows}
                report["runs"].append(entry)
                print(json.dumps(entry), flush=True)
                args.out.write_text(json.dumps(report, indent=1) + "\n")
        del qkv


if __name__ == "__main__":
    main()
