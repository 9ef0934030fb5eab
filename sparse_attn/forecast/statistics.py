"""What the forecasts of a run came to, as plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

FORECAST = "forecast"


@dataclass
class ForecastStatistics:
    """The forecasts of one sampler run; steps are numbers within the run.

    Args:
        steps: how many the run has, 0 where nothing is asked of a forecast.
        first_step: number of the run's first step within the whole schedule.
        why_not: why no further step is forecast, or an empty string.
        forecast: steps that the model did not compute. evaluations: of the model, in these.
        withheld: steps that it computed because earlier forecasts were too far off.
        errors: by computed step, how far off a forecast would have ended it, as a share of the size
            of what the model returned.
        seconds: of computed evaluations that were compared with a forecast.
    """

    steps: int = 0
    first_step: int = 0
    why_not: str = ""
    forecast: set[int] = field(default_factory=set)
    evaluations: int = 0
    withheld: set[int] = field(default_factory=set)
    errors: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def numbers(self, steps: set[int]) -> list[int]:
        """Steps as the whole schedule counts them, ascending."""
        return [self.first_step + step for step in sorted(steps)]

    def kinds(self, planned: Sequence[str]) -> list[str]:
        """What each step does, or did instead of what was planned."""
        return [FORECAST if i in self.forecast else kind for i, kind in enumerate(planned)]

    def saved(self) -> float | None:
        """Seconds that the forecast evaluations would have taken, or None where none was timed."""
        return median(self.seconds) * self.evaluations if self.seconds else None
