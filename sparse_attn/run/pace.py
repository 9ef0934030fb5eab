"""What is known of speed, kept until ComfyUI restarts: whether sparse is faster, and how long runs took."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median

import torch

from ..config import AdaSpaConfig
from ..sentences import Sentence
from .report import seconds
from .timer import Timing, shape_of

# a sparse call must take less than this share of a dense one, or the rest of a run is dense
FASTER = 0.9
# sparse calls that decide; the one before them may have compiled
DECIDING = 3
# so much longer a video may be than the one measured, for a length to be told from it
FARTHEST = 4


@dataclass(frozen=True)
class Speed:
    """Median seconds of a dense and of a sparse call of one shape.

    Args:
        tokens: in the sequence.
    """

    dense: float
    sparse: float
    tokens: int

    @property
    def pays(self) -> bool:
        return self.sparse < FASTER * self.dense

    def least_tokens(self, kept: float) -> int | None:
        """About how many tokens sparse needs to be faster, or None where that cannot be told.

        With L tokens a dense call takes a L^2 and a sparse one kept a L^2 + c L. The sparse one of
        this shape gives c; it takes the share `FASTER` of the dense one at L (sparse / dense - kept)
        / (FASTER - kept).

        Args:
            kept: share of the block pairs that a sparse call computes.
        """
        if kept >= FASTER:
            return None
        times = (self.sparse / self.dense - kept) / (FASTER - kept)
        return int(round(times * self.tokens, -2)) if times <= FARTHEST else None


@dataclass
class Pace:
    """Verdicts and times of the process. Every verdict falls once.

    Args:
        verdicts: by shape of a call and settings.
        dense_calls: seconds of a dense call by shape.
        dense_steps: seconds of the fastest dense step and of the attention in it (None while ours
            ran none), by what is sampled.
        off: seconds of the latest run with AdaSpa off, by what is sampled and its noise levels.
    """

    verdicts: dict[tuple[tuple, AdaSpaConfig], Speed] = field(default_factory=dict)
    dense_calls: dict[tuple, float] = field(default_factory=dict)
    dense_steps: dict[Hashable, tuple[float, float | None]] = field(default_factory=dict)
    off: dict[Hashable, float] = field(default_factory=dict)

    def known(self, q: torch.Tensor, config: AdaSpaConfig) -> Speed | None:
        """The verdict on calls like that of `q`."""
        return self.verdicts.get((shape_of(q), config))

    def judge(self, timing: Timing, config: AdaSpaConfig) -> dict[tuple, Speed]:
        """The verdicts on the shapes that a run has served sparse, as far as they have fallen."""
        found = {}
        for (shape, kind), sparse in list(timing.shapes.items()):
            dense = timing.shapes.get((shape, "dense")) or timing.shapes.get(
                (shape, "search_dense")
            )
            if dense:
                self.dense_calls[shape] = median(dense)
            if kind != "sparse":
                continue
            known = self.verdicts.get((shape, config))
            if known is None and shape in self.dense_calls and len(sparse) > DECIDING:
                known = Speed(self.dense_calls[shape], median(sparse[1:]), shape[1])
                self.verdicts[shape, config] = known
            if known is not None:
                found[shape] = known
        return found

    def note_dense_step(self, work: Hashable, took: float, attention: float | None) -> None:
        """Note a dense step of the whole model; the first one of a run also pays for what is set up.

        Args:
            took: its seconds. attention: those of the attention in it, None where it was not ours.
        """
        if work is None:
            return
        known, its_attention = self.dense_steps.get(work, (float("inf"), None))
        first, second = attention, its_attention
        if took >= known:
            first, second = second, first
        self.dense_steps[work] = min(took, known), second if first is None else first

    def expect(self, work: Hashable, steps: int, skipped: float | None) -> list[Sentence]:
        """About how long `steps` steps take, where a dense one is known.

        Args:
            skipped: share of the attention's seconds that will not be spent, or None.
        """
        if work not in self.dense_steps:
            return []
        step, attention = self.dense_steps[work]
        dense = seconds(step * steps)
        if attention is None or not skipped:
            return [Sentence("expect_dense", dense=dense)]
        took = seconds((step - skipped * attention) * steps)
        return [Sentence("expect", took=took, dense=dense)]
