"""Draws the square pictures for ComfyUI's template browser, and the registry's icon and banner.

    python tests/workflows/draw_pictures.py

On a picture of a graph the name of the model stands large above the task, in the colour of its
family. The block patterns are made of random numbers: decorations, not measurements.
"""

import re
import sys
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
# run as a script, Python looks beside the script only
sys.path.insert(0, str(ROOT))

from tests.workflows.stored_graphs import FILES  # noqa: E402

SIDE, MARGIN, CELL = 720, 48, 24
DARK, LIGHT = (18, 22, 28), (245, 247, 250)
# the first word of a name
COLOURS = {
    "MiniMax-H3": (226, 88, 76),
    "Wan": (74, 132, 230),
    "LTX-2.3": (224, 158, 48),
    "LTX-2.5": (224, 158, 48),
    "SCAIL-2": (74, 132, 230),
    "HunyuanVideo": (66, 168, 120),
    "Kandinsky": (166, 98, 208),
    "CogVideoX": (52, 166, 182),
}
# what names the model; the rest is the task
MODEL = re.compile(r"(\S+(?: \d[\w.]*)*(?: \d+B| VACE| VOID| Animate 2)?) (.*)")


def draw(name: str) -> Image.Image:
    """The picture of a graph of this name, without its number. [720, 720] RGB."""
    model, task = MODEL.fullmatch(name).groups()
    colour = COLOURS[name.split()[0]]
    picture = Image.new("RGB", (SIDE, SIDE), DARK)
    brush = ImageDraw.Draw(picture)
    pattern(brush, (0, SIDE * 2 // 3, SIDE, SIDE), CELL, colour, name)
    brush.rectangle((0, 0, SIDE, 14), colour)
    y = MARGIN
    for text, size, fill in ((model, 116, LIGHT), (task, 62, colour)):
        font = ImageFont.load_default(size)
        for line in lines(text, font, SIDE - 2 * MARGIN):
            while font.getlength(line) > SIDE - 2 * MARGIN:
                font = ImageFont.load_default(font.size - 2)
            brush.text((MARGIN, y), line, fill, font)
            y += int(font.size * 1.15)
        y += 8
    return picture


def pattern(brush, box, cell: int, colour, seed: str) -> None:
    """Fill a box (left, top, right, bottom) with square blocks, most of them near its diagonal."""
    left, top, right, bottom = box
    row, column = np.indices(((bottom - top) // cell, (right - left) // cell))
    # a box wider than high shows the lower part of a square
    near = np.exp(-np.abs(row + (right - left - bottom + top) // cell - column) / 3)
    kept = np.random.default_rng(crc32(seed.encode())).random(row.shape) < 0.08 + near
    shade = tuple(int(d + (c - d) * 0.75) for c, d in zip(colour, DARK, strict=True))
    for y, x in np.argwhere(kept):
        corner = left + int(x) * cell, top + int(y) * cell
        brush.rectangle((*corner, corner[0] + cell - 3, corner[1] + cell - 3), shade)


def icon() -> Image.Image:
    """[400, 400] RGB."""
    picture = Image.new("RGB", (400, 400), DARK)
    pattern(ImageDraw.Draw(picture), (40, 40, 360, 360), 40, COLOURS["HunyuanVideo"], "AdaSpa")
    return picture


def banner() -> Image.Image:
    """[540, 1260] RGB, 21:9."""
    picture = Image.new("RGB", (1260, 540), DARK)
    brush = ImageDraw.Draw(picture)
    pattern(brush, (780, 60, 1200, 480), 30, COLOURS["HunyuanVideo"], "AdaSpa")
    brush.text((70, 130), "AdaSpa", LIGHT, ImageFont.load_default(160))
    brush.text(
        (78, 320), "Long videos sample sooner", COLOURS["HunyuanVideo"], ImageFont.load_default(52)
    )
    return picture


def lines(text: str, font, width: int) -> list[str]:
    """Break between words, so that each line is as long as fits."""
    found = []
    for word in text.split():
        if found and font.getlength(f"{found[-1]} {word}") <= width:
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def main() -> None:
    for name, path in FILES.items():
        draw(name).save(path.with_suffix(".jpg"), quality=80, optimize=True)
    icon().save(ROOT / ".github" / "icon.png", optimize=True)
    banner().save(ROOT / ".github" / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
