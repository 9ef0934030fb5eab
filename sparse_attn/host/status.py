"""What a run tells its node while it samples."""

import json
import logging
from collections.abc import Callable, Sequence

from ..run.statistics import RunStatistics
from ..sentences import Sentence, told

log = logging.getLogger("adaspa")
# what takes the messages of a node whose server is in another process, by node
_RELAYS: dict[str, Callable[[str], object]] = {}


def relay(node_id: str | None, take: Callable[[str], object] | None) -> None:
    """Give a node's messages to `take`, as JSON of what `deliver` takes; None ends it."""
    _RELAYS.pop(node_id or "", None)
    if node_id is not None and take is not None:
        _RELAYS[node_id] = take


def send(
    node_id: str | None, statistics: RunStatistics, said: Sequence[str], step: int, done: bool
) -> None:
    """Show lines on the node of a run. Raises nothing."""
    show_steps(node_id, said, statistics.step_kinds(), statistics.schedule.first_step, step, done)


def show_steps(
    node_id: str | None, said: Sequence[str], kinds: list[str], first: int, step: int, done: bool
) -> None:
    """Show lines and the strip of steps on a node. Raises nothing.

    Args:
        kinds: what each step does. first: number of the run's first step in the whole schedule,
            from 0.
    """
    text = "\n".join(said)
    steps = {"steps": kinds, "first": first, "step": step, "done": done}
    deliver(text, {"node": node_id, "text": text, "said": [told(line) for line in said], **steps})


def say(node_id: str | None, text: str) -> None:
    """Log a line, and show it on a node that has no steps. Raises nothing."""
    log.info("AdaSpa: %s", text)
    deliver(text, {"node": node_id, "text": text, "said": [told(text)]})


def deliver(text: str, data: dict) -> None:
    """Send a node's message to the interface. Raises nothing."""
    try:
        server, node_id = _server(), data["node"]
        if node_id in _RELAYS:
            _RELAYS[node_id](json.dumps([text, data]))
        # without a server (a script, a test) nothing happens
        elif server is not None and node_id is not None:
            server.send_sync("adaspa.status", data, server.client_id)
            server.send_progress_text(text, node_id, server.client_id)
    except Exception:
        # a message must not cost the user the video
        log.warning("AdaSpa: a message could not be sent", exc_info=True)


def prompt_id() -> str | None:
    """Which of the queued prompts runs, or None without a server."""
    return getattr(_server(), "last_prompt_id", None)


def progress(statistics: RunStatistics, step: int) -> list[Sentence]:
    """Such as "Step 6 of 20: sparse." and "Density 0.20, recall 0.97."."""
    schedule = statistics.schedule
    numbers = {"step": str(schedule.number(step)), "total": str(schedule.total_steps)}
    said = [Sentence(f"step_{schedule.kind(step).value}", **numbers)]
    if recall := statistics.patterns.recall():
        density = statistics.patterns.density()
        said.append(Sentence("kept", density=f"{density:.2f}", recall=f"{recall[0]:.2f}"))
    return said


def _server():
    try:
        # ComfyUI's own module; absent when only its library is imported
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)
