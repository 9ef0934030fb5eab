"""Draws how memory grows with the length of a video, from figures of `bench_memory.py`.

    python tests/bench/plot_memory.py tests/bench/results/memory_h200.json --out tests/bench/results/memory.svg

Above: what a call takes beside q, k, v and its output. Below: what 60 layers hold for one prompt.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lab"))

from plots import lines

LAYERS = 60
CALLS = {
    "tail 64x64": {"search": "search", "sparse": "sparse, tail", "search again, and sparse": "later search"},
    "tail 64x64 int8": {"sparse": "sparse, tail, INT8", "search again, and sparse": "later search, INT8"},
    "none 64x64": {"sparse": "sparse, no tail"},
}  # fmt: skip


def curves(runs: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """{what: [(thousands of tokens, GiB), ...]}; of steps that come twice the larger figure."""
    found: dict[str, dict[float, float]] = {}

    def add(name: str, tokens: int, gib: float):
        points = found.setdefault(name, {})
        points[tokens / 1000] = max(gib, points.get(tokens / 1000, 0.0))

    for run in runs:
        for step in run["steps"]:
            name = CALLS.get(run["setting"], {}).get(step["step"])
            if name:
                add(name, run["tokens"], step["work_gib"])
            elif "gib" in step and run["setting"] == "tail 64x64":
                add(f"held, {LAYERS} layers", run["tokens"], LAYERS * step["gib"])
    return {name: sorted(points.items()) for name, points in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    runs = [
        x for command in json.loads(options.file.read_text())["growth"] for x in command["runs"]
    ]
    lines(
        curves(runs), "thousands of tokens (5, 10, 16 and 24 s of HunyuanVideo 720p)", "GiB",
        "Memory by length of the video", options.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
