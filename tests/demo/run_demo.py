"""Samples one short video twice in a real ComfyUI, dense and with AdaSpa, and compares them.

Writes into demo_output/: the two videos with their difference, a race of the two, the report's
picture, a table, the numbers.
"""

import argparse
import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "demo")]

from drawings import race, side_by_side  # noqa: E402
from graph import ON_A_CPU, PROMPT, graph  # noqa: E402
from tools.comfy_server import ComfyServer, ServerFailed  # noqa: E402

from sparse_attn.config import PRESET_FIELDS, PRESETS  # noqa: E402


def from_to(least: int, most: int):
    """What reads a number of the command line, within the bounds of ComfyUI's sampler."""

    def read(text: str) -> int:
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return int(text)

    # argparse names it where a text is no number
    read.__name__ = "whole number"
    return read


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", default="Balanced", choices=["Quality", "Balanced", "Fast", "Paper"]
    )
    parser.add_argument("--steps", type=from_to(1, 10_000), default=20)
    parser.add_argument("--seed", type=from_to(0, (1 << 64) - 1), default=1)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--out", type=Path, default=ROOT / "demo_output")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    tiny = ROOT / "tests" / "tiny_model"
    home = Path(os.environ.get("ADASPA_HOME") or ROOT / ".adaspa")
    server = ComfyServer(
        os.environ["COMFYUI_PATH"],
        home / "demo",
        extra_custom_nodes=[("adaspa_tiny_model", tiny)],
        model_files=[tiny / "tiny_wan.safetensors.xz"],
    )
    print(f'Prompt: "{options.prompt}", seed {options.seed}, {options.steps} steps')
    print("Starting ComfyUI ...", flush=True)
    try:
        with server:
            print(f"ComfyUI is up after {server.started_in:.0f} s", flush=True)
            # the first prompt loads the model and warms every cache, so neither side pays for it
            sample(server, options, enabled=False, steps=1)
            dense = sample(server, options, enabled=False)
            print(f"dense     {dense['seconds']:6.1f} s", flush=True)
            sparse = sample(server, options, enabled=True)
            print(f"AdaSpa    {sparse['seconds']:6.1f} s", flush=True)
    except ServerFailed as failure:
        print(failure)
        return 1
    numbers = compare(dense, sparse, options)
    write(dense, sparse, numbers, options)
    return 0


def sample(server, options, *, enabled: bool, steps: int | None = None) -> dict:
    """Run the workflow once: frames [N, Y, X, 3] uint8, seconds, those of all cores, the report."""
    preset, settings = options.preset, {}
    if not torch.cuda.is_available():
        decided = {name: getattr(PRESETS[preset], name) for name in PRESET_FIELDS}
        preset, settings = "Custom", decided | ON_A_CPU
    prompt = graph(
        preset=preset, enabled=enabled, prompt=options.prompt, seed=options.seed,
        steps=steps or options.steps, settings=settings,
    )  # fmt: skip
    if not enabled:
        # no run, no report
        del prompt["report"]
        prompt["frames"]["inputs"]["samples"] = ["sampler", 0]
    process = psutil.Process(server.process.pid)
    started, before = time.perf_counter(), sum(process.cpu_times()[:2])
    entry = server.post(prompt, timeout=1800)
    seconds = time.perf_counter() - started
    computed = sum(process.cpu_times()[:2]) - before
    outputs = entry["outputs"]
    frames = [np.asarray(image_of(server, file)) for file in outputs["save"]["images"]]
    result = {"frames": np.stack(frames), "seconds": seconds, "processor_seconds": computed}
    if enabled:
        result["report"] = outputs["report"]["adaspa"][0]
        result["text"] = outputs["report"]["text"][0]
        result["picture"] = image_of(server, outputs["report"]["images"][0])
    return result


def image_of(server, file: dict) -> Image.Image:
    return Image.open(io.BytesIO(server.view(file))).convert("RGB")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 videos, in dB; infinite when equal."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def compare(dense: dict, sparse: dict, options) -> dict:
    report = sparse["report"]
    return {
        "preset": options.preset + ("" if torch.cuda.is_available() else ", one search"),
        "prompt": options.prompt,
        "seed": options.seed,
        "sampler_steps": options.steps,
        "dense_seconds": dense["seconds"],
        # decoding and saving included, a few per cent of it
        "dense_step_seconds": dense["seconds"] / options.steps,
        "adaspa_seconds": sparse["seconds"],
        # both cores together; on a machine with other work these say more
        "dense_processor_seconds": dense["processor_seconds"],
        "adaspa_processor_seconds": sparse["processor_seconds"],
        "load": psutil.getloadavg()[2] / psutil.cpu_count(),
        "psnr_db": psnr(dense["frames"], sparse["frames"]),
        **report,
    }


def table(numbers: dict) -> str:
    """The comparison in Markdown; every figure was measured just now."""
    steps = numbers["step_seconds"]
    call = numbers["dense_call_seconds"], numbers["sparse_call_seconds"]
    rows = [
        ("", "dense", f"AdaSpa {numbers['preset']}"),
        (
            "whole prompt",
            f"{numbers['dense_seconds']:.1f} s",
            f"{numbers['adaspa_seconds']:.1f} s "
            f"({numbers['dense_seconds'] / numbers['adaspa_seconds']:.1f}x)",
        ),
        *processor_row(numbers),
        (
            "one step (AdaSpa: a sparse one)",
            f"{numbers['dense_step_seconds']:.2f} s",
            f"{steps['sparse']:.2f} s ({numbers['dense_step_seconds'] / steps['sparse']:.1f}x)",
        ),
        ("one attention call", f"{call[0]:.3f} s", f"{call[1]:.3f} s"),
        ("density", "1.00", f"{numbers['density']:.2f}"),
        ("recall at the search", "1.00", f"{numbers['recall']:.3f}"),
        ("PSNR against dense", "", f"{numbers['psnr_db']:.1f} dB"),
    ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- | --- | --- |", *lines[1:]])


def processor_row(numbers: dict) -> list[tuple[str, str, str]]:
    """What the processor computed for each prompt, where there is no GPU."""
    if torch.cuda.is_available():
        return []
    dense, sparse = numbers["dense_processor_seconds"], numbers["adaspa_processor_seconds"]
    return [
        (
            f"its processor time (load {numbers['load']:.1f} a core)",
            f"{dense:.1f} s",
            f"{sparse:.1f} s ({dense / sparse:.1f}x)",
        )
    ]


def recorded_on_a_gpu() -> str:
    """What sparse steps of large models took, from the figures that travel with the pack."""
    source = ROOT / "tests" / "bench" / "results" / "families_h200.json"
    stacks = json.loads(source.read_text(encoding="utf-8"))["stacks"].values()
    lines = ["Recorded earlier, two layers of each model at real size, random weights:", ""]
    lines += ["| model and video | dense step | sparse step | |", "| --- | --- | --- | --- |"]
    for stack in stacks:
        dense, sparse = stack["seconds"]["dense"], stack["seconds"]["sparse_0.2"]
        video = f"{stack['model']}, {stack['video']}"
        lines.append(f"| {video} | {dense:.2f} s | {sparse:.2f} s | {dense / sparse:.1f}x |")
    (hardware,) = {stack["hardware"] for stack in stacks}
    return "\n".join([*lines, "", f"{hardware}; source: {source.relative_to(ROOT).as_posix()}"])


def write(dense: dict, sparse: dict, numbers: dict, options) -> None:
    out = options.out
    pages = [
        side_by_side(a, b, numbers) for a, b in zip(dense["frames"], sparse["frames"], strict=True)
    ]
    save_animation(pages, out / "side_by_side.webp", 80)
    frames, pause = race(dense["frames"][0], sparse["frames"][0], numbers)
    save_animation(frames, out / "race.webp", pause)
    sparse["picture"].save(out / "report.png")
    text = f"{table(numbers)}\n\n{sparse['text']}\n\n{recorded_on_a_gpu()}"
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(f"\n{text}\n")
    for name in ("side_by_side.webp", "race.webp", "report.png", "table.md", "numbers.json"):
        print(f"{out / name}")


def save_animation(pages: list, path: Path, pause: int) -> None:
    """Args: pause: milliseconds between two pages."""
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=pause, loop=0, quality=88)


if __name__ == "__main__":
    sys.exit(main())
