"""A lock between processes that the operating system releases when its holder dies."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .console import say, seconds


def _try_lock(file) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class Held:
    """A lock for as long as this process wants it, without waiting for it."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115  open for as long as it is held

    def acquire(self) -> bool:
        """Take the lock, or return False if another process holds it."""
        return _try_lock(self._file)

    def release(self) -> None:
        # closing releases it
        self._file.close()


@contextmanager
def exclusive(path: Path, poll: float = 0.5, report_every: float = 15) -> Iterator[None]:
    """Hold `path` as a lock; wait for another holder, saying so."""
    held = Held(path)
    started = time.monotonic()
    next_report = 0.0
    try:
        while not held.acquire():
            waited = time.monotonic() - started
            if waited >= next_report:
                say(f"  another start is setting up; waiting for it ({seconds(waited)})")
                next_report = waited + report_every
            time.sleep(poll)
        yield
    finally:
        held.release()
