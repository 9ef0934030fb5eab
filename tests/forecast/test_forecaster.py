"""Which steps are forecast, from what, and when no more are."""

from itertools import pairwise

import pytest
import torch

from sparse_attn.forecast.forecaster import MANY_EVALUATIONS, OFF_THE_LIST, Forecaster
from sparse_attn.forecast.plan import Level, plan_forecasts
from sparse_attn.forecast.polynomial import damped_line, extrapolate
from sparse_attn.schedule import StepCounter

EVERY_OTHER, TWO_OF_THREE = Level(1, 1, 1e-4), Level(1, 2, 1e-4)
START = torch.linspace(1, 2, 6).reshape(1, 1, 6)


def falling(steps):
    return [1 - i / steps for i in range(steps + 1)]


def line(sigma):
    return START * (1 + sigma)


class Sampler:
    """Asks a forecaster at sigmas, and the model where it declines.

    Args:
        model: what it would return at a sigma.
    """

    def __init__(self, level, sigmas, model=line, total=None, parts=()):
        steps = len(sigmas) - 1
        plan = plan_forecasts(sigmas, 0, total or steps)
        self.forecaster = Forecaster(level, plan, StepCounter(sigmas), parts)
        self.told, self.model, self.computed = self.forecaster.statistics, model, []

    def at(self, sigma, regime="one"):
        found = self.forecaster.forecast(sigma, regime)
        if found is None:
            found = self.model(sigma)
            self.computed.append(sigma)
            self.forecaster.learn(sigma, found)
        return found

    def run(self, regime=lambda sigma: "one"):
        for sigma in self.forecaster.plan.sigmas[:-1]:
            self.at(sigma, regime(sigma))
        return sorted(self.told.forecast)


@pytest.mark.parametrize(
    "level, expected",
    [
        (EVERY_OTHER, [4, 6, 8, 10, 12, 14, 16, 18]),
        (TWO_OF_THREE, [4, 5, 7, 8, 10, 11, 13, 14, 16, 17]),
    ],
)
def test_forecasts_are_where_the_level_puts_them(level, expected):
    sampler = Sampler(level, falling(20))
    last = [step for step in expected if step < 19]
    assert sampler.run() == last
    assert len(sampler.computed) == 20 - len(last) == 20 - sampler.told.evaluations


@pytest.mark.parametrize("degree", range(4))
@pytest.mark.parametrize("in_row", [1, 2, 5])
def test_a_polynomial_model_is_forecast_exactly(degree, in_row):
    factors = torch.randn(degree + 1, 1, 2, 3)

    def model(sigma):
        return sum(factor * sigma**i for i, factor in enumerate(factors))

    sampler = Sampler(Level(degree, in_row, 1e-3), falling(30), model)
    for sigma in sampler.forecaster.plan.sigmas[:-1]:
        torch.testing.assert_close(sampler.at(sigma), model(sigma), rtol=1e-3, atol=2e-4)
    assert sampler.told.forecast and not sampler.told.withheld


def test_fewer_are_forecast_while_they_drift_and_more_again_after():
    def bent(sigma):
        return START * (
            1 + (0.3 if 0.3 < sigma < 0.55 else 0) * torch.sin(torch.tensor(40 * sigma))
        )

    free = Sampler(Level(1, 2, 1e9), falling(40), bent)
    held = Sampler(TWO_OF_THREE, falling(40), bent)
    assert len(held.run()) < len(free.run())
    assert held.told.withheld and max(held.told.errors.values()) > 1e-4
    # both ends are straight
    assert {8, 9} <= held.told.forecast and {36, 37} & held.told.forecast


def test_a_model_that_no_line_fits_is_computed_throughout():
    values = iter(torch.randn(100, 1, 1, 6))
    sampler = Sampler(EVERY_OTHER, falling(20), lambda sigma: next(values))
    assert sampler.run() == []
    assert sampler.told.withheld == set(range(4, 19))


@pytest.mark.parametrize("end, share", [(0.9, 1 / 19), (0.475, 1 / 2)])
def test_an_error_counts_as_far_as_its_step_goes(end, share):
    sampler = Sampler(EVERY_OTHER, [1.0, 0.975, 0.95, *(end * x for x in falling(12))])
    sampler.model = lambda sigma: line(sigma) * (1.1 if sigma == 0.95 else 1)
    sampler.run()
    assert sampler.told.errors[2] == pytest.approx(share * 0.1 / 1.1, rel=1e-4)


def test_not_a_number_is_no_success():
    sampler = Sampler(EVERY_OTHER, falling(20), lambda sigma: START * float("nan"))
    assert sampler.run() == []


@pytest.mark.parametrize("at", [7, 8, 9])
def test_another_regime_begins_anew(at):
    sigmas = falling(20)

    def jumps(sigma):
        return line(sigma) + (5 if sigma <= sigmas[at] else 0)

    sampler = Sampler(EVERY_OTHER, sigmas, jumps)
    found = sampler.run(lambda sigma: sigma <= sigmas[at])
    # two points of the new regime are needed, and none of them was a surprise
    assert not {at, at + 1} & set(found) and at + 2 in found
    assert not sampler.told.withheld


def test_a_list_that_turns_begins_anew():
    falls = falling(16)
    sigmas = [*falls[:10], *falls[4:]]
    wide = Sampler(TWO_OF_THREE, sigmas)
    found = wide.run()
    assert not {10, 11} & set(found) and {8, 12} <= set(found)


def test_a_rising_list_is_forecast_too():
    assert Sampler(EVERY_OTHER, falling(20)[::-1]).run() == list(range(4, 19, 2))


def test_both_evaluations_of_a_step_are_forecast_or_computed():
    sigmas = falling(20)
    sampler = Sampler(EVERY_OTHER, sigmas)
    for begin, end in pairwise(sigmas):
        sampler.at(begin)
        sampler.at((begin + end) / 2)
    assert sorted(sampler.told.forecast) == list(range(4, 19, 2))
    assert sampler.told.evaluations == 2 * 8


def test_the_later_of_two_evaluations_at_one_sigma_counts():
    sigmas = falling(20)
    sampler = Sampler(EVERY_OTHER, sigmas)
    for step in range(4):
        sampler.model = lambda sigma: line(sigma) + 100
        sampler.at(sigmas[step])
        sampler.model = line
        sampler.at(sigmas[step])
    sampler.forecaster._most = 1
    torch.testing.assert_close(sampler.at(sigmas[4]), line(sigmas[4]))
    assert sampler.told.forecast == {4}


def test_a_sampler_that_evaluates_again_and_again_is_left_alone():
    sampler = Sampler(EVERY_OTHER, falling(20))
    for sigma in falling(20)[:-1]:
        for _ in range(5):
            sampler.at(sigma)
    assert not sampler.told.forecast and sampler.told.why_not == MANY_EVALUATIONS


def test_a_sampler_with_sigmas_of_its_own_is_left_alone():
    sampler = Sampler(EVERY_OTHER, falling(20))
    for step in range(19):
        sampler.at(1 - (step + (0.4 if step else 0)) / 20)
    assert not sampler.told.forecast and sampler.told.why_not == OFF_THE_LIST


def test_sound_that_drifts_counts_beside_a_video_that_does_not():
    def model(sigma):
        video = torch.full((1, 1, 1000), 1 + sigma)
        return torch.cat((video, torch.full((1, 1, 2), 1 + sigma**4)), 2)

    assert Sampler(EVERY_OTHER, falling(20), model).run()
    parts = Sampler(EVERY_OTHER, falling(20), model, parts=(1000, 2))
    assert len(parts.run()) < 8 and parts.told.withheld


def test_what_was_learned_is_not_changed_by_who_gets_it():
    sampler = Sampler(EVERY_OTHER, falling(20))
    for sigma in falling(20)[:-1]:
        out = sampler.at(sigma)
        torch.testing.assert_close(out, line(sigma))
        out.zero_()


def test_a_damped_level_takes_a_third_point_as_soon_as_there_is_one():
    def slows(sigma):
        # after sigma 0.5 half as fast
        return START * (sigma if sigma > 0.5 else 0.25 + sigma / 2)

    sampler = Sampler(Level(1, 2, 1e9, damped=True), falling(30), slows)
    found = dict.fromkeys(sampler.run())
    sampler = Sampler(Level(1, 2, 1e9, damped=True), falling(30), slows)
    points = []
    for step, sigma in enumerate(falling(30)[:-1]):
        value = sampler.at(sigma)
        if step in found:
            last = points[-3:]
            expected = damped_line(last, sigma) if len(last) == 3 else extrapolate(last, sigma)
            torch.testing.assert_close(value, expected)
        else:
            points.append((sigma, slows(sigma)))
    assert len(found) == 16 and any(0.3 < falling(30)[step] < 0.5 for step in found)
