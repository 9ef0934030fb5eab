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
from sparse_attn.config import AdaSpaConfig  # noqa: E402
from sparse_attn.orders import similarity  # noqa: E402
from sparse_attn.token_layout import TokenLayout  # noqa: E402
from tests.bench.layer_calls import DIM, HEADS, LENGTHS, TEXT, LayerRun, inputs  # noqa: E402
from tests.bench.record import facts, keep  # noqa: E402

GIB = 2**30
NAMES = {"D": "dense, keeps an LSE", "S": "search", "s": "sparse"}
SETTINGS = {
    "tail 64x64": {},
    "tail 64x64 int8": {"precision": "int8"},
    "tail 128x64": {"block_size": "128x64"},
    "none 128x64": {"tail": "none", "block_size": "128x64"},
    "Paper": {"tail": "none", "head_adaptive": True},
}
ALL_HEADS = 1 << 42


def steps_of(qkv, layout, steps: str, repeats: int, density: float, fields: dict) -> list[dict]:
    """What every step of a run took; sparse steps are repeated."""
    config = AdaSpaConfig(sparsity=1 - density, cache="gpu", min_tokens=0, **fields)
    run, rows = LayerRun(config, steps, qkv, layout), []
    for step, kind in enumerate(steps):
        call = run.enter(step)
        seconds = []
        for _ in range(repeats if kind == "s" else 1):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            out = call()
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
    held = round(run.end() / GIB, 4)
    return [*rows, {"step": "held after the run, one layer", "gib": held}]


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
        layout = TokenLayout(0, LENGTHS[length], 45, 80, TEXT)
        qkv = inputs(layout.tokens, HEADS, torch.device("cuda"))
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
                keep(args.out, report)
        del qkv


if __name__ == "__main__":
    main()
