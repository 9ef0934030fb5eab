"""How far the lab's rule for Sol-Attn is from comfy-kitchen's own definition of it.

    python tests/lab/compare_sol.py --comfyui PATH --out sol_attn.json [--model tiny]

One prompt is sampled dense up to a step. On the q, k and v of that step comfy-kitchen's reference
(its eager backend; its GPU kernel computes the same in INT8) and our rule keep equally many blocks,
and both outputs are compared with dense attention. Needs a comfy-kitchen that has `sol_attn`.
"""

import argparse
import contextlib
import importlib
import json
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tiny_model"), str(HERE)]

import generation  # noqa: E402
import models  # noqa: E402
import rivals  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from contestants import SOL  # noqa: E402
from sol_op import threshold_for  # noqa: E402

from tests.bench.record import facts  # noqa: E402


class Reached(Exception):
    """The step whose q, k and v are wanted is over."""


def seen_at(subject, step: int, steps: int) -> dict:
    """{layer: (q, k, v)} of a dense generation, float32."""
    found, calls = {}, Counter()

    def look(layer, q, k, v):
        if calls[layer] > step:
            raise Reached
        if calls[layer] == step:
            found[layer] = tuple(x.float() for x in (q, k, v))
        calls[layer] += 1

    with contextlib.suppress(Reached):
        subject.sample(subject.model, steps, models.override(subject.spec, look))
    return found


@torch.no_grad()
def compare(layout, q, k, v, density: float, reference) -> dict:
    scale = q.shape[-1] ** -0.5
    dense = F.scaled_dot_product_attention(q, k, v)
    tau, exact = threshold_for(q, k, density)
    heads = [[x[:, h : h + 1].transpose(1, 2) for x in (q, k, v)] for h in range(q.shape[1])]
    theirs = torch.cat([reference(*one, tau=tau, scale=scale) for one in heads], 2).transpose(1, 2)
    rival = rivals.Rival(SOL.but(SOL.name, density=density), layout, 0)
    keep = rival.choose(0, q, k, v)
    ours = rivals.attention(q, k, v, keep, SOL.tail)

    def error(x):
        return round(float((x - dense).square().mean().sqrt() / dense.std()), 4)

    return {
        "density_theirs": round(float(exact.float().mean()), 4),
        "density_ours": round(float(keep.float().mean()), 4),
        "error_theirs": error(theirs),
        "error_ours": error(ours),
        "blocks_in_both": round(float((exact & keep).sum() / keep.sum()), 4),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", required=True)
    parser.add_argument("--model", choices=("tiny", "wan128"), default="tiny")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    subject = generation.subject(options.model, options.comfyui, 1)
    seen = seen_at(subject, options.step, options.steps)
    kitchen = importlib.import_module("comfy_kitchen.backends.eager.sol_attn")
    kitchen._MAX_SCORE_BYTES = 1 << 40
    rows = []
    for layer, qkv in sorted(seen.items()):
        row = {"layer": layer, **compare(subject.layout, *qkv, options.density, kitchen.sol_attn)}
        rows.append(row)
        print(row, flush=True)
    report = {"model": options.model, "step": options.step, "steps": options.steps, "rows": rows}
    options.out.write_text(json.dumps({**report, **facts()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
