"""Draws a run: recall and density by layer and head, and the block map of one head."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, MUTED, PAPER, EMPTY = (32, 34, 38), (120, 124, 132), (255, 255, 255), (226, 228, 232)
WIDTH, MARGIN, GAP = 1120, 32, 28
PANEL = (WIDTH - 2 * MARGIN - 2 * GAP) // 3
# densities that lie nearer are one: budgets are whole blocks
EQUAL = 0.01
# dark blue to yellow, readable in grey and for colour-blind eyes
RAMP = np.array([(28, 32, 86), (40, 92, 142), (42, 150, 138), (124, 200, 92), (250, 226, 60)])


def colours(values: np.ndarray) -> np.ndarray:
    """Map values in [0, 1] to RGB uint8."""
    position = np.clip(values, 0, 1) * (len(RAMP) - 1)
    low = np.minimum(position.astype(int), len(RAMP) - 2)
    part = (position - low)[..., None]
    return (RAMP[low] * (1 - part) + RAMP[low + 1] * part).round().astype(np.uint8)


def draw(statistics, layer: int, head: int, lines: Sequence[str]) -> Image.Image:
    """Draw the report of a run, or of none."""
    title, body, small = (ImageFont.load_default(size) for size in (22, 15, 13))
    wrapped = [part for line in lines for part in textwrap.wrap(line, 140) or [""]]
    patterns = {} if statistics is None else statistics.patterns
    height = MARGIN + 40 + 22 * len(wrapped) + (PANEL + 110 if patterns else 0) + MARGIN
    image = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN), "AdaSpa run", INK, font=title)
    y = MARGIN + 40
    for line in wrapped:
        pen.text((MARGIN, y), line, INK, font=body)
        y += 22
    if not patterns:
        return image

    role = sorted(role for _, role in patterns)[-1]
    layers = sorted(number for number, r in patterns if r == role)
    y += 20
    for column, name in enumerate(("recall", "density")):
        values = np.array([getattr(patterns[number, role], name) for number in layers])
        x = MARGIN + column * (PANEL + GAP)
        low, high = float(values.min()), max(float(values.max()), float(values.min()) + 1e-6)
        if name == "density" and high - low < EQUAL:
            # as for all presets whose heads do not adapt: one number needs no picture
            told = f"Density, {role}", f"{values.mean():.2f} in every layer and head"
            pen.text((x, y), told[0], INK, font=body)
            pen.text((x, y + 26), told[1], MUTED, font=small)
            continue
        cells = colours((values - low) / (high - low))
        _panel(image, pen, x, y, cells, f"{name.capitalize()}, {role}", body)
        note = f"layers {layers[0]}-{layers[-1]} down, heads across"
        pen.text((x, y + 26 + PANEL + 6), note, MUTED, font=small)
        _legend(image, pen, x, y + 26 + PANEL + 28, low, high, small)

    layer = min(layers, key=lambda number: abs(number - layer))
    pattern = patterns[layer, role]
    head = min(head, len(pattern.recall) - 1)
    x = MARGIN + 2 * (PANEL + GAP)
    cells = pattern.block_map[head].numpy() / 255
    _panel(image, pen, x, y, colours(cells), f"Blocks of layer {layer}, head {head}", body)
    note = f"keys across, queries down; density {pattern.density[head]:.2f}"
    pen.text((x, y + 26 + PANEL + 6), note, MUTED, font=small)
    how = "carried, sampled" if pattern.carried else "searched"
    found = f"recall {pattern.recall[head]:.3f}, {how} at step {pattern.step + 1}"
    pen.text((x, y + 26 + PANEL + 26), found, MUTED, font=small)
    return image


def _panel(image, pen, x, y, rgb, heading, font):
    pen.text((x, y), heading, INK, font=font)
    panel = Image.fromarray(rgb).resize((PANEL, PANEL), Image.Resampling.NEAREST)
    image.paste(panel, (x, y + 26))
    pen.rectangle((x - 1, y + 25, x + PANEL, y + 26 + PANEL), outline=EMPTY)


def _legend(image, pen, x, y, low, high, font):
    ramp = Image.fromarray(colours(np.linspace(0, 1, 120))[None]).resize((120, 10))
    pen.text((x, y), f"{low:.2f}", MUTED, font=font)
    image.paste(ramp, (x + 36, y + 4))
    pen.text((x + 162, y), f"{high:.2f}", MUTED, font=font)
