"""Compares ways to choose blocks on whole generations of the tiny model.

    python tests/lab/run_lab.py --comfyui PATH --out results.json

Every contestant samples the same prompts and seeds as the dense run. Reported: PSNR of the decoded
video against dense, mean over seeds with its standard error; how often the video reads back as
prompted; the exact recall at the search.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tiny_model"), str(ROOT / "tests" / "lab")]

import check_model  # noqa: E402
import procedural_video as video  # noqa: E402
from contestants import Attention, Contestant  # noqa: E402

from tests.bench.record import facts  # noqa: E402
from tests.tools import comfy_inprocess  # noqa: E402

GRID, LATENT = (16, 20, 26), (16, 40, 52)
# (steps, first search, a later one)
SCHEDULES = {"20": (20, 2, 12), "50": (50, 10, 30), "8": (8, 1, 5), "8 from the start": (8, 0, 5)}
CUBE, FITTED = (4, 4, 4), (8, 4, 2)


def contestants(density: float, first: int, later: int) -> list[Contestant]:
    one = {"density": density, "searches": (first,)}
    two = {"density": density, "searches": (first, later)}
    return [
        Contestant("exact, raster", **one),
        Contestant("exact, raster, head-adaptive", head_adaptive=True, **one),
        Contestant("paper: head-adaptive, two searches", head_adaptive=True, **two),
        Contestant("exact, cubes", order=CUBE, **one),
        Contestant("exact, raster, tail", tail="pooled", **one),
        Contestant("exact, cubes, tail", order=CUBE, tail="pooled", **one),
        Contestant("exact, cubes, tail, head-adaptive", order=CUBE, tail="pooled", head_adaptive=True, **one),
        Contestant("error, raster, tail", score="error", tail="pooled", **one),
        Contestant("error, cubes, tail", score="error", order=CUBE, tail="pooled", **one),
        Contestant("error, cubes, tail, two searches", score="error", order=CUBE, tail="pooled", **two),
        Contestant("error, fitted cubes, tail", score="error", order=FITTED, tail="pooled", **one),
        Contestant("error, cubes, tail, head-adaptive", score="error", order=CUBE, tail="pooled", head_adaptive=True, **one),
        Contestant("pooled every step, raster, tail (Sol-Attn's rule)", score="pooled", tail="pooled", **one),
        Contestant("pooled every step, raster", score="pooled", **one),
        Contestant("random, raster", score="random", **one),
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "tests/tiny_model/tiny_wan.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES))
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.1])
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long")
    options = parser.parse_args()
    comfy_inprocess.start(options.comfyui)
    model = check_model.load(options.model, options.comfyui)
    prompts = [video.prompt(video.random_scene(random.Random(i), 32, 1.3)) for i in range(options.seeds)]
    began = time.perf_counter()
    rows, dense_rows = [], {}
    for name in options.schedules:
        steps, first, later = SCHEDULES[name]
        dense = [sample(model, prompt, steps, i, None) for i, prompt in enumerate(prompts)]
        dense_rows[name] = score_task(prompts, dense)
        print(f"steps {name}: dense reads back {dense_rows[name]}", flush=True)
        for density in options.densities:
            for contestant in contestants(density, first, later):
                if time.perf_counter() - began > options.seconds:
                    break
                row = compare(model, contestant, prompts, dense, steps)
                rows.append({"schedule": name, **row})
                print(
                    f"{name:>16} {density:.2f} {contestant.name:<52} {row['psnr']:6.2f} "
                    f"+- {row['psnr_error']:.2f} dB, recall {row['recall']:.3f}, "
                    f"task {row['task']}, {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
                write(options.out, rows, dense_rows, prompts)


def sample(model, prompt, steps, seed, attention):
    """Decoded video [3, F, Y, X]."""
    return video.decode(
        check_model.generate(model, [prompt], LATENT, steps, seed, attention)
    )[0]  # fmt: skip


def compare(model, contestant, prompts, dense, steps) -> dict:
    psnrs, recalls, videos = [], [], []
    for seed, prompt in enumerate(prompts):
        attention = Attention(contestant, GRID)
        videos.append(sample(model, prompt, steps, seed, attention))
        psnrs.append(check_model.psnr(dense[seed], videos[-1]))
        recalls += attention.recalls.values()
    spread = statistics.stdev(psnrs) / len(psnrs) ** 0.5 if len(psnrs) > 1 else 0.0
    return {
        "contestant": contestant.name,
        "density": contestant.density,
        "psnr": statistics.mean(psnrs),
        "psnr_error": spread,
        "psnrs": psnrs,
        "recall": statistics.mean(recalls),
        "task": score_task(prompts, videos),
    }


def score_task(prompts, videos) -> float:
    """Share of colour and shape words of the prompts' things that read back from the videos."""
    right = total = 0
    for prompt, clip in zip(prompts, videos, strict=True):
        for thing in video.describe(clip):
            for name in ("colour", "shape"):
                total += 1
                right += thing[name] in prompt
    return round(right / total, 3) if total else 0.0


def write(path: Path, rows, dense_rows, prompts) -> None:
    result = {
        "what": "PSNR in dB of sparse against dense generations of tests/tiny_model",
        "rows": rows,
        "dense_task": dense_rows,
        "prompts": prompts,
        **facts(),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
