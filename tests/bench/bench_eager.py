"""Time the plain-torch backend against torch's own attention on the same tensors.

    python tests/bench/bench_eager.py --out tests/bench/results/eager.json

Every row of blocks keeps the same number of random key blocks: nothing is contiguous, nothing is
shared between rows, so this is the hardest mask of its density. Runs are interleaved. The median
says what a user gets; the least time of each says what the code can do when nobody else computes.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from sparse_attn.backends import reference
from sparse_attn.backends.torch.attention import attention
from sparse_attn.block_mask import BlockMask

HEADS, TOKENS, HEAD_DIM, BLOCK = 4, 8320, 64, 64
SCALE = HEAD_DIM**-0.5


def random_mask(density: float, seed=0):
    """A mask of `density` of all key blocks per row, and the map it comes from."""
    n = -(-TOKENS // BLOCK)
    scores = torch.rand(1, HEADS, n, n, generator=torch.Generator().manual_seed(seed))
    chosen = scores.topk(round(density * n), -1).indices
    keep = torch.zeros(1, HEADS, n, n, dtype=torch.bool).scatter_(-1, chosen, True)
    return keep, BlockMask.from_dense(keep, block_q=BLOCK, block_k=BLOCK)


def check(q, k, v, mask, out):
    """A wrong result has no time: compare one head's first rows with float64."""
    rows = slice(0, 4 * BLOCK)
    exact, _ = reference.attention(
        *(x[:, :1].double() for x in (q[..., rows, :], k, v)), scale=SCALE,
        mask=mask.with_bits(mask.bits[:, :1, :4]),
    )  # fmt: skip
    error = (out[:, :1, rows].double() - exact).abs().max().item()
    allowed = {torch.float32: 1e-5, torch.bfloat16: 5e-3}[q.dtype]
    if not error <= allowed:
        sys.exit(f"wrong result in {q.dtype}: error {error:.1e}, allowed {allowed:.1e}")


def measure(dtype, density: float, rounds: int) -> dict:
    """Time both, one after the other, `rounds` times."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, TOKENS, HEAD_DIM, generator=generator).to(dtype)
    keep, mask = random_mask(density)
    runs = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, scale=SCALE),
        "sparse": lambda: attention(q, k, v, scale=SCALE, mask=mask)[0],
    }
    check(q, k, v, mask, runs["sparse"]())
    runs["dense"]()
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    row = {"dtype": str(dtype).removeprefix("torch."), "density": keep.float().mean().item()}
    for name, values in seconds.items():
        low, high = statistics.quantiles(values, n=5)[0::3] if rounds > 1 else 2 * values
        row[name] = {
            "median_ms": statistics.median(values) * 1e3,
            "p20_ms": low * 1e3,
            "p80_ms": high * 1e3,
            "min_ms": min(values) * 1e3,
        }
    row["speedup"] = row["dense"]["median_ms"] / row["sparse"]["median_ms"]
    row["best_speedup"] = row["dense"]["min_ms"] / row["sparse"]["min_ms"]
    return row


def machine() -> dict:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="torch's threads; all cores unless told")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON to this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(min(args.threads, os.cpu_count() or 1))
    result = {
        **machine(),
        "shape": {"heads": HEADS, "tokens": TOKENS, "head_dim": HEAD_DIM, "block": BLOCK},
        "rounds": args.rounds,
        "rows": [
            measure(dtype, args.density, args.rounds) for dtype in (torch.float32, torch.bfloat16)
        ],
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result) if args.json else table(result))


def table(result: dict) -> str:
    lines = [
        f"{result['cpu']}, {result['threads']} of {result['cores']} cores, "
        f"load {result['load_before']} | torch {result['torch']} | {result['date']}",
        f"{HEADS} heads x {TOKENS:,} tokens x {HEAD_DIM}, block {BLOCK}",
        f"{'dtype':<10}{'density':>8}{'dense ms':>10}{'20-80%':>12}{'sparse ms':>11}{'20-80%':>12}"
        f"{'speedup':>9}{'of minima':>11}{'of ideal':>10}",
    ]
    for row in result["rows"]:
        dense, sparse = row["dense"], row["sparse"]
        lines.append(
            f"{row['dtype']:<10}{row['density']:>8.3f}{dense['median_ms']:>10.0f}{spread(dense):>12}"
            f"{sparse['median_ms']:>11.0f}{spread(sparse):>12}{row['speedup']:>8.2f}x"
            f"{row['best_speedup']:>10.2f}x{row['best_speedup'] * row['density']:>10.0%}"
        )
    return "\n".join(lines)


def spread(times: dict) -> str:
    return f"{times['p20_ms']:.0f}-{times['p80_ms']:.0f}"


if __name__ == "__main__":
    main()
