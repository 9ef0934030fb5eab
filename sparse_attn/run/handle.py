"""What outlives a sampler: the settings and, bounded and on the CPU, what recent runs found."""

from collections import deque

from ..config import AdaSpaConfig
from ..patterns.pattern import CarriedPattern
from .dense import DenseChoice
from .statistics import RunStatistics

RUNS_KEPT = 4


class RunHandle:
    """The ADASPA socket: one per node execution, shared by every clone of its model.

    Args:
        config: the node's settings.
        first: the handle of the expert that samples before this one. They share the report, and
            this one begins with the pattern that the first leaves.
        part: which of several models, for people.
    """

    def __init__(
        self, config: AdaSpaConfig, first: "RunHandle | None" = None, part: str = ""
    ):  # fmt: skip
        self.config = config
        self.part = part
        self.first = first
        self.dense_choice = first.dense_choice if first else DenseChoice(config.dense_attention)
        self.runs: deque[RunStatistics] = first.runs if first else deque(maxlen=RUNS_KEPT)
        # the pattern of the latest run, kept only while `keeps_pattern`
        self.keeps_pattern = False
        self.pattern: CarriedPattern | None = None
        if first is not None:
            first.keeps_pattern = True

    def latest(self) -> RunStatistics | None:
        return self.runs[-1] if self.runs else None

    def recent(self) -> list[RunStatistics]:
        """The latest run of each part, newest last."""
        parts: dict[str, RunStatistics] = {}
        for run in reversed(self.runs):
            parts.setdefault(run.part, run)
        return list(parts.values())[::-1]

    def carried(self) -> CarriedPattern | None:
        """The pattern that the next run begins with."""
        return self.first.pattern if self.first else None

    def serves(self, socket: "RunHandle") -> bool:
        """Whether the ADASPA socket `socket` reports the runs of this handle."""
        return self.runs is socket.runs
