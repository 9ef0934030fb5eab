"""Raises an error at one call that our code makes, whichever it is; how to find them all.

Python tells a profiler of every call before it happens, and an error that the profiler raises comes
out of the call. So nothing has to be listed: what our code calls in a run is counted once, and each
of those calls can fail in a run of its own. Left out are the calls by which we hand on to ComfyUI:
an error there is ComfyUI's.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OURS = str(ROOT / "sparse_attn"), str(ROOT / "nodes")
# what torch.compile reads, where no `try` may stand: they ask whether it does, and call the next
TRACED = ("attention_override", "_note_entry")


class Place(NamedTuple):
    """A call in our code: in which function of which file and line, and what is called."""

    file: str
    function: str
    line: int
    called: str

    def __str__(self) -> str:
        return f"{self.file}:{self.function} calls {self.called}"


class Profiler:
    """Counts the calls of our code in this thread while it is entered, or raises at one of them.

    Args:
        host: folder of ComfyUI.
        at: number of the call that fails, or None.
        error: what it raises.
    """

    def __init__(self, host: Path, at: int | None = None, error: BaseException | None = None):
        self.host, self.at, self.error = str(host), at, error
        self.places: list[Place] = []
        self.made = 0

    def __enter__(self):
        sys.setprofile(self._event)
        return self

    def __exit__(self, *exc):
        sys.setprofile(None)

    def _event(self, frame, event: str, called) -> None:
        if event == "call":
            caller, code = frame.f_back, frame.f_code
            if caller is None or code.co_filename.startswith(self.host):
                return
            name = code.co_name
        # what lets go of a lock cannot fail
        elif event == "c_call" and called.__name__ != "__exit__":
            caller, name = frame, called.__name__
        else:
            return
        code = caller.f_code
        if not code.co_filename.startswith(OURS) or code.co_name in TRACED:
            return
        if self.at is None:
            file = Path(caller.f_code.co_filename).relative_to(ROOT).as_posix()
            self.places.append(Place(file, caller.f_code.co_name, caller.f_lineno, name))
        elif self.made == self.at and self.error is not None:
            sys.setprofile(None)
            error, self.error = self.error, None
            raise error
        self.made += 1


def places_of(run: Callable, host: Path) -> list[Place]:
    """Every call that our code makes in `run`, in order."""
    with Profiler(host) as profiler:
        run()
    return profiler.places
