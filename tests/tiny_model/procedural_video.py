"""Short videos of moving shapes, the sentences that describe them, and their exact latents.

A scene is one or two shapes that move over a background. Its sentence says everything but the
positions, so a model that has learned the task can be checked by reading its video back:
`describe(video)` finds colour, shape, direction and speed again. Rich scenes, which the tiny model
does not know, also have patterned things, cloudy backgrounds and pans up and down.

Videos are [N, 3, F, Y, X] float in [0, 1]. Latents are what Wan21 calls model space:
[N, 16, F/2, Y/2, X/2]. Lengths are in frame heights, speeds in frame heights per frame.
"""

import hashlib
import math
import random
from dataclasses import dataclass, replace

import torch

SHAPES = ("circle", "square", "triangle", "star", "ring")
COLOURS = {
    "red": (0.90, 0.12, 0.14),
    "orange": (0.98, 0.52, 0.08),
    "yellow": (0.98, 0.88, 0.16),
    "green": (0.20, 0.80, 0.25),
    "cyan": (0.25, 0.88, 0.92),
    "blue": (0.20, 0.42, 0.98),
    "pink": (0.96, 0.42, 0.76),
    "white": (0.96, 0.96, 0.96),
}
BACKGROUNDS = {
    "navy": (0.10, 0.16, 0.40),
    "plum": (0.32, 0.12, 0.32),
    "forest": (0.10, 0.30, 0.15),
    "brown": (0.34, 0.21, 0.10),
    "slate": (0.26, 0.30, 0.34),
    "teal": (0.05, 0.30, 0.32),
}
PATTERNS = {
    "plain": "plain {}",
    "gradient": "a {} gradient",
    "stripes": "{} stripes",
    "checks": "{} checks",
    "clouds": "{} clouds",
}
PLAIN_WORLD = ("checks", "gradient", "plain", "stripes")
TEXTURES = ("", "striped", "dotted")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 0.009, "quickly": 0.023}
SIZES = {"small": (0.11, 0.14), "large": (0.19, 0.23)}
PAN_SPEED = 0.012
PANS = {"": (0, 0), "left": (1, 0), "right": (-1, 0), "up": (0, 1), "down": (0, -1)}
FRAMES_PER_LATENT = 2

# outer radius that makes every shape look as large as a circle of radius 1
OUTER_RADIUS = (1.0, 1.25, 1.5, 1.45, 1.12)
# corners, and inner over outer vertex radius, of the shapes with corners
CORNERS = {1: (4, math.cos(math.pi / 4)), 2: (3, 0.5), 3: (5, 0.45)}


@dataclass(frozen=True)
class Thing:
    """One moving shape; `x`, `y` is its centre half-way through the clip."""

    shape: str
    colour: str
    size: str
    direction: str
    speed: str
    spinning: bool
    radius: float
    x: float
    y: float
    angle: float
    texture: str = ""


@dataclass(frozen=True)
class Scene:
    """Things from front to back, over a background that may pan."""

    things: tuple[Thing, ...]
    pattern: str
    background: str
    pan: str
    angle: float
    phase: float


def random_scene(rng: random.Random, frames: int, aspect: float, rich: bool = False) -> Scene:
    """Draws a scene whose things stay in view for `frames` frames; `aspect` is width / height."""

    def place(extent: float, travel: float) -> float:
        room = max(0.5 * extent - 0.12 - 0.5 * abs(travel), 0.0)
        return 0.5 * extent + rng.uniform(-room, room)

    things = []
    for colour in rng.sample(sorted(COLOURS), rng.choice((1, 1, 2))):
        size, direction, speed = (rng.choice(sorted(t)) for t in (SIZES, DIRECTIONS, SPEEDS))
        shape = rng.choice(SHAPES)
        travel = SPEEDS[speed] * (frames - 1)
        dx, dy = DIRECTIONS[direction]
        things.append(
            Thing(
                shape=shape,
                colour=colour,
                size=size,
                direction=direction,
                speed=speed,
                spinning=SHAPES.index(shape) in CORNERS and rng.random() < 0.25,
                radius=rng.uniform(*SIZES[size]),
                x=place(aspect, travel * dx),
                y=place(1.0, travel * dy),
                angle=rng.uniform(0, 2 * math.pi),
                texture=rng.choice(TEXTURES) if rich else "",
            )
        )
    pattern = rng.choice((*PLAIN_WORLD, "clouds", "clouds") if rich else PLAIN_WORLD)
    pans = ("", "", "left", "right", *(("up", "down") if rich else ()))
    return Scene(
        things=tuple(t if t.spinning else replace(t, angle=0.0) for t in things),
        pattern=pattern,
        background=rng.choice(sorted(BACKGROUNDS)),
        pan=rng.choice(pans) if pattern != "plain" else "",
        angle=rng.choice((0.0, math.pi / 4, math.pi / 2)),
        phase=rng.random(),
    )


def prompt(scene: Scene) -> str:
    """The sentence of a scene, in the one order the model was trained on."""
    things = []
    for t in scene.things:
        looks = (t.size, t.texture, t.colour, "spinning" if t.spinning else "", t.shape)
        things.append(f"a {' '.join(filter(None, looks))} moving {t.direction} {t.speed}")
    ground = PATTERNS[scene.pattern].format(scene.background)
    pan = f" camera panning {scene.pan}" if scene.pan else ""
    return f"{' and '.join(things)} over {ground}{pan}"


TEXT_TOKENS = 32
TEXT_DIM = 64
WORD_DIM = 48


def _signs(key: str, dim: int) -> list[float]:
    digest = hashlib.sha256(key.encode()).digest()
    return [1.0 if digest[i // 8] >> (i % 8) & 1 else -1.0 for i in range(dim)]


def words_of(text: str) -> list[tuple[str, int]]:
    """Words with the clause they stand in: 0 the first thing, 1 the second, 2 the background.

    Cross-attention has no order, so the clause is what ties a colour to its shape.
    """
    words, clause = [], 0
    for word in text.lower().replace(",", " ").replace(".", " ").split():
        clause = {"and": 1, "over": 2}.get(word, clause)
        words.append((word, clause))
    return words[:TEXT_TOKENS]


def word_vector(word: str, clause: int) -> list[float]:
    """TEXT_DIM signs from hashes: the same on every machine, for any word."""
    return _signs(f"word {word}", WORD_DIM) + _signs(f"clause {clause}", TEXT_DIM - WORD_DIM)


def embed_prompt(text: str) -> torch.Tensor:
    """[TEXT_TOKENS, TEXT_DIM] float32; rows after the last word are zero."""
    embedding = torch.zeros(TEXT_TOKENS, TEXT_DIM)
    for i, (word, clause) in enumerate(words_of(text)):
        embedding[i] = torch.tensor(word_vector(word, clause))
    return embedding


def shape_distance(shape: torch.Tensor, x, y, radius, angle) -> torch.Tensor:
    """Signed distance to a shape's outline, negative inside; all arguments broadcast."""
    distance = torch.hypot(x, y)
    circle = distance - radius * OUTER_RADIUS[0]
    ring = (distance - radius * OUTER_RADIUS[4] * 0.78).abs() - radius * OUTER_RADIUS[4] * 0.22
    out = torch.where(shape == 4, ring, circle)
    heading = torch.atan2(x, -y) - angle
    for index, (corners, inner) in CORNERS.items():
        half = math.pi / corners
        # every edge is the first edge after folding the plane at the corners;
        # half a turn of the fold makes a square stand on an edge, not on a corner
        start = 2 * half if corners == 4 else half
        fold = (torch.remainder(heading + start, 2 * half) - half).abs()
        nx, ny = inner * math.sin(half), 1 - inner * math.cos(half)
        along = distance * (nx * fold.cos() + ny * fold.sin()) - nx * radius * OUTER_RADIUS[index]
        out = torch.where(shape == index, along / math.hypot(nx, ny), out)
    return out


WAVES = 7


def _waves(phase: float) -> list[float]:
    """Wave numbers along x and y, and the shifts, of the waves that make one scene's clouds."""
    rng = random.Random(phase)
    waves = []
    for _ in range(WAVES):
        angle, number = rng.uniform(0, math.pi), 2 * math.pi / rng.uniform(0.13, 0.5)
        waves += [number * math.cos(angle), number * math.sin(angle), rng.uniform(0, 2 * math.pi)]
    return waves


def parameters(scenes: list[Scene]) -> torch.Tensor:
    """[N, P] float32: all that `paint` needs to know."""
    rows, names = [], list(PATTERNS)
    for scene in scenes:
        row = [*BACKGROUNDS[scene.background], names.index(scene.pattern), scene.angle]
        row += [scene.phase, *PANS[scene.pan], *_waves(scene.phase)]
        for layer in (1, 0):
            # a scene without a second thing draws its first one twice
            t = scene.things[min(layer, len(scene.things) - 1)]
            row += [
                SHAPES.index(t.shape),
                t.x,
                t.y,
                *(SPEEDS[t.speed] * d for d in DIRECTIONS[t.direction]),
            ]
            row += [t.radius, t.angle, 0.10 if t.spinning else 0.0, TEXTURES.index(t.texture)]
            row += COLOURS[t.colour]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float32)


def _ground(colour, row: list, waves, x, y, t) -> torch.Tensor:
    kind, angle, phase, pan_x, pan_y = row
    x, y = x - pan_x * PAN_SPEED * t, y - pan_y * PAN_SPEED * t
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    wave = torch.sin(2 * math.pi * (u / 0.36 + phase))
    cross = torch.sin(2 * math.pi * (v / 0.36 + phase))
    slope = torch.sin(2 * math.pi * (u / 2.0 + phase))
    clouds = torch.zeros_like(wave)
    for kx, ky, shift in zip(*[iter(waves)] * 3, strict=True):
        clouds = clouds + torch.sin(kx * x + ky * y + shift)
    level = torch.where(kind == 1, slope, torch.zeros_like(wave))
    level = torch.where(kind == 2, (2.5 * wave).clamp(-1, 1), level)
    level = torch.where(kind == 3, (4 * wave * cross).clamp(-1, 1), level)
    level = torch.where(kind == 4, (0.7 * clouds).clamp(-1.2, 1.2), level)
    return colour * (1.0 + 0.38 * level[:, None])


def _dark(texture, x, y, angle) -> torch.Tensor:
    """How much of a thing's light its texture takes: 0 or 1, with soft edges."""
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    wave, cross = (torch.sin(2 * math.pi / 0.09 * axis) for axis in (u, v))
    striped, dotted = (2.0 * (wave - 0.35)).clamp(0, 1), (2.5 * (wave * cross - 0.25)).clamp(0, 1)
    return (texture == 1) * striped + (texture == 2) * dotted


def paint(parameters: torch.Tensor, frames: int, height: int, width: int) -> torch.Tensor:
    """[N, 3, F, Y, X] float32 in [0, 1] from what `parameters` gave."""
    device = parameters.device
    t = torch.arange(frames, device=device).float()[:, None, None] - 0.5 * (frames - 1)
    y = (torch.arange(height, device=device).float()[None, :, None] + 0.5) / height
    x = (torch.arange(width, device=device).float()[None, None, :] + 0.5) / height
    columns = list(parameters.T[..., None, None, None])

    def colour() -> torch.Tensor:
        return torch.stack([columns.pop(0) for _ in range(3)], 1)

    def take(count: int) -> list[torch.Tensor]:
        return [columns.pop(0) for _ in range(count)]

    video = _ground(colour(), take(5), take(3 * WAVES), x, y, t)
    for _ in range(2):
        shape, cx, cy, dx, dy, radius, angle, spin, texture = take(9)
        u, v, turn = x - cx - dx * t, y - cy - dy * t, angle + spin * t
        cover = (0.5 - shape_distance(shape, u, v, radius, turn) * height).clamp(0, 1)[:, None]
        surface = colour() * (1 - 0.65 * _dark(texture, u, v, turn))[:, None]
        video = torch.lerp(video.expand(-1, -1, frames, -1, -1), surface, cover)
    return video


def render(scenes: list[Scene], frames: int, height: int, width: int, device="cpu"):
    """[N, 3, F, Y, X] float32 in [0, 1]."""
    return paint(parameters(scenes).to(device), frames, height, width)


def _hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def _mapping() -> torch.Tensor:
    """[16, 24] with orthonormal rows: a patch of 3 colours x 2 frames x 2 rows x 2 columns.

    Eight rows carry brightness at full resolution, eight carry the two colour differences
    with the columns of the patch averaged (4:2:2 video does the same).
    """
    grey, warm, green = (
        torch.tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], dtype=torch.float64)
        / torch.tensor([[3.0], [2.0], [6.0]], dtype=torch.float64).sqrt()
    )
    pair = torch.full((1, 2), 0.5, dtype=torch.float64).sqrt()
    halved = torch.kron(_hadamard(4), pair)
    return torch.cat(
        [torch.kron(grey[None], _hadamard(8))]
        + [torch.kron(axis[None], halved) for axis in (warm, green)]
    )


MAPPING = _mapping()
# Brings the training videos to about zero mean and, in the slow channels (0, 8, 12), unit
# deviation. Fine detail is smaller than that in pixels, and is amplified: less noise is left.
SLOW_GAIN, DETAIL_GAIN = 1.7, 4.0
MIDDLE = (0.24, 0.265, 0.30)
GAIN = torch.tensor([SLOW_GAIN if c in (0, 8, 12) else DETAIL_GAIN for c in range(16)]).double()


def encode(video: torch.Tensor) -> torch.Tensor:
    """[N, 3, F, Y, X] in [0, 1] -> [N, 16, F/2, Y/2, X/2] in model space."""
    n, _, f, y, x = video.shape
    middle = torch.tensor(MIDDLE).to(video)[:, None, None, None]
    patches = (video - middle).reshape(n, 3, f // 2, 2, y // 2, 2, x // 2, 2)
    patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(n, f // 2, y // 2, x // 2, 24)
    matrix = (GAIN[:, None] * MAPPING).to(video)
    return (patches @ matrix.T).permute(0, 4, 1, 2, 3)


def decode(latent: torch.Tensor) -> torch.Tensor:
    """Exact inverse: encode(decode(latent)) is latent. Values may lie outside [0, 1]."""
    n, _, t, h, w = latent.shape
    matrix = (MAPPING / GAIN[:, None]).to(latent)
    patches = latent.permute(0, 2, 3, 4, 1) @ matrix
    patches = patches.reshape(n, t, h, w, 3, 2, 2, 2).permute(0, 4, 1, 5, 2, 6, 3, 7)
    middle = torch.tensor(MIDDLE).to(latent)[:, None, None, None]
    return patches.reshape(n, 3, 2 * t, 2 * h, 2 * w) + middle


def _best_shape(mask: torch.Tensor, cx: float, cy: float) -> str:
    """The shape, over a few sizes and angles, that overlaps a [Y, X] mask most."""
    height, width = mask.shape
    y = torch.arange(height)[:, None] + 0.5 - cy
    x = torch.arange(width)[None, :] + 0.5 - cx
    base = math.sqrt(float(mask.sum()) / math.pi)
    best = (-1.0, SHAPES[0])
    for index, shape in enumerate(SHAPES):
        turns = 12 if index in CORNERS else 1
        sector = 2 * math.pi / CORNERS[index][0] if index in CORNERS else 0.0
        for scale in (0.85, 0.93, 1.0, 1.08, 1.16, 1.25):
            for turn in range(turns):
                away = shape_distance(
                    torch.tensor(index), x, y, base * scale, turn * sector / turns
                )
                inside = away < 0
                overlap = float((inside & mask).sum()) / float((inside | mask).sum())
                best = max(best, (overlap, shape))
    return best[1]


def describe(video: torch.Tensor) -> list[dict[str, str]]:
    """Reads the things of one [3, F, Y, X] video back, the one that covers most first."""
    _, frames, height, width = video.shape
    palette = torch.tensor([COLOURS[name] for name in COLOURS])
    gap = (video.float().cpu()[None] - palette[:, :, None, None, None]).square().sum(1)
    near, which = gap.min(0)
    y = torch.arange(height).float()[:, None] + 0.5
    x = torch.arange(width).float()[None, :] + 0.5
    found = []
    for index, colour in enumerate(COLOURS):
        masks = (which == index) & (near < 0.06)
        area = masks.sum((1, 2)).float()
        # a thing is in view for a good part of the clip; edges between colours are thin
        seen = (area > 0.5 * area.max()) & (area > 0.012 * height * height)
        if int(seen.sum()) < frames // 3:
            continue
        cx = (masks * x).sum((1, 2)) / area.clamp(min=1)
        cy = (masks * y).sum((1, 2)) / area.clamp(min=1)
        t = torch.arange(frames).float()[seen]
        t = (t - t.mean()) / (t - t.mean()).square().sum()
        dx, dy = (float((t * c[seen]).sum()) / height for c in (cx, cy))
        across = abs(dx) > abs(dy)
        direction = ("left", "right")[dx > 0] if across else ("up", "down")[dy > 0]
        middle = int(area.argmax())
        cut = sum(SPEEDS.values()) / 2
        found.append(
            {
                "colour": colour,
                "shape": _best_shape(masks[middle], float(cx[middle]), float(cy[middle])),
                "direction": direction,
                "speed": "quickly" if max(abs(dx), abs(dy)) > cut else "slowly",
                "area": float(area.mean()) / (height * width),
            }
        )
    return sorted(found, key=lambda thing: -thing["area"])
