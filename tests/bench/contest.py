"""Contestants that answer the same attention call, checked when they enter and timed together."""

import math
import os
import statistics

import torch

from sparse_attn.backends import tiles
from sparse_attn.block_mask import BlockMask

# how long a contestant runs in a round, milliseconds; the second half of its runs counts
RUN_MS = 200
DENSE = "ours, dense, with LSE"
CUDNN = "torch cuDNN"
# relative L2 error against float32 of the same bfloat16 inputs; all stay near 0.003
TOLERANCE = 0.006


def stand_in() -> None:
    """Run the kernels of another kind of card on this one where ADASPA_STAND_FOR says so, such as 8.9.

    What measures cards can so be tried without that card; the line names both.
    """
    asked = os.environ.get("ADASPA_STAND_FOR")
    if asked:
        major, _, minor = asked.partition(".")
        tiles.stand_for((int(major), int(minor)))


def random_lists(heads, rows, columns, density, device):
    """The same number of random blocks in every row, ascending."""
    count = max(1, round(columns * density))
    generator = torch.Generator(device=device).manual_seed(0)
    indices = torch.empty(1, heads, rows, count, dtype=torch.int32, device=device)
    for head in range(heads):
        order = torch.rand(rows, columns, device=device, generator=generator).topk(count, 1)
        indices[0, head] = order.indices.sort(1).values.int()
    return indices, torch.full((1, heads, rows), count, dtype=torch.int32, device=device)


def mask_of(indices, columns, block_q, block_k=64):
    """The mask of `random_lists`."""
    heads, rows = indices.shape[1:3]
    keep = torch.zeros(1, heads, rows, columns, dtype=torch.bool, device=indices.device)
    keep.scatter_(3, indices.long(), True)
    return BlockMask.from_dense(keep, block_q=block_q, block_k=block_k)


def exact_rows(q, k, v, head, first, block_q, block_k, listed=None, bias=None):
    """Float32 attention of one query block of one head over its listed key blocks."""
    keys = torch.arange(k.shape[2], device=k.device)
    if listed is not None:
        keys = (listed.long()[:, None] * block_k + torch.arange(block_k, device=k.device)).flatten()
        keys = keys[keys < k.shape[2]]
    rows = q[0, head, first : first + block_q].float()
    s = rows @ k[0, head, keys].float().T * q.shape[-1] ** -0.5
    if bias is not None:
        s += bias[keys]
    return s.softmax(-1) @ v[0, head, keys].float()


def error_of(out, q, k, v, block_q, block_k, indices=None, bias=None):
    """Largest relative L2 error over a few query blocks."""
    worst = 0.0
    heads, length = q.shape[1:3]
    for head, share in ((0, 0.0), (heads // 2, 0.5), (heads - 1, 1.0)):
        block = int(share * (math.ceil(length / block_q) - 1))
        listed = None if indices is None else indices[0, head, block]
        exact = exact_rows(q, k, v, head, block * block_q, block_q, block_k, listed, bias)
        got = out[0, head, block * block_q : (block + 1) * block_q].float()
        worst = max(worst, ((got - exact).norm() / exact.norm()).item())
    return worst if math.isfinite(worst) else math.inf


class Contest:
    """One shape, its tensors and who runs on it."""

    def __init__(self, heads, length, dim, device):
        g = torch.Generator(device=device).manual_seed(1)
        self.q, self.k, self.v = (
            torch.randn(1, heads, length, dim, device=device, generator=g).bfloat16()
            for _ in range(3)
        )
        self.device, self.scale = device, dim**-0.5
        self.entries = []
        self.absent = {}

    def leave_out(self, name, reason):
        print(f"  {name}: left out ({reason})", flush=True)
        self.absent[name] = str(reason)

    def enter(self, name, run, density=None, check=None, tolerance=TOLERANCE):
        """Add a contestant; `check(result)` gives its error, None means nothing to check."""
        try:
            result = run()
            error = check(result) if check else None
            torch.cuda.synchronize()
        except Exception as reason:  # a contestant that cannot run here must not end the contest
            self.leave_out(name, f"{type(reason).__name__}: {str(reason)[:120]}")
            torch.cuda.empty_cache()
            return
        if error is not None and not error <= tolerance:
            self.leave_out(name, f"wrong, relative error {error:.3f}")
            return
        self.entries.append({"name": name, "density": density, "error": error, "run": run})

    def time(self, rounds, turns=False):
        """Every contestant runs back to back for a while in each round, or once with `turns`.

        Back to back each runs at its own clock; in turns it starts at the clock its predecessor
        left, which is lower after a hungry one where the GPU caps its power.
        """
        times = {entry["name"]: [] for entry in self.entries}
        for _ in range(rounds):
            for entry in self.entries:
                runs = []
                while len(runs) < (1 if turns else 2) or (sum(runs) < RUN_MS and not turns):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    entry["run"]()
                    end.record()
                    torch.cuda.synchronize()
                    runs.append(begin.elapsed_time(end))
                times[entry["name"]] += runs[len(runs) // 2 :]
        return times

    def rows(self, times):
        """What the table and the JSON say of every contestant, in the order of entry."""
        median = {name: statistics.median(values) for name, values in times.items()}
        cudnn = median.get(CUDNN)
        dense = min((ms for name, ms in median.items() if name in (CUDNN, DENSE)), default=None)
        heads, length, dim = self.q.shape[1:]
        rows = []
        for entry in self.entries:
            ms = sorted(times[entry["name"]])
            density = entry["density"]
            flop = 4 * heads * length**2 * dim * density if density else None
            value = median[entry["name"]]
            rows.append(
                {
                    "name": entry["name"],
                    "density": density,
                    "ms": round(value, 3),
                    "ms_20": round(ms[int(0.2 * (len(ms) - 1))], 3),
                    "ms_80": round(ms[math.ceil(0.8 * (len(ms) - 1))], 3),
                    "dense_ms": round(dense, 3) if dense and density else None,
                    "tflops": round(flop / value / 1e9, 1) if flop else None,
                    "over_cudnn": round(cudnn / value, 2) if cudnn and density else None,
                    "of_ideal": round(dense * density / value, 3) if dense and density else None,
                    "error": entry["error"],
                }
            )
        return rows


def print_head():
    print(
        f"\n{'attention':50}{'density':>8}{'ms':>9}{'20-80 %':>17}{'dense ms':>9}{'x cuDNN':>8}"
        f"{'ideal':>7}{'TFLOP/s':>9}"
    )


def print_rows(shape, size, rows):
    print(f"{shape}: {size[0]} heads x {size[1]:,} tokens x {size[2]}")
    for row in rows:
        spread = f"{row['ms_20']:.2f}-{row['ms_80']:.2f}"
        density = f"{row['density']:g}" if row["density"] else ""
        line = f"  {row['name']:48}{density:>8}{row['ms']:9.2f}{spread:>17}"
        if row["dense_ms"]:
            faster = f"{row['over_cudnn']:.2f}" if row["over_cudnn"] else ""
            line += f"{row['dense_ms']:9.1f}{faster:>8}{row['of_ideal']:7.0%}{row['tflops']:9.0f}"
        print(line, flush=True)
