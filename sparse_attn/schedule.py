"""Warm-up, searches and sparse steps: what each step of a sampler run does.

All points are shares of the *whole* schedule, so the same settings mean the same on 4 and on 50
steps. A sampler may run only a slice of it (two samplers in a row, denoise below one); the slice's
place is derived from the progress at its ends.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from math import floor

from .config import AdaSpaConfig

# of fewer steps a dense one and a dense search leave little to save
STEPS_FOR_A_DENSE_SEARCH = 5
# a slice of one short step must not claim a schedule of more steps than anyone samples
MOST_STEPS = 1000


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
        first_step: number of the run's first step within the whole schedule, from 0.
        total_steps: steps of the whole schedule.
        sigmas: noise levels at which the steps begin, and at which the last one ends.
        last_searches: whether a search in the run's last step is of use to anyone.
        sparse_search: whether the first search takes the LSE of the dense step before it and its
            step then runs sparse, so that it costs no dense pass.
    """

    kinds: tuple[StepKind, ...]
    first_step: int
    total_steps: int
    sigmas: tuple[float, ...]
    last_searches: bool = True
    sparse_search: bool = False

    def kind(self, step: int) -> StepKind:
        return self.kinds[step]

    def number(self, step: int) -> int:
        """The number of a step of this run in the whole schedule, from 1 as people count."""
        return self.first_step + step + 1

    def until(self, step: int | None) -> "Schedule":
        """The schedule of a run that was stopped at a step of the whole schedule; None is none."""
        if step is None:
            return self
        return replace(self, kinds=self.kinds[: step - self.first_step + 1])

    def dense_from(self, step: int) -> "Schedule":
        """The schedule whose steps are dense from `step` of this run on."""
        kept = self.kinds[:step]
        return replace(self, kinds=kept + (StepKind.DENSE,) * (len(self.kinds) - len(kept)))

    def may_search(self, step: int) -> bool:
        """Whether what a search of `step` finds is used after it."""
        return self.last_searches or step < len(self.kinds) - 1

    def wants_lse(self, step: int) -> bool:
        """Whether a dense step must keep its LSE for the search of the next step."""
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
        """Step numbers by kind, such as "steps 1-2 dense, 3 search, 4-20 sparse"."""
        parts = []
        start = 0
        for i, kind in enumerate(self.kinds):
            if i + 1 < len(self.kinds) and self.kinds[i + 1] is kind:
                continue
            first, last = self.number(start), self.number(i)
            parts.append((f"{first}" if first == last else f"{first}-{last}") + f" {kind.value}")
            start = i + 1
        if not parts:
            return "no steps"
        return ("step " if len(self.kinds) == 1 else "steps ") + ", ".join(parts)


def plan(
    sigmas: Sequence[float],
    progress_of: Callable[[float], float],
    config: AdaSpaConfig,
    *,
    keeps_pattern: bool = False,
    begins_with_pattern: bool = False,
) -> Schedule:
    """Decide what every step of a sampler run does.

    Args:
        sigmas: the run's noise levels, one more than there are steps. They fall as a rule; a run
            that adds noise has rising ones, and is planned from its own beginning. A list that
            turns (restarts, two phases) counts its own steps.
        progress_of: share of the whole schedule that lies before a sigma, in [0, 1], where sigmas
            fall.
        config: warm-up, search points and the percent window.
        keeps_pattern: another run begins with what this one has found.
        begins_with_pattern: this run begins with what another one has found.
    """
    sigmas = tuple(float(s) for s in sigmas)
    steps = len(sigmas) - 1
    if steps < 1:
        return Schedule((), 0, 0, ())
    first, total = place(sigmas, progress_of)
    warm = nearest(config.warmup * total)
    few, sparse_search = total < STEPS_FOR_A_DENSE_SEARCH, False
    # A pattern found at the very first step misses most of what the video becomes. A recall is asked
    # for of exact masses, so its search is dense, and of a few steps two dense ones are too many.
    if config.warmup and not warm and not (few and config.recall):
        warm, sparse_search = 1, few
    again = {nearest(point * total) for point in config.search_points}
    last = first + steps - 1
    if config.search_gap or not keeps_pattern:
        again.discard(last)
    kinds = []
    latest = None
    for step in range(first, first + steps):
        share = step / total
        outside = share < config.start_percent or share >= config.end_percent
        # nothing follows that could use what a first search finds
        useless = step == last and latest is None and not (keeps_pattern or begins_with_pattern)
        useless = useless and not (sparse_search and step > first)
        if step < warm or outside or useless:
            kinds.append(StepKind.DENSE)
        elif latest is None or (step in again and step - latest >= config.search_gap):
            kinds.append(StepKind.SEARCH)
            latest = step
        else:
            kinds.append(StepKind.SPARSE)
    return Schedule(
        tuple(kinds), first, total, sigmas, last_searches=keeps_pattern, sparse_search=sparse_search
    )


def place(sigmas: tuple[float, ...], progress_of) -> tuple[int, int]:
    """The number of a run's first step in the whole schedule, and the steps of that.

    Args:
        sigmas, progress_of: as `plan` takes them; at least one step.
    """
    steps = len(sigmas) - 1
    falls, rises = (all(sign * (a - b) >= 0 for a, b in pairwise(sigmas)) for sign in (1, -1))
    if not falls and not rises:
        return 0, steps
    begin, end = progress_of(sigmas[0]), progress_of(sigmas[-1])
    if rises:
        begin, end = 1 - begin, 1 - end
    if not end - begin > 1e-6:
        return 0, steps
    total = min(nearest(steps / (end - begin)), max(steps, MOST_STEPS))
    return min(nearest(begin * total), total - steps), total


class StepCounter:
    """Tells which step of a run an evaluation of the model belongs to, by its sigma.

    A sampler evaluates at the sigmas of its list and between them, twice at one (heun) and ahead,
    and the list may fall, rise, repeat a sigma and start again. An evaluation belongs to the nearest
    step, at or after the present one, in whose interval it falls; only where there is none, to one
    before. One at the end of an interval belongs to the step that begins there.

    Args:
        sigmas: noise levels at which the steps begin, and at which the last one ends.
    """

    def __init__(self, sigmas: Sequence[float]):
        self.sigmas = tuple(sigmas)
        self.steps = len(self.sigmas) - 1
        self._present = 0
        # where the latest sigma lies, and where it lay when the sampler last spoke
        self._found = 0
        self._begun: int | None = None
        self._spoke = False
        self._lock = threading.Lock()

    def of(self, sigma: float) -> int:
        """Number of the step, from 0, that evaluates the model at `sigma`."""
        with self._lock:
            found = self._find(sigma)
            if self._spoke and found == self._present and self._repeats(found, sigma):
                found += 1
            self._found, self._spoke = found, False
            # heunpp2 looks two sigmas ahead, before its next step has begun
            ahead = self._begun is not None and found == self._begun + 2
            self._present = found - 1 if ahead and _close(sigma, self.sigmas[found]) else found
            return self._present

    def spoken(self) -> None:
        """Note that the sampler has evaluated the model once for its step, as its callback says."""
        with self._lock:
            self._begun, self._spoke = self._found, True

    def _find(self, sigma: float) -> int:
        ahead, behind = range(self._present, self.steps), range(self._present - 1, -1, -1)
        for step in (*ahead, *behind):
            if self._holds(step, sigma):
                return self._nearest_start(step, sigma)
        return min(ahead, key=lambda step: abs(sigma - self.sigmas[step]))

    def _holds(self, step: int, sigma: float) -> bool:
        begin, end = self.sigmas[step : step + 2]
        if _close(sigma, begin):
            return True
        inside = min(begin, end) < sigma < max(begin, end) or _close(sigma, end)
        return inside and (step == self.steps - 1 or not _close(sigma, end))

    def _nearest_start(self, step: int, sigma: float) -> int:
        """The step that begins nearest to a sigma, of those that are too short to be told apart."""
        while (
            step + 1 < self.steps
            and _close(sigma, self.sigmas[step + 1])
            and abs(sigma - self.sigmas[step + 1]) < abs(sigma - self.sigmas[step])
        ):
            step += 1
        return step

    def _repeats(self, step: int, sigma: float) -> bool:
        """Whether the step after `step` begins at the same sigma."""
        return step + 1 < self.steps and all(
            _close(sigma, start) for start in self.sigmas[step : step + 2]
        )


def _close(a: float, b: float) -> bool:
    # a sigma goes through float32, and in some samplers through its logarithm
    return abs(a - b) <= 1e-4 * max(abs(a), abs(b)) + 1e-9
