"""Continuations of held-out clips by the model of natural clips, and two plain guesses beside them.

    python tests/lab/continuation.py --comfyui PATH --clips .adaspa/natural/clips.zip --out OUT

is the check that `train_natural.py --check` makes, of the weights that are here.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE.parents[1]), str(HERE.parent / "tiny_model"), str(HERE)]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

import check_model  # noqa: E402
import procedural_video as video  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from metrics import likeness  # noqa: E402
from natural_clips import Clips  # noqa: E402

from tests.bench.record import facts  # noqa: E402

NEAR = 8  # frames that come first after those that are given
MOVES = (
    20.0  # dB: a clip moves whose next `NEAR` frames are further than that from the last one given
)
GUESSES = ("model", "last frame", "linear motion")
LOOK = 16  # rows and columns by which clips are compared with what they may have been learned from


def conditions(latent: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """[N, 20, T, H, W]: 4 channels of ones where frames are given, and those frames.

    The last of them stands for all that follow; where none is given there are zeros.

    Args:
        latent: [N, 16, T, H, W]. known: [N], how many of the first frames are given.
    """
    frames = torch.arange(latent.shape[2], device=latent.device)
    given = (frames < known[:, None]).to(latent)[:, None, :, None, None]
    last = latent[torch.arange(len(latent), device=latent.device), :, (known - 1).clamp(min=0)]
    shown = torch.lerp(last[:, :, None], latent, given) * (known > 0).view(-1, 1, 1, 1, 1)
    return torch.cat((given.expand(-1, 4, -1, *latent.shape[3:]), shown), 1)


def continued(
    model, latent: torch.Tensor, known: int, steps: int, seed: int, attention=None, noise=None
) -> torch.Tensor:
    """Model-space latents [N, 16, T, H, W] that ComfyUI's sampler makes of the first `known` frames.

    The model draws their difference to the last of those frames.

    Args:
        attention: an `optimized_attention_override`, or None.
        noise: as `latent`, None for what ComfyUI draws from the seed.
    """
    import comfy.sample

    clone = model.clone()
    if attention is not None:
        clone.model_options["transformer_options"]["optimized_attention_override"] = attention
    counts = torch.full((len(latent),), known)
    found = conditions(latent, counts)
    outside = model.get_model_object("latent_format").process_out
    text = torch.zeros(len(latent), video.TEXT_TOKENS, video.TEXT_DIM)
    told = {"concat_latent_image": outside(found[:, 4:]), "concat_mask": 1 - found[:, :4]}
    empty = torch.zeros_like(latent)
    noise = comfy.sample.prepare_noise(empty, seed) if noise is None else noise
    out = comfy.sample.sample(
        clone, noise, steps, 1.0, "euler", "simple",
        [[text, told]], [[text, told]], empty, denoise=1.0, disable_pbar=True, seed=seed,
    )  # fmt: skip
    return model.get_model_object("latent_format").process_in(out.float().cpu()) + found[:, 4:]


def linear_motion(clip: torch.Tensor, known: int) -> torch.Tensor:
    """[3, F, Y, X]: the last of `known` frames, shifted on as the whole picture moved to it.

    The shift between the last two known frames is the peak of their phase correlation.
    """
    before, last = clip[:, known - 2].mean(0), clip[:, known - 1].mean(0)
    cross = torch.fft.fft2(last) * torch.fft.fft2(before).conj()
    peak = int(torch.fft.ifft2(cross / cross.abs().clamp(min=1e-9)).real.argmax())
    height, width = last.shape
    dy, dx = peak // width, peak % width
    dy, dx = dy - height * (dy > height // 2), dx - width * (dx > width // 2)
    guess = clip.clone()
    for ahead in range(clip.shape[1] - known):
        guess[:, known + ahead] = torch.roll(
            clip[:, known - 1], ((ahead + 1) * dy, (ahead + 1) * dx), (1, 2)
        )
    return guess


def looks(clip: torch.Tensor) -> torch.Tensor:
    """[F, LOOK * LOOK]: small grey frames of [3, F, Y, X] in [0, 1]."""
    return F.adaptive_avg_pool2d(clip.mean(0)[:, None], LOOK).flatten(1)


def all_looks(clips: Clips, frames: int, height: int, width: int) -> list[torch.Tensor]:
    """`looks` of all of each clip, which is at least so many frames then."""
    return [
        looks(clips.window(number, max(len(clip), frames), height, width))
        for number, clip in enumerate(clips.frames)
    ]


def nearest(clip: torch.Tensor, others: list[torch.Tensor]) -> tuple[float, int]:
    """How far, as RMS of small grey frames, the nearest stretch of the others is, and of which."""
    mine, best = looks(clip), (float("inf"), 0)
    for number, theirs in enumerate(others):
        for look in (theirs, theirs.unflatten(1, (LOOK, LOOK)).flip(2).flatten(1)):
            stretches = look.unfold(0, len(mine), 1).movedim(-1, 1)  # [places, F, LOOK * LOOK]
            apart = (stretches - mine).square().mean((1, 2)).sqrt().min()
            best = min(best, (float(apart), number))
    return best


def means(rows: list[dict]) -> dict:
    """The mean of every measure of the model and of the plain guesses."""
    return {
        name: {key: round(sum(r[name][key] for r in rows) / len(rows), 4) for key in row}
        for name, row in (rows[0].items() if rows else ())
        if name in GUESSES
    }


def check(
    path: Path, comfyui: str, clips_file: Path, size: tuple[int, int, int], steps: int, out: Path,
    known: int = 4, count: int = 24, shown: int = 10,
) -> dict:  # fmt: skip
    """Continuations of held-out clips against plain guesses, and whether they are copies.

    Likeness is that of all frames that follow the given ones and, with "near", of the first `NEAR`.

    Args:
        size: frames, rows and columns in pixels.
        out: folder of a contact sheet, the truth above each continuation.
        known: latent frames that are given. count: clips at most. shown: of them on the sheet.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = check_model.load(path, comfyui)
    clips, others = (Clips(clips_file, part).to(device) for part in ("train", "held out"))
    known = min(known, size[0] // video.FRAMES_PER_LATENT // 2)
    given = video.FRAMES_PER_LATENT * known
    seen = all_looks(clips, *size)
    rows: list[dict] = []
    sheet = []
    for number in others.of_length(size[0])[:count]:
        truth = others.window(number, *size)
        made = continued(model, video.encode(truth[None]).cpu(), known, steps, number)
        made = video.decode(made)[0].clamp(0, 1).to(device)
        still = truth.clone()
        still[:, given:] = truth[:, given - 1 : given]
        guesses = dict(zip(GUESSES, (made, still, linear_motion(truth, given)), strict=True))
        row: dict = {"clip": others.names[number]}
        for name, guess in guesses.items():
            for end, kind in ((given + NEAR, "near "), (None, "")):
                frames = [clip[None, :, given:end] for clip in (truth, guess)]
                like = {kind + key: round(x[0], 4) for key, x in likeness(*frames).items()}
                row.setdefault(name, {}).update(like)
        copied, of = nearest(made[:, given:], seen)
        natural, _ = nearest(truth[:, given:], seen)
        # a copy lies much nearer to a training clip than another clip's true continuation does
        row["nearest"] = {
            "clip": clips.names[of],
            "sample": round(copied, 4),
            "truth": round(natural, 4),
        }
        row["memorised"] = copied < 0.5 * natural
        rows.append(row)
        print(json.dumps(row), flush=True)
        if len(rows) <= shown:
            sheet += [truth.cpu(), made.cpu()]
            check_model.contact_sheet(torch.stack(sheet), out / "continued.png", 8, scale=1)
    moving = [row for row in rows if row["last frame"]["near psnr"] < MOVES]
    return {
        "known": known, "rows": rows, "mean": means(rows), "moving": len(moving),
        "mean of moving": means(moving),
        "memorised": sum(row["memorised"] for row in rows),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", required=True)
    parser.add_argument("--weights", type=Path, default=HERE / "weights" / "natural.safetensors.xz")
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--size", default="40x128x128", help="frames, rows and columns")
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--known", type=int, nargs="+", default=[4], help="latent frames given")
    parser.add_argument("--count", type=int, default=24, help="clips at most")
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    frames, height, width = (int(n) for n in o.size.split("x"))
    found = []
    for known in o.known:
        for steps in o.steps:
            size = frames, height, width
            told = check(o.weights, o.comfyui, o.clips, size, steps, o.out, known, o.count)
            print(json.dumps({"known": known, "steps": steps, **told["mean"]}), flush=True)
            found.append({"steps": steps, **told})
            record = json.dumps({"checks": found, **facts()}, indent=1)
            (o.out / "continued.json").write_text(record + "\n")


if __name__ == "__main__":
    main()
