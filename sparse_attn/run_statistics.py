"""What happened in a run, as plain numbers: the node's summary and the report read only this."""

from collections import Counter
from dataclasses import dataclass, field
from statistics import median

import torch

from .schedule import Schedule, StepKind

# a map of more blocks than this is averaged down for the report
MAP_SIZE = 96


@dataclass
class Pattern:
    """What one search found for one layer and conditioning; lists run over heads.

    Args:
        step: number of the step within the whole schedule.
        exact: whether the masses came with the step's own LSE; else recall is an estimate.
        density, recall: per head, mean over the batch.
        block_map: [H, n, n] uint8, kept share of each cell times 255, first of the batch.
        carried: found by another run; `recall` is what a sample of this run's rows has.
    """

    step: int
    exact: bool
    density: list[float]
    recall: list[float]
    block_map: torch.Tensor
    carried: bool = False


@dataclass
class Timing:
    """Seconds of attention calls, one entry per call and batch row.

    Args:
        search: first searches, dense output included; `search_dense` is their dense pass alone.
        search_again: later searches, without output.
        carry: measuring what carried masks hold.
    """

    dense: list[float] = field(default_factory=list)
    search: list[float] = field(default_factory=list)
    search_dense: list[float] = field(default_factory=list)
    search_again: list[float] = field(default_factory=list)
    sparse: list[float] = field(default_factory=list)
    carry: list[float] = field(default_factory=list)

    def searching(self) -> float:
        return sum(self.search) + sum(self.search_again) + sum(self.carry)

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
        model: name of the model family, or why there is none.
        part: which of several models, for people.
        expected: what was said before the run.
        result_sum: sum of the latent that the run returned, or None.
        carried_from: where a carried pattern comes from; `carried` counts the masks in use,
            `carried_recall` holds what they had when found, `not_carried` counts why others are not.
        kept_pattern: what outlives the run in memory and on disk.
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
    timing: Timing = field(default_factory=Timing)
    steps: list[tuple[StepKind, float]] = field(default_factory=list)
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

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def density(self) -> float | None:
        """Mean over layers and heads, or None before a search."""
        values = [d for p in self.patterns.values() for d in p.density]
        return sum(values) / len(values) if values else None

    def recall(self) -> tuple[float, float] | None:
        """(mean, worst head) at the last search of each layer, or None before a search."""
        values = [r for p in self.patterns.values() for r in p.recall]
        return (sum(values) / len(values), min(values)) if values else None

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
        if not self.patterns:
            why = ", ".join(f"{reason} ({n})" for reason, n in self.kept_dense.most_common(2))
            ran = self.schedule.describe() if self.tokens else "no sparse attention"
            return "AdaSpa: every call ran dense" + (f": {why}" if why else f" ({ran})")
        mean, worst = self.recall()
        label = self.recall_label()
        parts = [
            f"{self.tokens:,} tokens",
            self.schedule.describe(),
            f"density {self.density():.2f}",
            f"recall {mean:.2f}{f' ({label})' if label else ''}, worst head {worst:.2f}",
        ]
        saved = self.timing.saved()
        if saved is not None:
            verb = "saved" if saved >= 0 else "lost"
            parts.append(f"{verb} {seconds(abs(saved))} of attention")
        return ", ".join(parts)

    def lines(self) -> list[str]:
        """The whole report, a line each."""
        timing = self.timing
        part = f"{self.part.capitalize()}: " if self.part else ""
        text = [part + self.summary()]
        if self.model:
            text.append(f"Model: {self.model}" + (f", {self.layout}" if self.layout else ""))
        if self.backend:
            text.append(f"Sparse attention by: {self.backend}")
        text.append(f"Dense steps by: {self.dense_choice}")
        if timing.spent():
            text.append(
                f"Attention: {seconds(timing.spent())} spent ({seconds(sum(timing.dense))} dense, "
                f"{seconds(timing.searching())} search, {seconds(sum(timing.sparse))} sparse)"
            )
        dense = timing.dense_call()
        if dense and timing.sparse:
            source = "its own dense steps" if timing.dense else "the dense pass of its searches"
            text.append(
                f"One call: {milliseconds(dense)} dense, {milliseconds(median(timing.sparse))} "
                f"sparse ({dense / median(timing.sparse):.1f}x), measured against {source}"
            )
        if self.steps:
            steps = ", ".join(f"{seconds(s)} {kind}" for kind, s in self.step_seconds().items())
            text.append(f"One step of the whole model: {steps}")
        if self.predicted_bytes or self.held_bytes:
            text.append(
                f"Memory held: {gib(self.held_bytes)} on the {self.cache_place.upper()} for "
                f"{len(self.conditionings)} conditioning(s), predicted {gib(self.predicted_bytes)} each"
            )
        text += self.carried_lines()
        for reason, count in self.kept_dense.most_common():
            text.append(f"Kept dense: {count} calls, {reason}")
        return text + [f"Note: {warning}" for warning in self.warnings]

    def carried_lines(self) -> list[str]:
        if not self.carried_from:
            return list(self.kept_pattern)
        text = [f"Pattern of {self.carried_from}: {self.carried} masks used without a search"]
        if self.carried:
            now = [r for p in self.patterns.values() if p.carried for r in p.recall]
            found = sum(self.carried_recall) / len(self.carried_recall)
            if now:
                text[0] += (
                    f", recall {sum(now) / len(now):.2f} here (sampled), {found:.2f} when found"
                )
        for reason, count in self.not_carried.most_common():
            text.append(f"Searched after all: {count} masks, {reason}")
        return text + self.kept_pattern

    def as_dict(self) -> dict:
        """Plain numbers for a file or another program."""
        mean, worst = self.recall() or (None, None)
        dense, sparse = self.timing.dense_call(), self.timing.sparse
        return {
            "model": self.model,
            "tokens": self.tokens,
            "steps": self.schedule.describe(),
            "expected": self.expected,
            "density": self.density(),
            "recall": mean,
            "recall_worst_head": worst,
            "recall_exact": self.exact(),
            "attention_seconds": self.timing.spent(),
            "attention_seconds_saved": self.timing.saved(),
            "dense_call_seconds": dense,
            "sparse_call_seconds": median(sparse) if sparse else None,
            "step_seconds": self.step_seconds(),
            "held_bytes": self.held_bytes,
            "predicted_bytes": self.predicted_bytes,
            "backend": self.backend,
            "dense_choice": self.dense_choice,
            "carried": self.carried,
            "not_carried": dict(self.not_carried),
            "kept_dense": dict(self.kept_dense),
            "warnings": list(self.warnings),
        }


def seconds(value: float) -> str:
    return (
        f"{value:.0f} s" if value >= 100 else f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"
    )


def milliseconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value >= 0.1 else f"{value * 1e3:.2f} ms"


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def block_map(keep: torch.Tensor) -> torch.Tensor:
    """Average [H, N, N] bool down to at most MAP_SIZE cells a side; uint8, on the same device."""
    size = min(keep.shape[-1], MAP_SIZE)
    # head by head: a whole map in floating point would take four times the masses
    cells = [torch.nn.functional.adaptive_avg_pool2d(head[None].float(), size)[0] for head in keep]
    return (torch.stack(cells) * 255).round().to(torch.uint8)
