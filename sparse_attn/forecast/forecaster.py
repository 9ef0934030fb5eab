"""Forecasts steps of one sampler run, and watches how well that goes."""

from collections.abc import Hashable, Sequence

import torch

from ..schedule import StepCounter
from ..sentences import Sentence
from .plan import ForecastPlan, Level
from .polynomial import damped_line, extrapolate
from .statistics import ForecastStatistics

# heun evaluates the model twice at one sigma, heunpp2 three times
MOST_EVALUATIONS = 3
# how far from a step's beginning an evaluation may be, as a share of the step
NEAR = 0.1
OFF_THE_LIST = Sentence("skip_off_the_list")
MANY_EVALUATIONS = Sentence("skip_many")


class Forecaster:
    """Decides which steps are forecast, and forecasts them.

    Points are predictions at the beginning of computed steps. At each of them the forecast that the
    earlier points give is compared with what the model returned. Where the step would have ended too
    far off, one step fewer may follow in a row, else one more.

    Args:
        counter: tells which step an evaluation belongs to; AdaSpa's own, where it is beside.
        parts: sizes of the parts of a flat pack of latents, such as video and sound; each counts.
        channels: sizes of all their channels.
    """

    def __init__(
        self, level: Level, plan: ForecastPlan, counter: StepCounter, parts: Sequence[int] = (),
        channels: Sequence[int] = (),
    ):  # fmt: skip
        self.level, self.plan, self.counter = level, plan, counter
        self.parts, self.channels = parts, channels
        self.statistics = ForecastStatistics(
            len(plan.sigmas) - 1, plan.first_step, why_not=plan.why_not
        )
        self.step = -1
        self._row = 0
        self._most = level.in_row
        self._points: list[tuple[float, torch.Tensor]] = []
        self._point_step = -1
        self._forecasts = False
        self._evaluations = 0
        self._regime: Hashable = None

    def forecast(self, sigma: float, regime: Hashable, needed: bool = False) -> torch.Tensor | None:
        """What the model would return, or None where it shall compute.

        Args:
            regime: what the model's answers depend on beside sigma; under another one the forecasts
                begin anew.
            needed: whether the step has to be computed, for another reason than the plan's.
        """
        step = self.counter.of(sigma)
        if step != self.step or regime != self._regime:
            self._enter(step, sigma, regime, needed)
        if not self._forecasts:
            return None
        self.statistics.forecast.add(step)
        self.statistics.evaluations += 1
        return self._extrapolate(sigma)

    def learn(self, sigma: float, prediction: torch.Tensor) -> bool:
        """Take in what the model returned at the sigma that `forecast` has just declined.

        Returns:
            Whether it was compared with a forecast, which waits for the device.
        """
        begin, end = self.plan.sigmas[self.step : self.step + 2]
        if abs(sigma - begin) > NEAR * abs(end - begin):
            # a later evaluation of the step
            if self._point_step != self.step:
                self.refuse(OFF_THE_LIST)
            return False
        compared = False
        if self._point_step == self.step:
            self._evaluations += 1
            if self._evaluations > MOST_EVALUATIONS:
                self.refuse(MANY_EVALUATIONS)
            # the same point again, better known; none where a change has begun anew
            del self._points[-1:]
        else:
            compared = self._compare(sigma, prediction)
            self._evaluations = 1
        self._point_step = self.step
        if not self.statistics.why_not:
            self._points.append((sigma, prediction.detach().clone()))
            del self._points[: -self.level.points]
        return compared

    def refuse(self, reason: str) -> None:
        """Compute every step from here on."""
        if not self.statistics.why_not:
            self.statistics.why_not = reason
        self._points.clear()
        self._forecasts = False

    def _enter(self, step: int, sigma: float, regime: Hashable, needed: bool) -> None:
        """Decide whether a step is forecast, at its first evaluation."""
        if regime != self._regime or self._turns(sigma):
            self._points.clear()
            self._regime = regime
        self._row = self._row + 1 if self._forecasts else 0
        self.step = step
        wanted = step in self.plan.allowed and not needed and self._is_ready()
        wanted = wanted and self._row < self.level.in_row
        self._forecasts = wanted and self._row < self._most
        if wanted and not self._forecasts:
            self.statistics.withheld.add(step)

    def _is_ready(self) -> bool:
        return len(self._points) > self.level.degree

    def _extrapolate(self, sigma: float) -> torch.Tensor:
        points = self._points
        if self.level.damped and len(points) == self.level.points:
            return damped_line(points, sigma, self.channels)
        return extrapolate(points[-self.level.degree - 1 :], sigma)

    def _turns(self, sigma: float) -> bool:
        """Whether the list of sigmas has stopped falling, or stopped rising."""
        before = [point for point, _ in self._points[-2:]]
        if len(before) == 2:
            return (sigma - before[1]) * (before[1] - before[0]) <= 0
        return before == [sigma]

    def _compare(self, sigma: float, prediction: torch.Tensor) -> bool:
        if not self._is_ready():
            return False
        found = self._extrapolate(sigma)
        begin, end = self.plan.sigmas[self.step : self.step + 2]
        # the step goes this share of the way to the prediction
        share = abs(begin - end) / max(begin, end, 1e-9)
        error = share * relative_error(found, prediction, self.parts)
        self.statistics.errors[self.step] = error
        change = 1 if error <= self.level.limit else -1
        self._most = min(max(self._most + change, 0), self.level.in_row)
        return True


def relative_error(found: torch.Tensor, truth: torch.Tensor, parts: Sequence[int] = ()) -> float:
    """Norm of the difference over the norm of the truth, of the video and part where it is largest.

    Args:
        found, truth: [B, ...].
        parts: sizes into which a video's values fall, or none for one.
    """
    pieces = [x.float().flatten(1) for x in (found - truth, truth)]
    sizes = list(parts) or [pieces[0].shape[1]]
    away, whole = (torch.stack([p.norm(dim=1) for p in x.split(sizes, 1)]) for x in pieces)
    return float((away / whole.clamp(min=1e-12)).max())
