"""The demo's animations: two videos with their difference, and a race at their real pace."""

import re

import numpy as np
from PIL import Image, ImageDraw, ImageFont

AMPLIFIED = 8
GAP, HEAD = 24, 64
COLOURS = {"dense": (128, 128, 128), "search": (214, 126, 44), "sparse": (58, 150, 92)}
PAUSE = 500  # milliseconds between two pages of the race


def side_by_side(left: np.ndarray, right: np.ndarray, numbers: dict) -> Image.Image:
    """One frame of both, [Y, X, 3] uint8 each, and their difference, 8 times as strong as it is."""
    height, width = left.shape[:2]
    apart = np.abs(left.astype(int) - right.astype(int))
    panels = (left, right, np.clip(AMPLIFIED * apart, 0, 255).astype(np.uint8))
    step, sparse = numbers["dense_step_seconds"], numbers["step_seconds"]["sparse"]
    labels = (
        f"dense\none step {step:.2f} s",
        f"AdaSpa {numbers['preset']}, {numbers['psnr_db']:.1f} dB\n"
        f"one sparse step {sparse:.2f} s: {step / sparse:.1f}x",
        f"difference x {AMPLIFIED}",
    )
    page = Image.new("RGB", (3 * width + 2 * GAP, height + HEAD), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for i, (panel, label) in enumerate(zip(panels, labels, strict=True)):
        x = i * (width + GAP)
        page.paste(Image.fromarray(panel), (x, HEAD))
        pen.text((x + 4, 10), label, "black", font=font)
    return page


def kinds(steps: str) -> list[str]:
    """The kind of every step of such as "steps 0-1 dense, 2 search, 3-5 sparse"."""
    found = []
    for first, last, kind in re.findall(r"(\d+)(?:-(\d+))? (dense|search|sparse)", steps):
        found += [kind] * (int(last or first) - int(first) + 1)
    return found


def timelines(numbers: dict) -> list[list[tuple[float, str]]]:
    """When each step ends, in seconds, and its kind: dense run, AdaSpa run.

    Steps of a kind count as equally long, and all of a run take what the whole prompt took.
    """
    runs = (
        (["dense"] * numbers["sampler_steps"], {"dense": 1.0}, numbers["dense_seconds"]),
        (kinds(numbers["steps"]), numbers["step_seconds"], numbers["adaspa_seconds"]),
    )
    lines = []
    for steps, seconds, whole in runs:
        ends = np.cumsum([seconds[kind] for kind in steps])
        lines.append([*zip(ends * whole / ends[-1], steps, strict=True)])
    return lines


def race(left: np.ndarray, right: np.ndarray, numbers: dict) -> tuple[list[Image.Image], int]:
    """Pages of the two runs side by side at their real pace, and milliseconds between pages.

    A video shows up when its run is over. Frames are [Y, X, 3] uint8.
    """
    height, width = left.shape[:2]
    lines = timelines(numbers)
    font = ImageFont.load_default(16)
    pages = []
    for now in np.arange(0, max(line[-1][0] for line in lines) + 3, PAUSE / 1000):
        page = Image.new("RGB", (2 * width + GAP, height + HEAD), "white")
        pen = ImageDraw.Draw(page)
        for i, (frame, line) in enumerate(zip((left, right), lines, strict=True)):
            x, whole = i * (width + GAP), line[-1][0]
            name = ("dense", f"AdaSpa {numbers['preset']}")[i]
            pen.text((x + 4, 8), f"{name}, {min(now, whole):.1f} s", "black", font=font)
            for n, (end, kind) in enumerate(line):
                if end <= now:
                    box = [x + width * n // len(line), 36, x + width * (n + 1) // len(line) - 2, 56]
                    pen.rectangle(box, COLOURS[kind])
            if whole <= now:
                page.paste(Image.fromarray(frame), (x, HEAD))
        pages.append(page)
    return pages, PAUSE
