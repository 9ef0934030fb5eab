"""Tells a node that forecasts inside the model which attention comes next, and which has run.

Spectrum for MiniMax-H3 forecasts only where it knows that the attention stays the same. What it reads
is described in docs/BACKEND_HISTORY.md of xmarre/ComfyUI-Spectrum-MiniMax-H3.
"""

from collections.abc import Hashable, Iterable

from ..run.state import RunState
from ..schedule import StepKind
from .travelling import Uncopied

# keys of transformer_options, and ours under the first
HISTORY, RECEIPTS = "attention_backend_history_v1", "attention_backend_receipts_v1"
PROVIDER = "adaspa"


class History(Uncopied):
    """What AdaSpa's attention does in one step of a run."""

    def __init__(self, run: RunState, step: int):
        self.run, self.step = run, step

    @property
    def route(self) -> tuple[str, int]:
        """The kind of the step, and the step of the latest search."""
        schedule = self.run.schedule
        return schedule.kind(self.step).value, schedule.search_due(self.step)

    def __call__(self, **asked) -> Hashable | None:
        """An identity that stays while the attention does; None for a step that must be computed."""
        schedule = self.run.schedule
        needed = schedule.kind(self.step) is StepKind.SEARCH or schedule.wants_lse(self.step)
        if needed or self.run.statistics.owes_search(self.step):
            return None
        return PROVIDER, *self.route

    def accept_receipts(self, receipts: Iterable[Hashable]) -> bool:
        """Whether what has run is what later steps do: no call of ours searched."""
        searched = (PROVIDER, StepKind.SEARCH.value)
        return not any(isinstance(x, tuple) and x[:2] == searched for x in receipts)


def publish(options: dict, run: RunState, step: int) -> None:
    """Put the history of a step into the options of a model call, beside those of others."""
    others = options.get(HISTORY) or {}
    # a newer contract is left alone
    if isinstance(others, dict):
        options[HISTORY] = {**others, PROVIDER: History(run, step)}


def leave_receipt(options: dict) -> None:
    """Note for who asked that an attention call of ours has run."""
    receipts, histories = options.get(RECEIPTS), options.get(HISTORY)
    if receipts is not None and isinstance(histories, dict) and PROVIDER in histories:
        receipts.append((PROVIDER, *histories[PROVIDER].route))
