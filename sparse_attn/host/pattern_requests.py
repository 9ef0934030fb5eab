"""Patterns on the MODEL wire: which one a run begins with, and where its own is written.

Wishes travel as attachments of the ModelPatcher: they end with the wire, where a flag on the shared
handle would outlive the node that set it in ComfyUI's cache.
"""

from collections.abc import Callable
from pathlib import Path

from ..patterns import file as files
from ..patterns.pattern import CarriedPattern
from ..run.handle import RunHandle
from ..run.report import gib
from . import status as messages

HANDLE, BEGIN, SAVE = "adaspa", "adaspa_begin", "adaspa_save"


def begin_with(model, socket: RunHandle, pattern: CarriedPattern):
    """Return a clone of `model` whose runs begin with `pattern`."""
    return _with(model, socket, BEGIN, pattern)


def save_after_run(model, socket: RunHandle, free_path: Callable[[], Path]):
    """Return a clone of `model` whose runs write their pattern.

    Args:
        free_path: called after each run; returns the path of a file that does not exist yet.
    """
    return _with(model, socket, SAVE, free_path)


def _with(model, socket: RunHandle, key: str, wish):
    handle = model.get_attachment(HANDLE)
    if socket is None or handle is None or not handle.serves(socket):
        raise ValueError(
            "`model` does not come from the AdaSpa Attention node that `adaspa` comes from; wire "
            "both from the same node."
        )
    patched = model.clone()
    patched.set_attachments(key, wish)
    return patched


def pattern_to_begin(patcher, handle: RunHandle) -> CarriedPattern | None:
    """A loaded pattern, else the one of the expert that sampled before."""
    return patcher.get_attachment(BEGIN) or handle.carried()


def end(run, patcher, handle: RunHandle) -> None:
    """End a run, and keep and save its pattern where that was asked for. Raises nothing."""
    free_path = patcher.get_attachment(SAVE)
    kept = run.end(keep_pattern=handle.keeps_pattern or free_path is not None)
    lines = run.statistics.kept_pattern
    if handle.keeps_pattern and kept is not None:
        handle.pattern = kept.named(f"the {handle.part or 'first'} expert")
        lines.append(
            f"Pattern kept for the next expert: {len(kept.layers)} masks, {gib(kept.nbytes())} "
            "on the CPU"
        )
    if free_path is None:
        return
    if kept is None:
        run.statistics.warn("no pattern was saved, because no layer ran sparse")
        return
    try:
        path = free_path()
        files.save(kept, path)
    except Exception as error:
        # a full disk must not cost the user the finished video
        messages.log.warning("AdaSpa: the pattern was not saved", exc_info=True)
        run.statistics.warn(f"the pattern was not saved ({error})")
    else:
        lines.append(f"Pattern saved: {path.name}, {gib(path.stat().st_size)}")
