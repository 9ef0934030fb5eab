"""Draws what the presets make of a video: frames side by side, and their difference to dense times 8.

    python tests/lab/show_presets.py --comfyui PATH --out OUT [--model wan128] [--scene 0]

OUT gets one picture, and `presets.json` with the likeness of every preset to dense. A CPU needs
minutes; `--latent 8x40x56` halves the length.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT), str(ROOT / "tests" / "tiny_model"), str(HERE)]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

import generation  # noqa: E402
import torch  # noqa: E402
from metrics import likeness  # noqa: E402
from models import MODELS  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from rule import of_preset  # noqa: E402
from run_lab import latent_size  # noqa: E402

from sparse_attn.config import PRESETS  # noqa: E402
from tests.bench.record import facts  # noqa: E402

TIMES = 8  # what a difference is multiplied by
COLUMNS, SCALE, MARGIN = 4, 2, 92  # frames in a row, their enlargement, pixels for words


def strip(video: torch.Tensor) -> torch.Tensor:
    """[Y, COLUMNS * X, 3] uint8: frames of [3, F, Y, X] in [0, 1], spread over the video."""
    picks = torch.linspace(0, video.shape[1] - 1, COLUMNS).round().long()
    row = torch.cat(list(video[:, picks].unbind(1)), -1).movedim(0, -1)
    return (row.clamp(0, 1) * 255).round().byte().cpu()


def picture(videos: dict[str, torch.Tensor]) -> Image.Image:
    """A row per video, the first of which is the dense one; behind each other one its difference."""
    dense, *others = videos
    rows = {dense: strip(videos[dense])}
    for name in others:
        rows[name] = strip(videos[name])
        apart = (videos[name] - videos[dense]).abs() * TIMES
        rows[f"{name},\ndifference x {TIMES}"] = strip(apart)
    height, width = (SCALE * side for side in rows[dense].shape[:2])
    sheet = Image.new("RGB", (MARGIN + width, height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, row) in enumerate(rows.items()):
        frames = Image.fromarray(row.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(frames, (MARGIN, number * height))
        draw.text((4, number * height + height // 2 - 10), name, fill="black")
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", required=True)
    parser.add_argument("--model", choices=tuple(MODELS), default="wan128")
    parser.add_argument("--scene", type=int, default=0)
    parser.add_argument("--steps", choices=("8", "20", "50"), default="20")
    parser.add_argument("--latent", type=latent_size, help="TxHxW instead of the model's own")
    parser.add_argument("--presets", nargs="+", default=["Quality", "Balanced", "Fast"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    subject = generation.subject(options.model, options.comfyui, [options.scene], options.latent)
    videos = {"dense": subject.dense(int(options.steps))[0]}
    told = {"prompt": subject.prompts[0], "tokens": subject.layout.tokens, "presets": {}, **facts()}
    for name in options.presets:
        run = subject.run(of_preset(name), options.steps)
        videos[name] = run.video[0]
        like = likeness(videos["dense"][None], run.video)
        told["presets"][name] = {key: round(values[0], 4) for key, values in like.items()}
        print(name, PRESETS[name].density, told["presets"][name], flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "presets.json").write_text(json.dumps(told, indent=1) + "\n")
        picture(videos).save(options.out / f"{options.model}.webp", quality=80, method=6)


if __name__ == "__main__":
    main()
