"""What the commands print: plain lines with elapsed time, and failures that say what to do next."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

HEARTBEAT_SECONDS = 15


class ExpectedFailure(Exception):
    """A failure we can explain. Its text is one sentence that ends in what to do next."""


def say(text: str = "") -> None:
    """Print a line at once, also when the output is a pipe."""
    try:
        sys.stdout.write(text + "\n")
    except UnicodeEncodeError:
        sys.stdout.write(text.encode("ascii", "replace").decode() + "\n")
    sys.stdout.flush()


def seconds(value: float) -> str:
    """Format a duration: 4.2 s, 1 min 05 s."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"


def size(num_bytes: float) -> str:
    """Format a download size in the units a browser uses: 197 MB, 2.6 GB."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.1f} GB"
    if num_bytes >= 1e6:
        return f"{num_bytes / 1e6:.0f} MB"
    return f"{max(num_bytes, 0) / 1e3:.0f} kB"


class Step:
    """Announces long work, keeps saying that it goes on, and ends with the elapsed time."""

    def __init__(self, title: str):
        self.title = title
        self.doing = ""
        self.started = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def note(self, text: str) -> None:
        """Print a detail and remember it for the heartbeat."""
        self.doing = text
        say(f"    {text}")

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            doing = f", {self.doing}" if self.doing else ""
            say(f"    ... {seconds(self.elapsed())}{doing}")

    def start(self) -> None:
        say(f"  {self.title}")
        self._thread.start()

    def finish(self, ok: bool) -> None:
        self._done.set()
        self._thread.join()
        say(f"    {'done' if ok else 'stopped'} after {seconds(self.elapsed())}")


@contextmanager
def step(title: str) -> Iterator[Step]:
    """Run a block as one announced step."""
    current = Step(title)
    current.start()
    ok = False
    try:
        yield current
        ok = True
    finally:
        current.finish(ok)
