"""How unevenly a recall request loads the GPUs that share a video's heads.

    python tests/lab/rank_balance.py --comfyui PATH --out tests/lab/results/rank_balance.json

With a recall, every head keeps as many blocks as it needs, and the GPU whose heads keep more makes the
others wait. From the densities of the lab models' heads: how much longer the fullest GPU works than the
mean, for heads shared in their order and for heads dealt to the emptiest GPU, the fullest first. The lab's
layers have 3 or 4 heads; layers of 24 and 40 are drawn from them, each head with its own layer's mean
taken out, 1,000 times.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(path) for path in (ROOT, ROOT / "tests" / "tiny_model", HERE)]

from generation import Subject  # noqa: E402
from models import MODELS  # noqa: E402

from sparse_attn.config import AdaSpaConfig  # noqa: E402
from tests.bench.record import facts  # noqa: E402

DRAWN = 1000
HEADS, RANKS = (24, 40), (2, 4, 8)


def excess(shares: list[list[float]]) -> float:
    """How much longer the fullest works than the mean, of the densities of each GPU's heads."""
    loads = [sum(share) for share in shares]
    return max(loads) / mean(loads) - 1


def in_order(densities: list[float], ranks: int) -> list[list[float]]:
    count = len(densities) // ranks
    return [densities[i : i + count] for i in range(0, len(densities), count)]


def dealt(densities: list[float], ranks: int) -> list[list[float]]:
    """Equally many heads each, the fullest first to whoever has least."""
    shares: list[list[float]] = [[] for _ in range(ranks)]
    for density in sorted(densities, reverse=True):
        free = [share for share in shares if len(share) < len(densities) // ranks]
        min(free, key=sum).append(density)
    return shares


def measured(name: str, recall: float, options) -> list[list[float]]:
    """The densities of every layer's heads after a run's last search."""
    subject = Subject(MODELS[name], options.comfyui, options.seeds)
    # only now is ComfyUI there
    from sparse_attn.host.install import install

    config = AdaSpaConfig(recall=recall, min_tokens=0, verdict="sparse")
    model, handle = install(subject.model, config)
    subject.sample(model, options.steps)
    return [pattern.density for run in handle.runs for pattern in run.patterns.values()]


def drawn(layers: list[list[float]], heads: int, ranks: int) -> dict[str, float]:
    """Mean excess of layers of `heads` heads, drawn from the deviations of those at hand."""
    rng = random.Random(0)
    around = [density / mean(layer) for layer in layers for density in layer]
    found = [[rng.choice(around) for _ in range(heads)] for _ in range(DRAWN)]
    return {
        way.__name__: round(mean(excess(way(layer, ranks)) for layer in found), 4)
        for way in (in_order, dealt)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH", ""))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recalls", nargs="+", type=float, default=[0.9, 0.95])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for recall in options.recalls:
        layers = [layer for name in options.models for layer in measured(name, recall, options)]
        if not layers:
            raise SystemExit("no layer ran sparse")
        for heads in HEADS:
            for ranks in RANKS:
                row = {"recall": recall, "heads": heads, "gpus": ranks, "layers": len(layers)}
                rows.append({**row, **drawn(layers, heads, ranks)})
                print(json.dumps(rows[-1]), flush=True)
        options.out.write_text(json.dumps({**facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
