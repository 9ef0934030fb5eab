"""Patterns on the MODEL wire: which one a run begins with, and where its own is written.

Requests travel as attachments of the ModelPatcher: they end with the wire, where a flag on the
shared handle would outlive the node that set it in ComfyUI's cache.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..patterns.pattern import CarriedPattern
from ..run.handle import RunHandle
from ..run.report import gib
from ..sentences import Sentence, UserError
from . import status

HANDLE, BEGIN, SAVE = "adaspa", "adaspa_begin", "adaspa_save"


@dataclass
class SaveRequest:
    """The request of one node to have a pattern written: once in a prompt, or after every run.

    Args:
        write: write(pattern) -> the path of the new file.
        node_id: the node that asks, and shows what is written, or None.
        every_run: also of those samplers that follow the first one in a prompt.
    """

    write: Callable[[CarriedPattern], Path]
    node_id: str | None = None
    every_run: bool = False
    _prompt: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, prompt: str | None) -> bool:
        """Whether a run of a prompt is the one to write; without a prompt every run is."""
        with self._lock:
            mine = self.every_run or prompt is None or prompt != self._prompt
            self._prompt = prompt
        return mine

    def failed(self) -> None:
        """Let the next run of the prompt write."""
        self._prompt = None


def begin_with(model, socket: RunHandle | None, pattern: CarriedPattern):
    """Return a clone of `model` whose runs begin with `pattern`."""
    return _with(model, socket, BEGIN, pattern)


def save_after_run(model, socket: RunHandle | None, request: SaveRequest):
    """Return a clone of `model` whose runs write their pattern."""
    return _with(model, socket, SAVE, request)


def _with(model, socket: RunHandle | None, key: str, request):
    handle = model.get_attachment(HANDLE)
    if socket is None or handle is None or not handle.serves(socket):
        raise UserError(
            "`model` does not come from the AdaSpa node that `adaspa` comes from; wire "
            "both from the same node."
        )
    patched = model.clone()
    patched.set_attachments(key, request)
    return patched


def end(run, patcher, handle: RunHandle) -> None:
    """End a run, and keep and save its pattern where that was asked for."""
    request = patcher.get_attachment(SAVE)
    saves = request is not None and request.begin(status.prompt_id())
    kept = run.end(keep_pattern=handle.keeps_pattern or saves)
    lines = run.statistics.reuse.kept
    if handle.keeps_pattern and kept is not None:
        handle.pattern = kept.named(f"the {handle.part or 'first'} expert")
        lines.append(
            f"Pattern kept for the next expert: {len(kept.layers)} masks, {gib(kept.nbytes())} "
            "on the CPU"
        )
    if request is not None and saves:
        _save(kept, request, run.statistics)
    elif request is not None:
        lines.append(
            "Pattern not saved: an earlier sampler of this prompt has saved one; `every_sampler` "
            "saves them all"
        )


def _save(kept: CarriedPattern | None, request: SaveRequest, statistics) -> None:
    if kept is None:
        request.failed()
        why = "the run ended dense" if statistics.patterns else "no layer ran sparse"
        statistics.warn(f"no pattern was saved, because {why}")
        return
    try:
        status.say(request.node_id, Sentence("writing", size=gib(kept.nbytes())))
        path = request.write(kept)
        size = gib(path.stat().st_size)
    except Exception as error:
        request.failed()
        # a full disk must not cost the user the finished video
        status.log.warning("AdaSpa: the pattern was not saved", exc_info=True)
        statistics.warn(f"the pattern was not saved ({error})")
    else:
        statistics.reuse.kept.append(f"Pattern saved: {path.name}, {size}")
        status.say(request.node_id, Sentence("saved", file=path.name, size=size))
