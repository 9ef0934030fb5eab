"""The pictures beside the graphs in workflows/. `python tests/workflows/workflow_thumbnails.py` draws them.

Each shows its graph, with our nodes lit, and a block pattern made up by a formula. Nothing in them
is the output of a model.
"""

from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tests.workflows.workflow_builder import TITLE_HEIGHT, Graph
from tests.workflows.workflow_graphs import WORKFLOWS, graphs

WIDTH, HEIGHT = 720, 405
MOST_BYTES = 30_000
FINE = 2  # drawn larger and scaled down, for smooth edges

TITLES = {
    "cogvideox_1_5_void_repaint": ("CogVideoX 1.5", "VOID: repaint a video"),
    "hunyuanvideo_1_5_i2v": ("HunyuanVideo 1.5", "picture to video"),
    "hunyuanvideo_1_5_t2v": ("HunyuanVideo 1.5", "text to video"),
    "kandinsky5_t2v": ("Kandinsky 5", "text to video"),
    "ltx_2_3_i2v": ("LTX-2.3", "picture to video with sound"),
    "ltx_2_3_t2v": ("LTX-2.3", "text to video with sound"),
    "minimax_h3_i2v": ("MiniMax-H3", "picture to video with sound"),
    "minimax_h3_t2v": ("MiniMax-H3", "text to video with sound"),
    "wan2_1_vace_14b_reference_4_step_lora": ("Wan VACE 14B", "from a reference, 4-step LoRA"),
    "wan2_2_14b_i2v": ("Wan 2.2 14B", "picture to video"),
    "wan2_2_14b_t2v": ("Wan 2.2 14B", "text to video"),
    "wan2_2_14b_t2v_4_step_lora": ("Wan 2.2 14B", "text to video, 4-step LoRA"),
    "wan2_2_14b_t2v_long_context_windows": ("Wan 2.2 14B", "long video, context windows"),
    "wan2_2_5b_t2v_i2v": ("Wan 2.2 5B", "text or picture to video"),
    "wan2_2_5b_t2v_subgraph": ("Wan 2.2 5B", "text to video, AdaSpa in one box"),
}

PAPER, GROUP, NODE, EDGE, LINK = "#171c22", "#1f272f", "#39444f", "#4c5a67", "#5d6b78"
OURS, OURS_EDGE, OURS_LINK = "#2a9d8f", "#8fe3d3", "#45c4b0"
INK, MUTED = "#f2f5f7", "#9aa8b4"
# the ramp of the report's picture, and what a skipped block looks like
RAMP = np.array([(28, 32, 86), (40, 92, 142), (42, 150, 138), (124, 200, 92), (250, 226, 60)])
SKIPPED = (27, 34, 41)
BLOCKS, KEPT, CELL = 42, 0.2, 5
GRAPH_BOX = (28, 112, 452, 377)
PATTERN = (482, 112)


def pattern(name: str) -> np.ndarray:
    """A block map [BLOCKS, BLOCKS] in [0, 1]: near frames, same places, a few places all read."""
    draw = np.random.default_rng(crc32(name.encode()))
    frame = int(draw.integers(6, 11))
    row, column = np.mgrid[:BLOCKS, :BLOCKS]
    apart = np.abs(row - column)
    same_place = np.minimum(apart % frame, frame - apart % frame)
    mass = 2.2 * np.exp(-apart / draw.uniform(0.7, 1.5))
    mass += np.exp(-same_place * 1.6 - apart / (6 * frame))
    mass += 0.7 * np.isin(column, draw.choice(BLOCKS, 2, replace=False))
    mass += 0.25 * draw.random((BLOCKS, BLOCKS))
    kept = np.zeros_like(mass)
    best = np.argsort(-mass, axis=1)[:, : round(KEPT * BLOCKS)]
    np.put_along_axis(kept, best, np.take_along_axis(mass, best, 1), 1)
    return np.clip(kept / 2.6, 0, 1)


def colours(values: np.ndarray) -> np.ndarray:
    at = values**0.6 * (len(RAMP) - 1)
    low = np.minimum(at.astype(int), len(RAMP) - 2)
    part = (at - low)[..., None]
    rgb = RAMP[low] * (1 - part) + RAMP[low + 1] * part
    return np.where(values[..., None] > 0, rgb, SKIPPED).round().astype(np.uint8)


def scaled(groups: list[dict]):
    """A function from a graph's (x, y) to the picture's, which centres the groups in GRAPH_BOX."""
    left, top, right, bottom = (FINE * edge for edge in GRAPH_BOX)
    bounds = np.array([group["bounding"] for group in groups])
    (x0, y0), (x1, y1) = bounds[:, :2].min(0), (bounds[:, :2] + bounds[:, 2:]).max(0)
    scale = min((right - left) / (x1 - x0), (bottom - top) / (y1 - y0))
    dx = left + (right - left - scale * (x1 - x0)) / 2
    dy = top + (bottom - top - scale * (y1 - y0)) / 2
    return lambda x, y: (dx + scale * (x - x0), dy + scale * (y - y0))


def curve(start, end, points: int = 24) -> list[tuple[float, float]]:
    """A link as the interface draws it: leaving to the right, arriving from the left."""
    (x0, y0), (x1, y1) = start, end
    pull = max(abs(x1 - x0) / 2, 12 * FINE)
    t = np.linspace(0, 1, points)[:, None]
    knots = np.array([(x0, y0), (x0 + pull, y0), (x1 - pull, y1), (x1, y1)])
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    return [tuple(p) for p in sum(w * knot for w, knot in zip(weights, knots, strict=True))]


def draw_graph(pen: ImageDraw.ImageDraw, graph: Graph) -> None:
    nodes = {node["id"]: node for node in graph.nodes if node["type"] != "MarkdownNote"}
    place = scaled(graph.groups)
    ours = {
        number
        for number, node in nodes.items()
        if node["type"].startswith("AdaSpa") or "proxyWidgets" in node["properties"]
    }
    boxes = {}
    for number, node in nodes.items():
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[number] = (*place(x, y - TITLE_HEIGHT), *place(x + width, y + height))
    for x, y, width, height in (group["bounding"] for group in graph.groups):
        pen.rounded_rectangle((*place(x, y), *place(x + width, y + height)), 4 * FINE, GROUP)

    def socket(number: int, slot: int, x: int) -> tuple[float, float]:
        left, top, right, bottom = boxes[number]
        return (right if x else left), min(top + (6 + 3 * slot) * FINE, bottom - FINE)

    # links of our nodes last, so that they lie on top
    for _, start, from_slot, end, to_slot, _ in sorted(
        graph.links, key=lambda link: link[1] in ours or link[3] in ours
    ):
        lit = start in ours or end in ours
        line = curve(socket(start, from_slot, 1), socket(end, to_slot, 0))
        pen.line(line, OURS_LINK if lit else LINK, FINE + (FINE // 2 if lit else 0))
    for number, box in boxes.items():
        lit = number in ours
        fill, edge = (OURS, OURS_EDGE) if lit else (NODE, EDGE)
        pen.rounded_rectangle(box, 2 * FINE, fill, edge, FINE if lit else 1)


def draw(graph: Graph) -> Image.Image:
    image = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT), PAPER)
    pen = ImageDraw.Draw(image)
    large, middle, small = (ImageFont.load_default(FINE * size) for size in (34, 18, 13))
    title, task = TITLES[graph.name]
    pen.text((FINE * 28, FINE * 22), title, INK, font=large)
    pen.text((FINE * 28, FINE * 66), task, MUTED, font=middle)
    pen.text((FINE * (WIDTH - 28), FINE * 30), "AdaSpa", OURS_LINK, font=middle, anchor="ra")
    draw_graph(pen, graph)

    edge = FINE * BLOCKS * CELL
    x, y = (FINE * part for part in PATTERN)
    cells = Image.fromarray(colours(pattern(graph.name)))
    image.paste(cells.resize((edge, edge), Image.Resampling.NEAREST), (x, y))
    pen.text((x, y + edge + 8 * FINE), "Balanced: 20 % of the blocks kept", MUTED, font=small)
    pen.text((x, y + edge + 26 * FINE), "illustration", LINK, font=small)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    for graph in graphs():
        draw(graph).save(WORKFLOWS / f"{graph.name}.jpg", quality=78, optimize=True)
