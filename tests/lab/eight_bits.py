"""What each rounding of attention in eight bits does to a video, on the CPU.

    python tests/lab/eight_bits.py --comfyui PATH --clips .adaspa/natural/clips.zip --densities 0.2 0.1

Clips are continued in a small picture by the pack itself; in place of plain torch's sparse attention
stands the arithmetic of `backends/triton/quantised_attention.py`, in float32. Values stay exact.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT), str(ROOT / "tests" / "tiny_model"), str(HERE)]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

import generation  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from metrics import likeness  # noqa: E402
from rule import Rule  # noqa: E402

from sparse_attn.backends import choice  # noqa: E402
from sparse_attn.backends.permuted import put_in_raster  # noqa: E402
from sparse_attn.backends.torch import attention as plain  # noqa: E402
from sparse_attn.backends.triton.quantise import TILE, rotation  # noqa: E402
from tests.bench.bench_rounding import rounded  # noqa: E402
from tests.bench.record import facts  # noqa: E402

RULE = Rule("similarity, two searches", order="similarity", tail="pooled", again=(0.6,))
STEPS = 8


@dataclass(frozen=True)
class Roundings:
    """Attention in which some numbers are rounded as on RTX cards.

    Args:
        scores: queries by row and keys by tile, in 127 steps.
        weights: in 127 steps of a tile's largest, row by row; and what the denominator adds up:
            "before" they are rounded, or as they are "rounded". Empty leaves them exact.
    """

    scores: bool = False
    weights: str = ""

    def attention(self, q, k, v, *, scale, key_bias=None, mask=None, pooled=None, order=None):
        """As `Backend.attention`, of blocks of 64 tokens without a bias."""
        if mask is None:
            return plain.dense_attention(q, k, v, scale=scale)
        out, keep = torch.empty_like(v), mask.to_dense()
        for b, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:2])).tolist():
            tail = [x[b, h].float() for x in (pooled.k_mean, pooled.v_mean)]
            qkv = [x[b, h].float() for x in (q, k, v)]
            out[b, h] = self._head(*qkv, keep[b, h], *tail, pooled.log_sizes[b], scale)
        found = torch.empty_like(out)
        put_in_raster(found, out, order)
        return found, None

    def _head(self, q, k, v, keep, k_mean, v_mean, log_sizes, scale):
        if self.scores:
            matrix, centre = rotation(q.shape[1], torch.float32, q.device), k.mean(0)
            q = q @ matrix / len(matrix)
            q = rounded(q, q.abs().amax(1, keepdim=True))
            k, k_mean = (_by_tile((x - centre) @ matrix) for x in (k, k_mean))
        centre = v.mean(0)
        # [N, 64, D], the last block padded
        k, v = (F.pad(x, (0, 0, 0, -len(x) % TILE)).unflatten(0, (-1, TILE)) for x in (k, v))
        hidden = torch.zeros(k.shape[:2]).flatten()
        hidden[len(q) :] = float("-inf")
        out = []
        for rows, listed in zip(q.split(TILE), keep, strict=True):
            means = rows @ k_mean.T * scale + log_sizes.masked_fill(listed, float("-inf"))
            means = F.pad(means, (0, -len(k_mean) % TILE), value=float("-inf"))
            scores = rows @ k[listed].flatten(0, 1).T * scale
            scores += hidden.unflatten(0, (-1, TILE))[listed].flatten()
            values = F.pad(v_mean, (0, 0, 0, -len(v_mean) % TILE)), v[listed].flatten(0, 1)
            weights, total = self._weights(torch.cat([means, scores], 1))
            out.append(weights @ (torch.cat(values) - centre) / total + centre)
        return torch.cat(out)

    def _weights(self, scores):
        """Weights [Q, K] of scores, and what the denominator is, [Q, 1]."""
        weights = (scores - scores.amax(1, keepdim=True)).exp()
        total = weights.sum(1, keepdim=True)
        if self.weights:
            tiles = weights.unflatten(1, (-1, TILE))
            largest = tiles.amax(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * 127)
            weights = rounded(tiles, largest).flatten(1)
        return weights, weights.sum(1, keepdim=True) if self.weights == "rounded" else total


def _by_tile(x):
    """x [L, D], each 64 rows in 127 steps of their largest number."""
    tiles = F.pad(x, (0, 0, 0, -len(x) % TILE)).unflatten(0, (-1, TILE))
    return rounded(tiles, tiles.abs().amax((1, 2), keepdim=True)).flatten(0, 1)[: len(x)]


VARIANTS = {
    "exact": Roundings(),
    "weights, added up as they are rounded": Roundings(weights="rounded"),
    "weights, added up before": Roundings(weights="before"),
    "scores and weights, added up as they are rounded": Roundings(True, "rounded"),
    "scores and weights, added up before": Roundings(True, "before"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", required=True)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2])
    parser.add_argument("--seeds", type=int, default=3, help="clips")
    parser.add_argument("--latent", type=int, nargs=3, default=[20, 32, 32])
    parser.add_argument("--out", default=HERE / "results" / "int8_weights_cpu.json")
    options = parser.parse_args()
    subject = generation.subject(
        "natural", options.comfyui, options.seeds, tuple(options.latent), options.clips
    )
    dense, rows = subject.dense(STEPS), []
    for density in options.densities:
        rule = RULE.but(RULE.name, density=density)
        for name, variant in VARIANTS.items():
            with mock.patch.object(choice.torch_attention, "attention", variant.attention):
                run = subject.run(rule, str(STEPS))
            psnr = [round(x, 3) for x in likeness(dense, run.video)["psnr"]]
            rows.append({"density": density, "rounded": name, "psnr": psnr})
            mean = sum(psnr) / len(psnr)
            print(f"{density} {name:50}{mean:6.2f} dB {psnr}", flush=True)
            report = {
                **facts(), "model": "natural", "layout": subject.layout.describe(), "steps": STEPS,
                "clips": subject.prompts, "rule": rule.settings(), "rows": rows,
            }  # fmt: skip
            Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
