"""What happened in a run, as plain numbers: the node's summary and the report read only this."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch

from ..schedule import Schedule, StepKind
from . import report as run_report


@dataclass
class Pattern:
    """What one search found for one layer and conditioning; lists run over heads.

    Args:
        step: number of the step within the whole schedule.
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


@dataclass
class Timing:
    """Seconds of attention calls, one entry per call and batch row.

    Args:
        search: first searches, dense output included; `search_dense` is their dense pass alone.
        search_again: later searches, without output.
        carry: measuring what carried masks hold. sample: what masks still hold in a later step.
    """

    dense: list[float] = field(default_factory=list)
    search: list[float] = field(default_factory=list)
    search_dense: list[float] = field(default_factory=list)
    search_again: list[float] = field(default_factory=list)
    sparse: list[float] = field(default_factory=list)
    carry: list[float] = field(default_factory=list)
    sample: list[float] = field(default_factory=list)

    def recorder(self, kind: str, rows: int) -> Callable[[float], None]:
        """Return what notes the seconds of a call of `rows` videos, row by row."""
        entries = getattr(self, kind)
        return lambda seconds: entries.extend([seconds / rows] * rows)

    def searching(self) -> float:
        return sum(map(sum, (self.search, self.search_again, self.carry, self.sample)))

    def spent(self) -> float:
        return sum(self.dense) + self.searching() + sum(self.sparse)

    def dense_call(self) -> float | None:
        """Seconds of one dense call: of this run's dense steps, else of its searches' dense pass."""
        calls = self.dense or self.search_dense
        return median(calls) if calls else None

    def saved(self) -> float | None:
        """Seconds saved over running every call dense; negative when the searches cost more."""
        dense = self.dense_call()
        if dense is None or not (self.sparse or self.search):
            return None
        return dense * (len(self.sparse) + len(self.search)) - sum(self.sparse) - self.searching()


@dataclass
class RunStatistics:
    """One sampler run.

    Args:
        schedule: what each step did.
        steps: kind and seconds of each finished step of the whole model.
        attended: numbers, within the run, of the steps in which the model called its attention.
        model: name of the model family, or why there is none.
        part: which of several models, for people.
        expected: what was said before the run.
        conditionings, windows: prompts, and parts of a long video; each pair has masks of its own.
        result_sum: sum of the latent that the run returned, or None.
        carried_from: where a carried pattern comes from; `carried` counts the masks in use,
            `carried_recall` holds what they had when found, `not_carried` counts why others are not.
        kept_pattern: what outlives the run in memory and on disk.
        low_precision: "int8" where the user asked; `low_precision_calls` counts the calls
            that ran so, `not_low_precision` why others did not, `low_precision_searches` the later
            searches that measured with INT8 q and k.
        asked_recall: recall that the user asked of every head, or 0.
        samples: by layer and conditioning, as `patterns`: the step of the whole schedule and the
            recall per head that a sample of rows had in it, as late as the mask was used.
        tail: what stood for skipped blocks: "pooled" or "none".
        stopped_at: number of the step in the whole schedule at which the run was interrupted.
    """

    schedule: Schedule
    model: str = ""
    part: str = ""
    layout: str = ""
    tokens: int = 0
    backend: str = ""
    dense_choice: str = "host"
    cache_place: str = "gpu"
    expected: str = ""
    predicted_bytes: int = 0
    held_bytes: int = 0
    conditionings: set = field(default_factory=set)
    windows: set = field(default_factory=set)
    timing: Timing = field(default_factory=Timing)
    steps: list[tuple[StepKind, float]] = field(default_factory=list)
    attended: set[int] = field(default_factory=set)
    kept_dense: Counter = field(default_factory=Counter)
    patterns: dict[tuple[int, str], Pattern] = field(default_factory=dict)
    carried_from: str = ""
    carried: int = 0
    carried_recall: list[float] = field(default_factory=list)
    not_carried: Counter = field(default_factory=Counter)
    kept_pattern: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    result_sum: float | None = None
    finished: bool = False
    low_precision: str = ""
    low_precision_calls: int = 0
    low_precision_searches: int = 0
    not_low_precision: Counter = field(default_factory=Counter)
    stopped_at: int | None = None
    asked_recall: float = 0.0
    tail: str = "none"
    samples: dict[tuple[int, str], tuple[int, list[float]]] = field(default_factory=dict)

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def samples_recall(self) -> tuple[float, float] | None:
        """(mean, worst head) of the samples, or None where none was taken."""
        values = [r for _, recall in self.samples.values() for r in recall]
        return (sum(values) / len(values), min(values)) if values else None

    def was_skipped(self, step: int) -> bool:
        """Whether a step of the run called no attention, as under EasyCache, where others did."""
        return bool(self.attended) and step not in self.attended

    def skipped(self) -> list[int]:
        """Steps that a cache skipped, by their numbers in the whole schedule."""
        first, passed = self.schedule.first_step, len(self.schedule.kinds)
        if not self.finished:
            passed = max(self.attended, default=-1) + 1
        return [first + step for step in range(passed) if self.was_skipped(step)]

    def density(self) -> float | None:
        """Mean over layers and heads, or None before a search."""
        values = [d for p in self.patterns.values() for d in p.density]
        return sum(values) / len(values) if values else None

    def recall(self) -> tuple[float, float] | None:
        """(mean, worst head) at the last search of each layer, or None before a search."""
        values = [r for p in self.patterns.values() for r in p.recall]
        return (sum(values) / len(values), min(values)) if values else None

    def similar(self) -> float | None:
        """Share of the heads whose blocks are of similar tokens, or None without a tail."""
        values = [s for p in self.patterns.values() for s in p.similar or ()]
        return sum(values) / len(values) if values else None

    def exact(self) -> bool:
        return all(p.exact for p in self.patterns.values())

    def recall_label(self) -> str:
        """How the recall was found, where it was not measured whole."""
        if self.exact():
            return ""
        return "sampled" if all(p.carried for p in self.patterns.values()) else "estimated"

    def step_seconds(self) -> dict[str, float]:
        """Median seconds of a step by kind; a first step also pays for what is set up once."""
        times: dict[str, list[float]] = {}
        for kind, took in self.steps:
            # where no pattern was found, every step ran dense, whatever was planned
            times.setdefault(kind.value if self.patterns else "dense", []).append(took)
        return {kind: median(took) for kind, took in times.items()}

    def summary(self) -> str:
        """One line for the node and the log."""
        return run_report.summary(self)

    def lines(self) -> list[str]:
        """The whole report, a line each."""
        return run_report.lines(self)

    def as_dict(self) -> dict:
        """Plain numbers for a file or another program."""
        mean, worst = self.recall() or (None, None)
        dense, sparse = self.timing.dense_call(), self.timing.sparse
        return {
            "model": self.model,
            "tokens": self.tokens,
            "steps": self.schedule.describe(),
            "steps_skipped": self.skipped(),
            "expected": self.expected,
            "density": self.density(),
            "recall": mean,
            "recall_worst_head": worst,
            "recall_exact": self.exact(),
            "recall_asked": self.asked_recall,
            "recall_sampled": self.samples_recall(),
            "attention_seconds": self.timing.spent(),
            "attention_seconds_saved": self.timing.saved(),
            "dense_call_seconds": dense,
            "sparse_call_seconds": median(sparse) if sparse else None,
            "step_seconds": self.step_seconds(),
            "held_bytes": self.held_bytes,
            "predicted_bytes": self.predicted_bytes,
            "context_windows": len(self.windows),
            "backend": self.backend,
            "dense_choice": self.dense_choice,
            "stopped_at": self.stopped_at,
            "tail": self.tail,
            "heads_by_similarity": self.similar(),
            "low_precision": self.low_precision,
            "low_precision_calls": self.low_precision_calls,
            "low_precision_searches": self.low_precision_searches,
            "not_low_precision": dict(self.not_low_precision),
            "carried": self.carried,
            "not_carried": dict(self.not_carried),
            "kept_dense": dict(self.kept_dense),
            "warnings": list(self.warnings),
        }
