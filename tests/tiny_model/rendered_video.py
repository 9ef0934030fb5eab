"""Short videos of solid things on a floor, rendered by ray casting, and the sentences for them.

Where `procedural_video` draws flat shapes, here things hide each other, throw shadows, have textures
on their surfaces and stand on a textured floor under a moving camera. Sentences have the same form,
so the text, the latents and the training are those of `procedural_video`.

Space is right-handed for a viewer: x to the right, y up, z away from the camera; the floor is y = 0 and
the length unit is about two things' heights. Pixels lie `FOCAL` frame heights behind the lens. Speeds
are per frame. Videos are [N, 3, F, Y, X] float32 in [0, 1].
"""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from procedural_video import COLOURS

KINDS = ("ball", "box", "barrel")
TEXTURES = ("", "striped", "checked")
FLOORS = ("checks", "stripes", "clouds")
GROUNDS = {
    "grey": (0.55, 0.55, 0.56), "sandy": (0.72, 0.60, 0.42), "green": (0.34, 0.50, 0.28),
    "brown": (0.45, 0.32, 0.22), "blue": (0.32, 0.40, 0.58),
}  # fmt: skip
SKIES = ((0.62, 0.76, 0.92), (0.86, 0.78, 0.70), (0.72, 0.74, 0.78))
SIZES = {"small": (0.24, 0.32), "large": (0.42, 0.54)}
MOVES = {
    "standing": (0, 0), "moving left": (-1, 0), "moving right": (1, 0), "coming nearer": (0, -1),
    "going away": (0, 1),
}  # fmt: skip
SPEED, CAMERA_SPEED, TURN = 0.028, 0.026, 0.010  # lengths, lengths, radians a frame
# along x, along z, turn
CAMERAS = {
    "": (0, 0, 0), "moving left": (-1, 0, 0), "moving right": (1, 0, 0), "moving forward": (0, 1, 0),
    "moving back": (0, -1, 0), "turning left": (0, 0, -1), "turning right": (0, 0, 1),
}  # fmt: skip
POSTS = 4
HEIGHT, BACK, PITCH, FOCAL = 1.3, 3.6, 0.22, 1.25
AMBIENT, FOG = 0.38, 16.0  # light in shadow; distance at which the floor is 63 % sky
PRIMITIVE = 14  # numbers a primitive: kind, centre, half sizes, turn, motion, texture, colour
FAR = 1e6
MOST_RAYS = 2**24  # cast at once: a vector for each takes 200 MB


@dataclass(frozen=True)
class Thing:
    """A solid on the floor; `x`, `z` is its place half-way through the clip."""

    kind: str
    colour: str
    size: str
    texture: str
    move: str
    radius: float
    x: float
    z: float
    turn: float

    @property
    def half(self) -> tuple[float, float, float]:
        """Half sizes along x, y and z."""
        r = self.radius
        return {"ball": (r, r, r), "box": (0.8 * r, 0.8 * r, 0.8 * r)}.get(
            self.kind, (0.65 * r, r, 0.65 * r)
        )


@dataclass(frozen=True)
class Scene:
    """Things, the nearest first; posts as (x, z, half height) or none."""

    things: tuple[Thing, ...]
    posts: tuple[tuple[float, float, float], ...]
    floor: str
    ground: str
    camera: str
    sky: int
    sun: float
    phase: float


def random_scene(rng: random.Random, frames: int, aspect: float, rich: bool = True) -> Scene:
    """Draws a scene whose things stay in view for `frames` frames; `aspect` is width / height.

    Args:
        rich: whether there are textures on things, posts, and a camera that moves.
    """
    camera = rng.choice(tuple(CAMERAS)) if rich else ""
    drift = CAMERA_SPEED * frames / 2 * bool(CAMERAS[camera][0]) + 0.3 * bool(CAMERAS[camera][2])
    things = []
    colours = rng.sample(sorted(COLOURS), 2)
    for depth, colour in zip(((-0.9, 0.3), (0.8, 2.4)), colours, strict=True):
        move, size, z = rng.choice(tuple(MOVES)), rng.choice(sorted(SIZES)), rng.uniform(*depth)
        reach = 0.5 * aspect / FOCAL * (BACK + z) - 0.5 - drift
        reach -= SPEED * frames / 2 * abs(MOVES[move][0])
        things.append(
            Thing(
                rng.choice(KINDS), colour, size, rng.choice(TEXTURES) if rich else "", move,
                rng.uniform(*SIZES[size]), rng.uniform(-1, 1) * max(reach, 0.0), z,
                rng.uniform(0, math.pi),
            )
        )  # fmt: skip
    posts = ()
    if rich and rng.random() < 0.5:
        places = [(i + rng.uniform(0.2, 0.8)) / POSTS * 8 - 4 for i in range(POSTS)]
        posts = tuple((x, rng.uniform(2.8, 6.0), rng.uniform(0.5, 0.9)) for x in places)
    kept = things if rng.random() < 0.7 else [rng.choice(things)]
    return Scene(
        tuple(kept), posts, rng.choice(FLOORS), rng.choice(sorted(GROUNDS)), camera,
        rng.randrange(len(SKIES)), rng.choice((-1, 1)) * rng.uniform(0.6, 1.5), rng.random(),
    )  # fmt: skip


def prompt(scene: Scene) -> str:
    """The sentence of a scene; "and" and "over" begin the clauses that `words_of` tells apart."""
    things = [
        f"a {' '.join(filter(None, (t.size, t.texture, t.colour, t.kind)))} {t.move}"
        for t in scene.things
    ]
    text = f"{' and '.join(things)} over {scene.ground} {scene.floor}"
    text += " with posts" if scene.posts else ""
    return text + (f" camera {scene.camera}" if scene.camera else "")


def parameters(scenes: list[Scene]) -> torch.Tensor:
    """[N, P] float32: all that `paint` needs to know."""
    rows = []
    for scene in scenes:
        row = [*GROUNDS[scene.ground], FLOORS.index(scene.floor), scene.phase, *SKIES[scene.sky]]
        along, away, turn = CAMERAS[scene.camera]
        row += [scene.sun, along * CAMERA_SPEED, away * CAMERA_SPEED, turn * TURN]
        solids = []
        for t in scene.things:
            dx, dz = (SPEED * d for d in MOVES[t.move])
            solids.append([
                KINDS.index(t.kind), t.x, t.half[1], t.z, *t.half, t.turn, dx, dz,
                TEXTURES.index(t.texture), *COLOURS[t.colour],
            ])  # fmt: skip
        for x, z, half in scene.posts:
            shade = (0.42, 0.36, 0.31)
            solids.append([1, x, half, z, 0.11, half, 0.11, 0.4, 0, 0, 0, *shade])
        # what is not there has no size and lies below the floor
        nothing = [0, 0, -FAR, 0, *[1e-3] * 3, *[0] * (PRIMITIVE - 7)]
        solids += [nothing] * (2 + POSTS - len(solids))
        rows.append(row + [number for solid in solids for number in solid])
    return torch.tensor(rows, dtype=torch.float32)


def _turned(v: torch.Tensor, angle) -> torch.Tensor:
    """[..., 3] turned about the y axis."""
    x, y, z = v.unbind(-1)
    c, s = angle.cos(), angle.sin()
    return torch.stack(torch.broadcast_tensors(c * x - s * z, y, s * x + c * z), -1)


def _span(origin, ray, kind, half) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where a ray enters and leaves a solid at the origin, and which side it enters: 0, 1, 2 for the
    planes across x, y and z, 3 for a round side. It misses where it would leave before it enters."""
    speed = torch.where(ray.abs() < 1e-9, torch.full_like(ray, 1e-9), ray)
    near, far = (-half - origin) / speed, (half - origin) / speed
    near, far = torch.minimum(near, far), torch.maximum(near, far)
    enter, side = near.max(-1)
    leave = far.amin(-1)

    def round_side(axes):
        """Of a sphere, or of a cylinder that stands: over all axes, or over x and z."""
        o, d = origin[..., axes], ray[..., axes]
        a, b = d.square().sum(-1), (o * d).sum(-1)
        inside = b.square() - a * (o.square().sum(-1) - half[..., 0].square())
        root = inside.clamp(min=0).sqrt() / a
        missed = torch.full_like(root, FAR) * (inside < 0)
        return -b / a - root + missed, -b / a + root - missed

    ball_in, ball_out = round_side([0, 1, 2])
    tube_in, tube_out = round_side([0, 2])
    barrel_in = torch.maximum(tube_in, near[..., 1])
    barrel_side = torch.where(tube_in > near[..., 1], 3, 1)
    barrel_out = torch.minimum(tube_out, far[..., 1])
    enter = torch.where(kind == 0, ball_in, torch.where(kind == 2, barrel_in, enter))
    leave = torch.where(kind == 0, ball_out, torch.where(kind == 2, barrel_out, leave))
    side = torch.where(kind == 0, 3, torch.where(kind == 2, barrel_side, side))
    return enter, leave, side


def _pattern(texture, place, half) -> torch.Tensor:
    """Light of a thing's surface, 0.45 to 1: `place` is the point from its centre, unturned."""
    u, v, w = (torch.sin(2 * math.pi / 0.3 * x) for x in (place + half).unbind(-1))
    striped, checked = 4 * v, 6 * u * v * w
    level = torch.where(texture == 1, striped, torch.where(texture == 2, checked, 1.0))
    return 0.725 + 0.275 * level.clamp(-1, 1)


def _floor(kind, phase, x, z, footprint) -> torch.Tensor:
    """Light of the floor, about 1; detail finer than two footprints of a pixel is left out."""
    period = 0.8
    u, v = (torch.sin(2 * math.pi * (a / period + phase)) for a in (x, z))
    clouds = torch.zeros_like(u)
    for number in range(6):
        angle, scale = 2.4 * number + 6.28 * phase, 1.3 + 0.9 * number
        clouds = clouds + torch.sin(scale * (x * torch.cos(angle) + z * torch.sin(angle)) + number)
    level = torch.where(kind == 0, (5 * u * v).clamp(-1, 1), (3 * u).clamp(-1, 1))
    level = torch.where(kind == 2, (0.6 * clouds).clamp(-1.2, 1.2), level)
    return 1 + 0.34 * level * (1 - 2 * footprint / period).clamp(0, 1)


def paint(
    parameters: torch.Tensor, frames: int, height: int, width: int, samples: int = 2
) -> torch.Tensor:
    """[N, 3, F, Y, X] float32 in [0, 1] from what `parameters` gave.

    Args:
        samples: rays along each side of a pixel.
    """
    size = height * samples, width * samples
    at_a_time = max(1, MOST_RAYS // (frames * size[0] * size[1]))
    done = []
    for rows in parameters.split(at_a_time):
        image = _cast(rows, frames, *size).movedim(-1, 2)
        image = F.avg_pool2d(image.flatten(0, 1), samples).unflatten(0, (len(rows), frames))
        done.append(image.transpose(1, 2))
    return torch.cat(done).clamp(0, 1)


def _rays(along, away, turn, t, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the camera is, [N, F, 1, 1, 3], and where its pixels look, [N, F, Y, X, 3] of length 1.

    Args:
        along, away, turn: [N, 1, 1, 1] a frame. t: [F, 1, 1], frames from half-way.
    """
    eye = torch.stack(
        torch.broadcast_tensors(along * t, torch.full_like(t, HEIGHT), away * t - BACK), -1
    )
    y = 0.5 - (torch.arange(height, device=t.device) + 0.5) / height
    x = (torch.arange(width, device=t.device) + 0.5) / height - 0.5 * width / height
    y, x = torch.meshgrid(y, x, indexing="ij")
    c, s = math.cos(PITCH), math.sin(PITCH)
    ray = torch.stack((x, c * y - s * FOCAL, s * y + c * FOCAL), -1)
    return eye, _turned(ray / ray.norm(dim=-1, keepdim=True), -turn * t)


def _cast(rows: torch.Tensor, frames: int, height: int, width: int) -> torch.Tensor:
    """[N, F, Y, X, 3]: one ray a pixel, with one more to the sun from where it ends."""
    t = (torch.arange(frames, device=rows.device) - 0.5 * (frames - 1))[:, None, None]

    def number(index):
        return rows[:, index, None, None, None]  # [N, 1, 1, 1]

    def vector(first):
        return rows[:, None, None, None, first : first + 3]

    def centre(solid):
        x, y, z = (number(solid + i) for i in (1, 2, 3))
        x, z = x + number(solid + 8) * t, z + number(solid + 9) * t
        return torch.stack(torch.broadcast_tensors(x, y, z), -1)

    eye, ray = _rays(number(9), number(10), number(11), t, height, width)
    azimuth = number(8)
    sun = torch.stack((0.7 * azimuth.sin(), 0.75 + 0 * azimuth, -0.7 * azimuth.cos()), -1)
    sun = sun / sun.norm(dim=-1, keepdim=True)

    down = ray[..., 1].clamp(max=-1e-6)
    depth = torch.where(ray[..., 1] < 0, -eye[..., 1] / down, FAR).clamp(max=FAR)
    point = eye + depth[..., None] * ray
    footprint = depth / (FOCAL * height) / -down
    light = _floor(number(3), number(4), point[..., 0], point[..., 2], footprint)
    colour = vector(0) * light[..., None]
    normal = torch.tensor([0.0, 1.0, 0.0]).to(rows).expand_as(ray)
    upright = torch.tensor([1.0, 0.0, 1.0]).to(rows)
    for solid in range(12, rows.shape[1], PRIMITIVE):
        kind, half, turn = number(solid), vector(solid + 4), number(solid + 7)
        o, d = _turned(eye - centre(solid), turn), _turned(ray, turn)
        enter, leave, side = _span(o, d, kind, half)
        seen = (enter < leave) & (enter > 0) & (enter < depth)
        local = o + enter[..., None] * d
        flat = -d.sign() * F.one_hot(side.clamp(max=2), 3)
        bent = torch.where(kind[..., None] == 0, local, local * upright) / half[..., :1]
        facing = _turned(torch.where((side == 3)[..., None], bent, flat), -turn)
        surface = vector(solid + 11) * _pattern(number(solid + 10), local, half)[..., None]
        colour = torch.where(seen[..., None], surface, colour)
        normal = torch.where(seen[..., None], facing, normal)
        depth = torch.where(seen, enter, depth)
    hit = depth < FAR
    point = eye + depth.clamp(max=100)[..., None] * ray + 2e-3 * normal
    lit = torch.ones_like(depth)
    for solid in range(12, rows.shape[1], PRIMITIVE):
        turn = number(solid + 7)
        o, d = _turned(point - centre(solid), turn), _turned(sun, turn)
        enter, leave, _ = _span(o, d, number(solid), vector(solid + 4))
        lit = lit * ~((enter < leave) & (leave > 0))
    lambert = (normal * sun).sum(-1).clamp(min=0) * lit
    shade = (AMBIENT + (1 - AMBIENT) * lambert / 0.75).clamp(max=1.15)
    haze = torch.where(hit, 1 - (-depth / FOG).exp(), 1.0) ** 2
    air = vector(5) * (1 - 0.35 * ray[..., 1].clamp(0, 1))[..., None]
    return torch.lerp(colour * shade[..., None], air, haze[..., None])


def render(scenes: list[Scene], frames: int, height: int, width: int, device="cpu"):
    """[N, 3, F, Y, X] float32 in [0, 1]."""
    return paint(parameters(scenes).to(device), frames, height, width)
