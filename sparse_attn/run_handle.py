"""What outlives a sampler: the settings and, bounded and on the CPU, what recent runs found."""

from collections import deque

from .config import AdaSpaConfig
from .dense_choice import DenseChoice
from .run_state import RunState
from .run_statistics import RunStatistics

RUNS_KEPT = 4


class RunHandle:
    """The ADASPA socket: one per node execution, shared by every clone of its model.

    Args:
        config: the node's settings.
    """

    def __init__(self, config: AdaSpaConfig):
        self.config = config
        self.dense_choice = DenseChoice(config.dense_attention)
        self.current: RunState | None = None
        self.runs: deque[RunStatistics] = deque(maxlen=RUNS_KEPT)

    def latest(self) -> RunStatistics | None:
        return self.runs[-1] if self.runs else None
