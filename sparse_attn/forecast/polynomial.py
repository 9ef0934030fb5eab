"""Predictions of the model at another sigma: the polynomial through those there are, and a damped line."""

from collections.abc import Sequence

import torch


def weights(sigmas: Sequence[float], at: float) -> list[float]:
    """What each of some different sigmas counts at another one: Lagrange's weights; they sum to 1."""
    found = []
    for i, here in enumerate(sigmas):
        weight = 1.0
        for j, other in enumerate(sigmas):
            if i != j:
                weight *= (at - other) / (here - other)
        found.append(weight)
    return found


def extrapolate(points: Sequence[tuple[float, torch.Tensor]], at: float) -> torch.Tensor:
    """The polynomial of degree `len(points) - 1` through (sigma, prediction), at another sigma."""
    sigmas, predictions = zip(*points, strict=True)
    found = torch.zeros_like(predictions[0], dtype=torch.float32)
    for weight, prediction in zip(weights(sigmas, at), predictions, strict=True):
        found.add_(prediction, alpha=weight)
    return found.to(predictions[0].dtype)


def damped_line(
    points: Sequence[tuple[float, torch.Tensor]], at: float, channels: Sequence[int] = ()
) -> torch.Tensor:
    """The line through the last two of three points, at another sigma, damped by channel.

    Its slope counts, in each channel of each video, as far as the slope before it would have
    foretold it: by their scalar product over the square of the earlier one, from 0 to 1.

    Args:
        channels: values of each channel of a flat pack of latents [B, 1, N]; without a pack the second
            axis has the channels.
    """

    def summed(x):
        if not channels:
            return x.sum(tuple(range(2, x.ndim)), keepdim=True)
        sums = [part.sum(-1, keepdim=True).expand_as(part) for part in x.split(list(channels), -1)]
        return torch.cat(sums, -1)

    sigmas = [sigma for sigma, _ in points]
    first, second, third = (prediction.float() for _, prediction in points)
    before = (second - first) / (sigmas[1] - sigmas[0])
    slope = (third - second) / (sigmas[2] - sigmas[1])
    held = (summed(slope * before) / summed(before.square()).clamp(min=1e-30)).clamp(0, 1)
    return (third + held * slope * (at - sigmas[2])).to(points[-1][1].dtype)
