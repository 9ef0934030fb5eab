"""AdaSpa Compare, and its PSNR and SSIM against values that are known."""

import math
from types import SimpleNamespace

import pytest
import torch

from sparse_attn.video_metrics import mean_squared_error, psnr, ssim
from tests.tools import comfy_inprocess

pytestmark = pytest.mark.any_comfyui


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(a, b):
    """SSIM window by window in float64, as the paper writes it; one channel."""
    axis = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(axis**2) / (2 * 1.5**2))
    window = line[:, None] * line[None]
    window /= window.sum()
    a, b = a.double(), b.double()
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            both = (window * (p - mp) * (q - mq)).sum()
            light = (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
            values.append(light * (2 * both + 9e-4) / (vp + vq + 9e-4))
    return torch.stack(values).mean().item()


def test_ssim_is_the_papers_formula():
    a = noise(14, 17, 3)
    b = (a + 0.2 * noise(14, 17, 3, seed=1)).clamp(max=1)
    expected = sum(by_hand(a[..., c], b[..., c]) for c in range(3)) / 3
    assert 0.5 < expected < 0.97
    assert ssim(a, b) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("shape", [(24, 31, 3), (11, 40, 1)])
def test_ssim_is_scikit_images(shape):
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    a = noise(*shape)
    for b in (0.7 * a + 0.3 * noise(*shape, seed=1), noise(*shape, seed=2), a**2):
        expected = structural_similarity(
            a.double().numpy(), b.double().numpy(), data_range=1.0, channel_axis=-1,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert ssim(a, b) == pytest.approx(expected, abs=1e-5)


def test_ssim_of_plain_greys_is_the_brightness_term():
    a, b = torch.full((20, 20, 3), 0.3), torch.full((20, 20, 3), 0.6)
    # the ratio of the structure term is 1 where neither varies
    assert ssim(a, b) == pytest.approx((2 * 0.3 * 0.6 + 1e-4) / (0.09 + 0.36 + 1e-4), abs=1e-3)


def test_ssim_of_equal_frames_is_one_and_of_a_negative_below_zero():
    a = noise(30, 20, 3)
    assert ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert ssim(a, 1 - a) < -0.5
    assert abs(ssim(a, noise(30, 20, 3, seed=9))) < 0.2


@pytest.mark.parametrize("shape", [(1, 1, 3), (4, 30, 3), (10, 11, 1)])
def test_ssim_of_a_frame_smaller_than_the_window(shape):
    a = noise(*shape)
    assert ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert ssim(a, 1 - a) < 0.9


@pytest.mark.parametrize("step, decibels", [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0)])
def test_psnr_of_an_even_difference(step, decibels):
    a = torch.zeros(4, 5, 3)
    assert psnr(mean_squared_error(a, a + step)) == pytest.approx(decibels, abs=1e-5)


def test_psnr_of_no_difference_is_infinite():
    assert psnr(0.0) == math.inf


# ---- the node


@pytest.fixture
def compare(comfyui, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    node = comfy_inprocess.nodes_of(comfy_inprocess.load_pack())["AdaSpaCompare"]
    return node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})


def test_schema(compare):
    schema = compare.GET_SCHEMA()
    assert [put.id for put in schema.inputs] == ["dense", "sparse", "off", "on"]
    # those of graphs saved before have no more
    assert [bool(put.optional) for put in schema.inputs] == [False, False, True, True]
    assert [put.io_type for put in schema.outputs] == ["IMAGE", "IMAGE", "FLOAT", "STRING"]
    assert schema.is_output_node and schema.category == "model/patch"
    assert "8 times" in schema.outputs[1].tooltip
    assert all(len(put.tooltip) > 20 for put in schema.inputs)


def test_pictures_and_numbers_of_a_video(compare):
    dense = noise(3, 16, 20, 3) * 0.5
    sparse = dense.clone()
    # one frame of three differs by 0.1: a third of 0.01
    sparse[1] += 0.1
    output = compare.execute(dense, sparse)
    side_by_side, difference, value, text = output.args
    assert side_by_side.shape == (3, 16, 40, 3)
    assert torch.equal(side_by_side[:, :, :20], dense)
    assert torch.equal(side_by_side[:, :, 20:], sparse)
    assert difference.shape == dense.shape
    assert difference[1].allclose(torch.tensor(0.8), atol=1e-5) and not difference[[0, 2]].any()
    assert value == pytest.approx(-10 * math.log10(0.01 / 3), abs=1e-3)
    lines = text.split("\n")
    assert lines[0].startswith("Another video: PSNR 24.77 dB, SSIM 0.")
    assert lines[1] == "Least alike: frame 1."
    assert lines[2] == "3 frame(s) of 20 x 16 in 3 channels"
    assert "two exact attention kernels" in lines[3] and "Small differences are normal" in lines[3]
    # no figure that nobody measured
    assert not any(letter.isdigit() for letter in lines[3])
    assert output.ui["text"] == ["\n".join(lines[:2])]
    assert [said["code"] for said in output.ui["said"][0]] == ["different", "least_alike"]


def test_differences_are_amplified_but_stay_a_picture(compare):
    _, difference, _, _ = compare.execute(torch.zeros(1, 12, 12, 3), torch.ones(1, 12, 12, 3)).args
    assert difference.max() == difference.min() == 1


def test_equal_videos_are_called_equal(compare):
    video = noise(2, 12, 12, 3)
    _, difference, value, text = compare.execute(video, video.clone()).args
    assert not difference.any() and value == 100.0
    assert text == "Equal in every pixel.\n2 frame(s) of 12 x 12 in 3 channels"


@pytest.mark.parametrize(
    "strength, code", [(0.005, "hard_to_see"), (0.08, "small"), (0.2, "different")]
)
def test_words_follow_psnr_and_ssim(compare, strength, code):
    dense = noise(2, 32, 32, 3).round(decimals=1)
    sparse = (dense + strength * (noise(2, 32, 32, 3, seed=1) - 0.5)).clamp(0, 1)
    (said,) = compare.execute(dense, sparse).ui["said"]
    assert said[0]["code"] == code


def test_frames_of_a_long_video_are_shown_from_all_over(compare, tmp_path):
    from PIL import Image

    dense = torch.linspace(0, 1, 50)[:, None, None, None].expand(50, 12, 1300, 3)
    (shown,) = compare.execute(dense, dense.flip(0)).ui["adaspa_compare"]
    frames = shown["frames"]
    assert len(frames) == len(shown["dense"]) == len(shown["sparse"]) == 24
    assert (frames[0], frames[-1]) == (0, 49) and frames == sorted(frames)
    for kind, end in (("dense", 255), ("sparse", 0)):
        picture = Image.open(tmp_path / shown[kind][-1]["filename"])
        assert picture.size[0] == 1024 and abs(picture.getpixel((9, 5))[0] - end) < 3


# ---- the times of both runs


class Node:
    """As an AdaSpa node whose run took so long."""

    def __init__(self, took, enabled, sampled="size and steps", preset="Balanced"):
        from sparse_attn.config import AdaSpaConfig

        self.config, self.preset = AdaSpaConfig(enabled=enabled), preset
        self.runs = [SimpleNamespace(took=took, sampled=sampled)]

    def recent(self):
        return self.runs


TIMES = [
    (Node(41, False), Node(20.4, True), "Off 41 s, Balanced 20 s: 2.0x, same size and steps."),
    (
        Node(41, False),
        Node(20.4, True, "others"),
        "Off 41 s, Balanced 20 s; the runs differ in more than AdaSpa.",
    ),
    (
        Node(41, True),
        Node(20.4, True),
        "Off 41 s, Balanced 20 s; the runs differ in more than AdaSpa.",
    ),
    (Node(41, False), Node(None, True), "Equal in every pixel."),
    (None, Node(20.4, True), "Equal in every pixel."),
]


@pytest.mark.parametrize("off, on, first", TIMES)
def test_both_runs_are_timed(compare, off, on, first):
    video = noise(2, 12, 12, 3)
    assert compare.execute(video, video, off, on).args[3].split("\n")[0] == first


@pytest.mark.parametrize("shape", [(2, 12, 12, 3), (3, 12, 14, 3), (3, 12, 12, 4)])
def test_videos_of_other_sizes_are_refused_in_one_sentence(compare, shape):
    with pytest.raises(ValueError) as refused:
        compare.execute(noise(3, 12, 12, 3), noise(*shape))
    assert "`dense` and `sparse` must be alike in frames and size, got 3 frame(s)" in str(
        refused.value
    )
    assert "\n" not in str(refused.value)
