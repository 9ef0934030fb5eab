"""Polynomials through predictions, and how far off a forecast is."""

import pytest
import torch

from sparse_attn.forecast.forecaster import relative_error
from sparse_attn.forecast.polynomial import damped_line, extrapolate, weights

SIGMAS = (1.0, 0.94, 0.83, 0.71)


@pytest.mark.parametrize("degree", range(4))
def test_a_polynomial_of_the_degree_is_met_exactly(degree):
    factors = torch.randn(degree + 1, 2, 3, 4, dtype=torch.float64)

    def truth(sigma):
        return sum(factor * sigma**i for i, factor in enumerate(factors)).float()

    points = [(sigma, truth(sigma)) for sigma in SIGMAS[: degree + 1]]
    # a fit in float64 of values that float32 has rounded
    bound = 2**-23 * sum(abs(w) for w in weights(SIGMAS[: degree + 1], 0.5)) * 8
    assert (extrapolate(points, 0.5) - truth(0.5)).abs().max() < bound


def test_a_damped_line_goes_as_far_as_the_slope_before_it_held():
    # channels that go on, slow down to half, turn round, begin to move, and rest
    slopes = torch.tensor([[1.0, 2.0], [1.0, 0.5], [1.0, -1.0], [0.0, 1.0], [0.0, 0.0]])
    ones = torch.ones(1, 1, 2, 3, 3)
    points, value = [(1.0, slopes[:, :1].T[..., None, None, None] * 0 * ones)], 0
    for i, (a, b) in enumerate(((1.0, 0.9), (0.9, 0.6))):
        value = value + slopes[:, i].view(1, 5, 1, 1, 1) * (b - a) * ones
        points.append((b, value))
    moved = (damped_line(points, 0.4) - value) / -0.2
    for channel, (before, slope) in enumerate(slopes.tolist()):
        held = min(max(slope / before, 0), 1) if before else 0
        assert moved[0, channel].flatten().tolist() == pytest.approx([held * slope] * 18, abs=1e-5)
    assert damped_line([(s, p.bfloat16()) for s, p in points], 0.4).dtype == torch.bfloat16


def test_a_flat_pack_is_damped_by_the_channels_of_its_latents():
    # video and sound
    shapes = (2, 3, 2, 2, 2), (2, 2, 4)
    latents = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    sigmas = (1.0, 0.9, 0.7)
    packs = [torch.cat([x.reshape(2, 1, -1) for x in parts], -1) for parts in latents]
    found = damped_line(list(zip(sigmas, packs, strict=True)), 0.4, [8, 8, 8, 4, 4])
    alone = [
        damped_line(list(zip(sigmas, x, strict=True)), 0.4) for x in zip(*latents, strict=True)
    ]
    expected = torch.cat([x.reshape(2, 1, -1) for x in alone], -1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_weights_sum_to_one_and_pick_a_point_at_itself():
    assert sum(weights(SIGMAS, 0.3)) == pytest.approx(1)
    assert weights(SIGMAS, SIGMAS[2]) == pytest.approx([0, 0, 1, 0])
    assert weights([0.7], 0.1) == [1]


def test_a_forecast_keeps_the_type_of_the_predictions():
    points = [(1.0, torch.ones(2, dtype=torch.bfloat16)), (0.5, torch.zeros(2).bfloat16())]
    assert torch.equal(extrapolate(points, 0.25), torch.full((2,), -0.5, dtype=torch.bfloat16))


def test_the_error_is_that_of_the_worst_video_and_part():
    truth = torch.ones(2, 1, 10)
    found = truth.clone()
    # 2 of 8 values of the video, 1 of 2 of the sound
    found[1, 0, :2] = 1.5
    assert relative_error(found, truth) == pytest.approx((0.5 / 10) ** 0.5)
    found[0, 0, 9] = 1.5
    assert relative_error(found, truth, (8, 2)) == pytest.approx((0.25 / 2) ** 0.5)


def test_silence_that_is_forecast_as_silence_is_no_error():
    assert relative_error(torch.zeros(1, 4), torch.zeros(1, 4)) == 0
