"""The polynomial in sigma through predictions of the model, at another sigma."""

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
