"""Trains the lab's models side by side on one GPU, each by the recipe in `models.py`.

    python tests/lab/train_models.py --comfyui PATH --out OUT --minutes 8

OUT then holds one folder per model: weights, `training.json` with the loss and the checks, and
contact sheets. Two models share the GPU better than they take turns: one compiles, draws scenes or
checks while the other computes.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from models import MODELS, TINY

RECIPES = {name: spec for name, spec in MODELS.items() if spec.recipe}


def command(name: str, options) -> list[str]:
    words = [sys.executable, str(TINY / "train.py"), "--name", name]
    words += RECIPES[name].recipe.split()
    words += ["--comfyui", options.comfyui, "--minutes", str(options.minutes)]
    words += ["--out", str(options.out / name)]
    return words + options.more.split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH", ""))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="for training, checks on top")
    parser.add_argument("--models", nargs="+", choices=tuple(RECIPES), default=["wan128", "joint"])
    parser.add_argument("--more", default="", help="more arguments for train.py, in one string")
    options = parser.parse_args()
    running = [subprocess.Popen(command(name, options)) for name in options.models]
    sys.exit(max([process.wait() for process in running]))


if __name__ == "__main__":
    main()
