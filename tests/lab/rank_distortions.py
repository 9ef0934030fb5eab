"""How the measures of likeness rank known distortions of rising amounts.

    python tests/lab/rank_distortions.py --out tests/lab/results/distortions.json [--clips FILE ...]

Two of the lab's own scenes, and 9 frames of every clip (anything PyAV reads), 160 rows high.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT), str(ROOT / "tests" / "tiny_model"), str(HERE)]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

import perceptual  # noqa: E402
import procedural_video as video  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from metrics import likeness  # noqa: E402

from tests.bench.record import facts  # noqa: E402

FRAMES, HEIGHT = 9, 160
TINT = (1.0, -0.5, -0.5)


def noise(clip: torch.Tensor, amount: float) -> torch.Tensor:
    """Of this deviation, another one in every frame."""
    drawn = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    return clip + amount * drawn


def blur(clip: torch.Tensor, amount: float) -> torch.Tensor:
    """A Gaussian of this deviation, in pixels."""
    reach = round(3 * amount)
    weights = (-((torch.arange(-reach, reach + 1.0) / amount) ** 2) / 2).exp()
    weights = weights / weights.sum()
    frames = clip.transpose(0, 1).flatten(0, 1)[:, None]
    for axis in (0, 1):
        shape, pad = [1, 1, 1, 1], [0, 0, 0, 0]
        shape[2 + axis] = -1
        pad[2 * (1 - axis) : 2 * (1 - axis) + 2] = [reach, reach]
        frames = F.conv2d(F.pad(frames, pad, mode="replicate"), weights.view(shape))
    return frames.view(clip.transpose(0, 1).shape).transpose(0, 1)


def shift(clip: torch.Tensor, amount: int) -> torch.Tensor:
    """By this many pixels to the right."""
    edge = clip[..., :1].expand(*clip.shape[:-1], amount)
    return torch.cat((edge, clip[..., :-amount]), -1)


def colour(clip: torch.Tensor, amount: float) -> torch.Tensor:
    """Redder by this much."""
    return clip + amount * torch.tensor(TINT)[:, None, None, None]


def light(clip: torch.Tensor, amount: float) -> torch.Tensor:
    """Brighter by this much."""
    return clip + amount


def flicker(clip: torch.Tensor, amount: float) -> torch.Tensor:
    """Brighter and darker by this much, frame by frame."""
    signs = 1.0 - 2.0 * (torch.arange(clip.shape[1]) % 2)
    return clip + amount * signs[:, None, None]


# from hardly visible to gross
AMOUNTS = {
    noise: (0.02, 0.05, 0.1, 0.2),
    blur: (0.5, 1.0, 2.0, 4.0),
    shift: (1, 2, 4, 8),
    colour: (0.02, 0.05, 0.1, 0.2),
    light: (0.02, 0.05, 0.1, 0.2),
    flicker: (0.02, 0.05, 0.1, 0.2),
}


def measured(clip: torch.Tensor, amounts=AMOUNTS) -> dict[str, list[dict[str, float]]]:
    """Likeness of a clip [3, F, Y, X] in [0, 1] to itself distorted: {kind: [{amount, ...}]}."""
    found: dict[str, list[dict[str, float]]] = {}
    for distort, chosen in amounts.items():
        for amount in chosen:
            other = distort(clip, amount).clamp(0, 1)
            like = likeness(clip[None], other[None])
            row = {name: round(values[0], 5) for name, values in like.items()}
            found.setdefault(distort.__name__, []).append({"amount": amount, **row})
    return found


def scene(seed: int, frames: int = FRAMES, height: int = HEIGHT) -> torch.Tensor:
    """[3, F, Y, X]: a rich scene of `procedural_video`."""
    import random

    drawn = video.random_scene(random.Random(seed), frames, 1.3, rich=True)
    return video.render([drawn], frames, height, round(1.3 * height))[0]


def read_clip(path: Path) -> torch.Tensor:
    """[3, F, Y, X] in [0, 1]: the first `FRAMES` frames, made `HEIGHT` rows high."""
    import av

    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if len(frames) == FRAMES:
                break
    clip = torch.stack(frames).permute(0, 3, 1, 2) / 255
    size = [HEIGHT, round(HEIGHT * clip.shape[3] / clip.shape[2])]
    return F.interpolate(clip, size, mode="area").transpose(0, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", nargs="+", type=Path, default=[])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if perceptual.weights_file() is None:
        raise SystemExit(perceptual.MISSING)
    videos = {f"scene {seed}": scene(seed) for seed in (0, 1)}
    videos |= {path.name: read_clip(path) for path in options.clips}
    found = {"what": __doc__.splitlines()[0], "videos": {}, **facts()}
    for name, clip in videos.items():
        found["videos"][name] = measured(clip)
        for kind, rows in found["videos"][name].items():
            values = [f"{row['perceptual']:.3f} {row['changes']:.3f}" for row in rows]
            print(f"{name:24} {kind:8} {' | '.join(values)}", flush=True)
    options.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
