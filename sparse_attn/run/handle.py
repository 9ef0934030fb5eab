"""What outlives a sampler: the settings and, bounded and on the CPU, what recent runs found."""

from collections import deque

from ..config import AdaSpaConfig
from ..patterns.pattern import CarriedPattern
from ..sentences import Sentence
from .dense import DenseChoice
from .statistics import Fingerprint, RunStatistics

RUNS_KEPT = 4
METADATA = "adaspa"


class RunHandle:
    """The ADASPA socket: one per node execution, shared by every clone of its model.

    Args:
        config: the node's settings.
        first: the handle of the expert that samples before this one. They share the report, and
            this one begins with the pattern that the first leaves.
        part: which of several models, for people.
    """

    def __init__(self, config: AdaSpaConfig, first: "RunHandle | None" = None, part: str = ""):
        self.config = config
        self.part = part
        self.first = first
        self.dense_choice = first.dense_choice if first else DenseChoice(config.dense_attention)
        self.runs: deque[RunStatistics] = first.runs if first else deque(maxlen=RUNS_KEPT)
        # its node, what the user chose there, and what a saved video's metadata are written from
        self.node, self.preset = "", ""
        self.metadata: dict | None = None
        # the pattern of the latest run, kept only while `keeps_pattern`
        self.keeps_pattern = False
        # why its node has installed nothing, or None
        self.failed: Sentence | None = None
        self.pattern: CarriedPattern | None = None
        if first is not None:
            first.keeps_pattern = True

    def latest(self) -> RunStatistics | None:
        return self.runs[-1] if self.runs else None

    def runs_behind(self, latent: Fingerprint) -> tuple[list[RunStatistics], bool]:
        """The run that made a latent, and of every other part the latest before it.

        Returns:
            One run of each part, newest last, and False where none of the runs kept has made the
            latent; then they are the latest.
        """
        runs = list(self.runs)
        made = [(i, found) for i, run in enumerate(runs) for found in run.results]
        made = [(i, found) for i, found in made if found.is_of(latent)]
        if made:
            # of runs that made the same the latest
            newest, _ = min(reversed(made), key=lambda one: one[1].distance(latent))
            runs = runs[: newest + 1]
        told = bool(made) or any(run.finished and not run.results for run in runs)
        return _latest_of_parts(runs), told

    def recent(self) -> list[RunStatistics]:
        """The latest run of each part, newest last."""
        return _latest_of_parts(list(self.runs))

    def note(self, metadata: dict | None) -> None:
        """Write the settings and the verdicts of the recent runs into a saved video's metadata."""
        if metadata is not None and self.runs:
            others = [run for run in metadata.get(METADATA, []) if run["node"] != self.node]
            mine = [{**run.record(self.preset), "node": self.node} for run in self.recent()]
            metadata[METADATA] = others + mine

    def carried(self) -> CarriedPattern | None:
        """The pattern that the next run begins with."""
        return self.first.pattern if self.first else None

    def serves(self, socket: "RunHandle") -> bool:
        """Whether the ADASPA socket `socket` reports the runs of this handle."""
        return self.runs is socket.runs


def _latest_of_parts(runs: list[RunStatistics]) -> list[RunStatistics]:
    parts: dict[str, RunStatistics] = {}
    for run in reversed(runs):
        parts.setdefault(run.part, run)
    return list(parts.values())[::-1]
