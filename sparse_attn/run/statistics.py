"""What happened in a run, as plain numbers: the node's summary and the report read only this."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from math import isclose
from statistics import median

import torch

from ..config import NO_WIDGET, AdaSpaConfig
from ..forecast.statistics import ForecastStatistics
from ..schedule import Schedule, StepKind
from ..sentences import Sentence
from ..token_layout import TokenLayout
from . import report
from .pace import Speed
from .timer import Timing
from .verdict import verdict


@dataclass
class Pattern:
    """What one search found for one layer and conditioning; lists run over heads.

    Args:
        step: number of the step within the whole schedule, from 0.
        exact: whether the masses came with the step's own LSE; else recall is an estimate.
        density, recall: per head, mean over the batch.
        block_map: [H, rows, columns] uint8, kept share of each cell times 255, first of the batch.
        carried: found by another run; `recall` is what a sample of this run's rows has.
        similar: by head, the share of the batch whose blocks are of similar tokens; None where the
            blocks are in the model's order.
    """

    step: int
    exact: bool
    density: list[float]
    recall: list[float]
    block_map: torch.Tensor
    carried: bool = False
    similar: list[float] | None = None


class Patterns(dict[tuple[int, str], Pattern]):
    """The latest pattern by layer and conditioning. Means are over layers and heads.

    `samples` holds, by the same keys, the step of the whole schedule and the recall per head that a
    sample of rows had in it, as late as the mask was used.
    """

    def __init__(self):
        super().__init__()
        self.samples: dict[tuple[int, str], tuple[int, list[float]]] = {}

    def density(self) -> float | None:
        """Mean, or None before a search."""
        found = self._mean_and_least(p.density for p in self.values())
        return found and found[0]

    def recall(self) -> tuple[float, float] | None:
        """(mean, worst head) at the last search of each layer, or None before a search."""
        return self._mean_and_least(p.recall for p in self.values())

    def sampled_recall(self) -> tuple[float, float] | None:
        """(mean, worst head) of the samples, or None where none was taken."""
        return self._mean_and_least(recall for _, recall in self.samples.values())

    def similar(self) -> float | None:
        """Share of the heads whose blocks are of similar tokens, or None without a tail."""
        found = self._mean_and_least(p.similar or () for p in self.values())
        return found and found[0]

    def exact(self) -> bool:
        return all(p.exact for p in self.values())

    def recall_label(self) -> str:
        """How the recall was found, where it was not measured whole."""
        if self.exact():
            return ""
        return "sampled" if all(p.carried for p in self.values()) else "estimated"

    @staticmethod
    def _mean_and_least(lists) -> tuple[float, float] | None:
        values = [value for one in lists for value in one]
        return (sum(values) / len(values), min(values)) if values else None


@dataclass
class Memory:
    """What a run holds between steps.

    Args:
        predicted_bytes: of one conditioning, said before the run.
        held_bytes: the most ever held.
        place: "gpu" or "cpu".
        conditionings, parts: prompts, and parts of the video (context windows, tiles, areas), where
            it is not sampled whole; each pair has masks of its own.
    """

    predicted_bytes: int = 0
    held_bytes: int = 0
    place: str = "gpu"
    conditionings: set[Hashable] = field(default_factory=set)
    parts: set[tuple] = field(default_factory=set)


@dataclass
class LowPrecisionCalls:
    """Calls in low precision, searches with INT8 q and k, and why other calls declined."""

    calls: int = 0
    searches: int = 0
    declined: Counter[str] = field(default_factory=Counter)


@dataclass
class Reuse:
    """Masks that came from another run, and those that outlive this one.

    Args:
        source: where the pattern comes from, for people, or an empty string.
        masks: how many are in use. recall: what each of them had when it was found.
        refused: why others are not, counted.
        kept: lines on what outlives the run in memory and on disk.
    """

    source: str = ""
    masks: int = 0
    recall: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    kept: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fingerprint:
    """Sum and sum of squares of a latent, which tell one run's from another's."""

    total: float
    squares: float

    @classmethod
    def of(cls, *parts: torch.Tensor) -> "Fingerprint":
        """Of a latent of one or several parts, in any order of their elements."""
        values = [part.detach().cpu().double() for part in parts]
        return cls(
            sum(float(x.sum()) for x in values), sum(float(x.square().sum()) for x in values)
        )

    def distance(self, other: "Fingerprint") -> float:
        """By how much the sums differ, in units of what random signs would give."""
        return abs(self.total - other.total) / (max(self.squares, other.squares) ** 0.5 or 1.0)

    def is_of(self, other: "Fingerprint") -> bool:
        """Whether both are of one latent, which may have been in half precision on the way."""
        alike = isclose(self.squares, other.squares, rel_tol=1e-3)
        return alike and self.distance(other) < 1e-3


@dataclass
class RunStatistics:
    """One sampler run.

    Args:
        config: what the user asked for.
        schedule: what each step did.
        part: which of several models, for people.
        model: name of the model family, or why there is none.
        layout: of the sequences that AdaSpa serves, or None before the first.
        backend, dense_choice: who computes sparse attention, and serves dense steps, for people.
        expected: what was said before the run.
        sampled: what decides how long the run takes, its settings aside.
        took: seconds from the first call of the model to the end of the sampler, or None.
        seconds_off: what an equal run with AdaSpa off took, or None.
        dense_step: seconds of a dense step of what it samples, or None.
        speed: of sparse calls beside dense ones, or None where that is not known.
        dense_from: step of this run, from 0, from which `why_dense` made it dense, or None.
        steps: kind and seconds of each finished step of the whole model.
        entered: numbers, within the run, of the steps in which the diffusion model was entered, or
            may have been.
        forecast: of the steps that Skip Steps forecast, if it is beside.
        kept_dense: why calls of the video's self-attention ran dense, counted; where the model's
            calls cannot be told apart, of all its attention.
        beside: why calls are not the video's self-attention, counted.
        unseen: what stood in the place of self-attention of the video that never came, counted.
        results: of the latents that the run returned, its samples and the last denoised ones.
        stopped_at: number, from 0, of the step in the whole schedule that was interrupted.
    """

    config: AdaSpaConfig
    schedule: Schedule
    part: str = ""
    model: str = ""
    layout: TokenLayout | None = None
    backend: str = ""
    dense_choice: str = ""
    expected: str = ""
    timing: Timing = field(default_factory=Timing)
    sampled: Hashable = None
    took: float | None = None
    seconds_off: float | None = None
    dense_step: float | None = None
    speed: Speed | None = None
    dense_from: int | None = None
    why_dense: str = ""
    steps: list[tuple[StepKind, float]] = field(default_factory=list)
    entered: set[int] = field(default_factory=set)
    forecast: ForecastStatistics = field(default_factory=ForecastStatistics)
    patterns: Patterns = field(default_factory=Patterns)
    memory: Memory = field(default_factory=Memory)
    low_precision: LowPrecisionCalls = field(default_factory=LowPrecisionCalls)
    reuse: Reuse = field(default_factory=Reuse)
    kept_dense: Counter[str] = field(default_factory=Counter)
    beside: Counter[str] = field(default_factory=Counter)
    unseen: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    results: list[Fingerprint] = field(default_factory=list)
    finished: bool = False
    stopped_at: int | None = None

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    @property
    def tokens(self) -> int:
        return self.layout.tokens if self.layout else 0

    def was_skipped(self, step: int) -> bool:
        """Whether a step of the run left the model out, as under EasyCache, where others did not."""
        return bool(self.entered) and step not in self.entered

    def owes_search(self, step: int) -> bool:
        """Whether a search that was planned up to `step` has not taken place, as under a cache."""
        due = self.schedule.search_due(step)
        return due >= 0 and bool(self.entered) and self.entered.isdisjoint(range(due, step + 1))

    def skipped(self) -> list[int]:
        """Steps that another node skipped, by their numbers in the whole schedule."""
        first, passed = self.schedule.first_step, len(self.schedule.kinds)
        if not self.finished:
            passed = max(self.entered, default=-1) + 1
        steps = (step for step in range(passed) if step not in self.forecast.forecast)
        return [first + step for step in steps if self.was_skipped(step)]

    def step_kinds(self) -> list[str]:
        """What each step of the run does, or did instead."""
        return self.forecast.kinds([kind.value for kind in self.schedule.kinds])

    def step_seconds(self) -> dict[str, float]:
        """Median seconds of a step by kind; a first step also pays for what is set up once."""
        times: dict[str, list[float]] = {}
        for kind, took in self.steps:
            # where no pattern was found, every step ran dense, whatever was planned
            times.setdefault(kind.value if self.patterns else "dense", []).append(took)
        return {kind: median(took) for kind, took in times.items()}

    def seconds_dense(self) -> float | None:
        """About what the run would have taken dense; None where that is not known.

        By its own dense calls, else by dense steps of earlier runs of what it samples.
        """
        if self.took is None or not self.patterns:
            return None
        if self.timing.dense:
            saved = self.timing.saved()
            return None if saved is None else self.took + saved
        if self.dense_step is None or self.skipped() or self.forecast.forecast:
            return None
        return self.dense_step * len(self.schedule.kinds)

    def verdict(self) -> list[Sentence]:
        """What people want to know first: seconds, closeness, and what to do."""
        return verdict(self)

    def summary(self) -> str:
        """One line for the log."""
        return report.summary(self)

    def lines(self) -> list[str]:
        """The whole report, a line each."""
        return report.lines(self)

    def record(self, preset: str) -> dict:
        """What the metadata of a saved video hold."""
        settings = {
            name: value for name, value in vars(self.config).items() if name not in NO_WIDGET
        }
        return {
            "preset": preset, "settings": settings, "part": self.part,
            "verdict": " ".join(self.verdict()), "density": self.patterns.density(),
            "seconds": self.took, "steps": self.schedule.describe(), "tokens": self.tokens,
        }  # fmt: skip

    def as_dict(self) -> dict:
        """Plain numbers for a file or another program."""
        mean, worst = self.patterns.recall() or (None, None)
        return {
            "model": self.model,
            "tokens": self.tokens,
            "steps": self.schedule.describe(),
            "steps_skipped": self.skipped(),
            "steps_forecast": self.forecast.numbers(self.forecast.forecast),
            "forecast_seconds_saved": self.forecast.saved(),
            "expected": self.expected,
            "density": self.patterns.density(),
            "recall": mean,
            "recall_worst_head": worst,
            "recall_exact": self.patterns.exact(),
            "recall_asked": self.config.recall,
            "recall_sampled": self.patterns.sampled_recall(),
            "verdict": " ".join(self.verdict()),
            "sampling_seconds": self.took,
            "sampling_seconds_dense": self.seconds_dense(),
            "sampling_seconds_off": self.seconds_off,
            "dense_from": self.dense_from,
            "attention_seconds": self.timing.spent(),
            "attention_seconds_saved": self.timing.saved(),
            "dense_call_seconds": self.timing.dense_call(),
            "sparse_call_seconds": self.timing.sparse_call(),
            "step_seconds": self.step_seconds(),
            "held_bytes": self.memory.held_bytes,
            "predicted_bytes": self.memory.predicted_bytes,
            "parts": len(self.memory.parts),
            "backend": self.backend,
            "dense_choice": self.dense_choice,
            "stopped_at": self.stopped_at,
            "tail": "pooled" if self.config.pooled else "none",
            "heads_by_similarity": self.patterns.similar(),
            "low_precision": self.config.low_precision or "",
            "low_precision_calls": self.low_precision.calls,
            "low_precision_searches": self.low_precision.searches,
            "not_low_precision": dict(self.low_precision.declined),
            "carried": self.reuse.masks,
            "not_carried": dict(self.reuse.refused),
            "kept_dense": dict(self.kept_dense),
            "not_self_attention": dict(self.beside),
            "not_seen": dict(self.unseen),
            "warnings": list(self.warnings),
        }
