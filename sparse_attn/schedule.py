"""Warm-up, searches and sparse steps: what each step of a sampler run does.

All points are shares of the *whole* schedule, so the same settings mean the same on 4 and on 50
steps. A sampler may run only a slice of it (two samplers in a row, denoise below one); the slice's
place is derived from the progress at its ends.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import floor

from .config import AdaSpaConfig

# fewer steps have little to save beside a dense one and a search
STEPS_FOR_A_DENSE_ONE = 5


class StepKind(Enum):
    DENSE = "dense"  # runs all blocks
    SEARCH = "search"  # chooses a new mask
    SPARSE = "sparse"  # reuses the mask


def nearest(x: float) -> int:
    return floor(x + 0.5)


@dataclass(frozen=True)
class Schedule:
    """A sampler run as one `StepKind` per step.

    Args:
        kinds: what each step of this run does.
        first_step: number of the run's first step within the whole schedule.
        total_steps: steps of the whole schedule.
        sigmas: noise level at which each step starts, descending; [len(kinds)].
    """

    kinds: tuple[StepKind, ...]
    first_step: int
    total_steps: int
    sigmas: tuple[float, ...]

    def step_of(self, sigma: float) -> int:
        """Number of the step, from 0, that evaluates the model at `sigma`.

        A sampler may evaluate twice at one sigma (heun) or between two (dpm_2): such an evaluation
        belongs to the step in whose interval it falls.
        """
        # first index whose sigma lies below, with room for float32 rounding
        below = bisect_left([-s for s in self.sigmas], -sigma * (1 - 1e-4) + 1e-9)
        return min(max(below - 1, 0), len(self.kinds) - 1)

    def kind(self, step: int) -> StepKind:
        return self.kinds[step]

    def wants_lse(self, step: int) -> bool:
        """Whether a dense step must keep its LSE, so that the next step searches in one pass."""
        following = self.kinds[step + 1 : step + 2]
        return self.kinds[step] is StepKind.DENSE and following == (StepKind.SEARCH,)

    def searches_after(self, step: int) -> bool:
        """Whether a later step of this run searches again, with the LSE kept until then."""
        return StepKind.SEARCH in self.kinds[step + 1 :]

    def search_due(self, step: int) -> int:
        """The step up to `step` at which the latest search was planned, or -1.

        A cache of the host may skip that step; the search then takes place at the next one.
        """
        return max((i for i in range(step + 1) if self.kinds[i] is StepKind.SEARCH), default=-1)

    def is_last_sparse(self, step: int) -> bool:
        """Whether a sparse step is the last before another search, a dense step or the end."""
        following = self.kinds[step + 1 : step + 2]
        return self.kinds[step] is StepKind.SPARSE and following != (StepKind.SPARSE,)

    def describe(self) -> str:
        """Step numbers by kind, such as "steps 0-1 dense, 2 search, 3-19 sparse"."""
        parts = []
        start = 0
        for i, kind in enumerate(self.kinds):
            if i + 1 < len(self.kinds) and self.kinds[i + 1] is kind:
                continue
            first, last = self.first_step + start, self.first_step + i
            parts.append((f"{first}" if first == last else f"{first}-{last}") + f" {kind.value}")
            start = i + 1
        if not parts:
            return "no steps"
        return ("step " if len(self.kinds) == 1 else "steps ") + ", ".join(parts)


def plan(
    sigmas: Sequence[float], progress_of: Callable[[float], float], config: AdaSpaConfig
) -> Schedule:
    """Decide what every step of a sampler run does.

    Args:
        sigmas: the run's noise levels, descending, one more than there are steps.
        progress_of: share of the whole schedule that lies before a sigma, in [0, 1].
        config: warm-up, search points and the percent window.
    """
    steps = len(sigmas) - 1
    if steps < 1:
        return Schedule((), 0, 0, ())
    begin, end = progress_of(sigmas[0]), progress_of(sigmas[-1])
    total = max(steps, nearest(steps / max(end - begin, 1e-6))) if end > begin else steps
    # a one-step slice of a long schedule must not claim more steps than anyone samples
    total = min(total, 1000)
    first = min(nearest(begin * total), total - steps)

    warm = nearest(config.warmup * total)
    # a pattern found at the very first step misses most of what the video becomes
    if config.warmup and total >= STEPS_FOR_A_DENSE_ONE:
        warm = max(warm, 1)
    again = {nearest(point * total) for point in config.search_points}
    if config.search_gap:
        again.discard(first + steps - 1)
    kinds = []
    latest = None
    for step in range(first, first + steps):
        share = step / total
        outside = share < config.start_percent or share >= config.end_percent
        if step < warm or outside:
            kinds.append(StepKind.DENSE)
        elif latest is None or (step in again and step - latest >= config.search_gap):
            kinds.append(StepKind.SEARCH)
            latest = step
        else:
            kinds.append(StepKind.SPARSE)
    return Schedule(tuple(kinds), first, total, tuple(float(s) for s in sigmas[:-1]))
