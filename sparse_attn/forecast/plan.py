"""How boldly to forecast, and which steps of a run may be."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ..schedule import Schedule, StepKind
from ..sentences import Sentence

# shorter schedules have too little between the first fifth and the last step
LEAST_STEPS = 12
# in which the composition forms
COMPUTED_SHARE = 0.2


@dataclass(frozen=True)
class Level:
    """How boldly to forecast.

    Args:
        degree: of the polynomial in sigma, which goes through one point more.
        in_row: steps that are forecast between two computed ones, at most.
        limit: of how far off a step may end that a forecast would have made, as a share of the size
            of what the model returns; beyond it fewer are forecast.
        damped: of degree 1, whether a third point damps the slope of the line.
    """

    degree: int
    in_row: int
    limit: float
    damped: bool = False

    @property
    def points(self) -> int:
        """How many of the latest points a forecast is made of, once there are so many."""
        return self.degree + 1 + self.damped


# damped, two of three steps in a row are closer on the lab's models: behind Balanced by 1.1 +- 0.4 dB,
# dense by 0.6 +- 0.6; every other one is not (tests/lab/README.md)
LEVELS = {"careful": Level(1, 1, 0.03), "fast": Level(1, 2, 0.06, damped=True)}


@dataclass(frozen=True)
class ForecastPlan:
    """Which steps of a run may be forecast.

    Args:
        sigmas: noise levels at which the steps begin, and at which the last one ends.
        first_step, total_steps: the run's place within the whole schedule.
        allowed: numbers, within the run, of those that may be.
    """

    sigmas: tuple[float, ...]
    first_step: int
    total_steps: int
    allowed: frozenset[int]

    @property
    def why_not(self) -> str:
        """Why no step of the run is forecast, or an empty string."""
        if self.total_steps < LEAST_STEPS:
            steps, least = str(self.total_steps), str(LEAST_STEPS)
            return Sentence("skip_few_steps", steps=steps, least=least)
        return ""


def plan_forecasts(
    sigmas: Sequence[float], first_step: int, total_steps: int, schedule: Schedule | None = None
) -> ForecastPlan:
    """Decide which steps may be forecast: none of the first fifth of the schedule, not the last.

    Args:
        schedule: what AdaSpa does in these steps, or None without it. Its searches are computed,
            and so are the steps whose LSE they need.
    """
    last = len(sigmas) - 2
    begin = max(ceil(COMPUTED_SHARE * total_steps) - first_step, 0)
    allowed = set(range(begin, last)) if total_steps >= LEAST_STEPS else set()
    if schedule is not None:
        kept = {
            step
            for step in allowed
            if schedule.kind(step) is StepKind.SEARCH or schedule.wants_lse(step)
        }
        allowed -= kept
    return ForecastPlan(tuple(sigmas), first_step, total_steps, frozenset(allowed))
