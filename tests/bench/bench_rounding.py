"""What attention in eight bits errs by, each of its roundings made exact in turn; no GPU needed.

    python tests/bench/bench_rounding.py

The arithmetic of `backends/triton/quantise.py` and `quantised_attention.py` in float32, on random data, and
what other scales and steps would give.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sparse_attn.backends.triton.quantise import COLS, TILE, rotation  # noqa: E402
from tests.bench.record import facts  # noqa: E402

KEYS, ROWS, D, SEEDS = 32768, 64, 128, 4
NOW = SimpleNamespace(q=True, k="tile", v="halves", cancel=True, steps=127, total="before")
VARIANTS = {
    "as the kernels are": {},
    "queries exact": {"q": False},
    "keys exact": {"k": None},
    "values exact": {"v": None},
    "weights exact": {"steps": None},
    "errors of values do not cancel": {"cancel": False},
    "one scale for a tile of values": {"v": "tile"},
    "a scale for each channel of a tile of values": {"v": "channel"},
    "a scale for each key": {"k": "key"},
    "weights of 255 steps": {"steps": 255},
    "weights added up as they are rounded": {"total": "rounded"},
}


def rounded(x, largest):
    """In 127 steps of the largest."""
    return torch.round(x * (127 / largest)) * (largest / 127)


def values_of(v, how):
    """Values [KEYS, D] as the kernel has them, relative to their mean [D], and that."""
    high, low = v.amax(0), v.amin(0)
    step = 2 ** torch.maximum(high, -low).log2().floor() / 128
    mean = torch.floor(v.mean(0) / step + 0.5) * step
    x = (v - mean).view(-1, TILE, D)
    x = x / torch.maximum(high - mean, mean - low)
    if how.v == "channel":
        largest = x.abs().amax(1, keepdim=True)
    else:
        groups = D // COLS if how.v == "halves" else 1
        largest = x.abs().unflatten(2, (groups, -1)).amax((1, 3))
        largest = largest.repeat_interleave(D // groups, 1)[:, None]
    steps, off = x * (127 / largest), torch.zeros(len(x), 1, D)
    for i in range(4 if how.cancel else 0):
        found = torch.round(steps + off).sum(1, keepdim=True)
        off += torch.where(found < steps.sum(1, keepdim=True), 1.0, -1.0) / (16 << i)
    found = torch.round(steps + off) * (largest / 127)
    return found.view(-1, D) * torch.maximum(high - mean, mean - low), mean


def error(seed, changes):
    """Relative error of ROWS rows."""
    how = SimpleNamespace(**{**vars(NOW), **changes})
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, D, generator=g).bfloat16().float() for n in (ROWS, KEYS, KEYS))
    exact = (q @ k.T * D**-0.5).softmax(-1) @ v
    matrix = rotation(D, torch.float32, torch.device("cpu"))
    q, k = q @ matrix, ((k - k.mean(0)) @ matrix).view(-1, TILE, D)
    if how.q:
        q = rounded(q, q.abs().amax(1, keepdim=True))
    if how.k:
        k = rounded(k, k.abs().amax(2 if how.k == "key" else (1, 2), keepdim=True))
    scores = (q @ k.flatten(0, 1).T * D**-1.5).view(ROWS, -1, TILE)
    top = scores.amax(2, keepdim=True)
    before = (scores - top).exp()
    weights = torch.round(before * how.steps) / how.steps if how.steps else before
    of_tile = (top - top.amax(1, keepdim=True)).exp()
    weights, before = ((x * of_tile).flatten(1) for x in (weights, before))
    total = (before if how.total == "before" else weights).sum(1, keepdim=True)
    v, mean = values_of(v, how) if how.v else (v - v.mean(0), v.mean(0))
    out = ((weights @ v + mean * total) / total).bfloat16().float()
    return ((out - exact).norm() / exact.norm()).item()


def main():
    rows = {}
    for name, changes in VARIANTS.items():
        found = [error(seed, changes) for seed in range(SEEDS)]
        rows[name] = round(sum(x * x for x in found) ** 0.5 / SEEDS**0.5, 5)
        print(f"{name:48}{rows[name]:.4f}", flush=True)
    now = rows["as the kernels are"]
    shares = {
        name: round(1 - (rows[f"{name} exact"] / now) ** 2, 3)
        for name in ("queries", "keys", "values", "weights")
    }
    print("shares of the squared error:", shares)
    report = {
        **facts(), "keys": KEYS, "rows": ROWS, "head_dim": D, "seeds": SEEDS, "errors": rows,
        "shares": shares,
    }  # fmt: skip
    out = ROOT / "tests" / "bench" / "results" / "rounding_cpu.json"
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
