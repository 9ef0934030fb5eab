"""One sampling of a guider: its run, and which part of its latent a call of the model is about.

It travels in the guider's own options, so samplings in several threads do not meet, whatever they
share of a model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..run.state import RunState
from ..sentences import Sentence
from .calling_block import Callers
from .families.family import Family
from .guard import go_on_without_us
from .travelling import Uncopied, listener

# under these keys a sampling, and the input of another node's wrapper, travel through
# transformer_options
SAMPLING, WRAPPED = "adaspa_sampling", "adaspa_wrapped_input"
WRAPPER = "model_function_wrapper"
UNNAMED = Sentence("why_unnamed")
UNKNOWN_WINDOW = Sentence("why_window")


@dataclass(eq=False)
class Sampling(Uncopied):
    """One sampling.

    Args:
        shape: of the latent, [B, C, T, H, W], or of one flat pack of latents, [B, 1, N].
        guider: ComfyUI's, which knows the areas of its conditionings.
    """

    run: RunState
    shape: tuple[int, ...]
    guider: Any
    # whether the model has shown that it tells when it is entered
    tells_entry: bool = False
    # the sampler's latest, [B, C, T, H, W]
    denoised: Any = None
    # another node's, which is called through ours
    _wrapper: Any = None
    _callers: Callers = field(default_factory=Callers)

    def enter(self) -> None:
        """Put the sampling into the guider's options, which its model calls get."""
        options = self.guider.model_options
        options.setdefault("transformer_options", {})[SAMPLING] = self
        if WRAPPER in options:
            self._wrapper = options[WRAPPER]
            options[WRAPPER] = self._noting_the_input

    def listener(self, callback: Callable | None) -> Callable:
        """What a sampler tells of its steps, for us and for `callback`."""

        def note(*said):
            self.run.steps.spoken()
            self.denoised = said[1] if len(said) > 1 else None

        return listener(note, lambda error: go_on_without_us(error, self.run), callback)

    def leave(self) -> None:
        self.denoised = None
        options = self.guider.model_options
        options.get("transformer_options", {}).pop(SAMPLING, None)
        if options.get(WRAPPER) == self._noting_the_input:
            options[WRAPPER] = self._wrapper

    def _noting_the_input(self, apply_model, args):
        """Another node's wrapper may call the model on pieces of what it gets."""
        try:
            options = args["c"].get("transformer_options")
            if options is not None:
                options[WRAPPED] = args["input"]
        except Exception as error:
            go_on_without_us(error, self.run)
        return self._wrapper(apply_model, args)

    def callers_in(self, family: Family, model: torch.nn.Module) -> Callers:
        """The blocks of a model, and of those that the sampling has met before."""
        self._callers.add(model, family.listed(model))
        return self._callers

    def place_of(self, x: torch.Tensor, options: dict) -> tuple[tuple | None, str]:
        """Tell which part of the latent a call of the model is about.

        Args:
            x: the input of the call.

        Returns:
            The part, None for all of it; and a reason where it is not known.
        """
        uuids, window = options.get("uuids") or (), options.get("context_window")
        if not uuids or len(x) != len(uuids) * self.shape[0]:
            return None, UNNAMED
        whole, sizes = list(self.shape[2:]), list(x.shape[2:])
        place = None
        if window is not None:
            if not hasattr(window, "index_list") or not hasattr(window, "dim"):
                return None, UNKNOWN_WINDOW
            place = "window", window.dim, tuple(window.index_list)
            if len(sizes) == len(whole) and 2 <= window.dim < x.ndim:
                # some windows take a frame more along
                whole[window.dim - 2] = sizes[window.dim - 2]
        if sizes == whole:
            return place, ""
        if window is None and len(sizes) == len(whole):
            part = self._area_of(uuids, sizes) or _view_of(x, options.get(WRAPPED))
            if part is not None:
                return part, ""
        here, all_of_it = ("x".join(map(str, shape)) for shape in (sizes, whole))
        return None, Sentence("why_place", here=here, whole=all_of_it)

    def _area_of(self, uuids, sizes: list[int]) -> tuple | None:
        """An area of this size, if all of some conditionings have one; each tells its place."""
        dims = len(sizes)
        areas = {
            cond.get("uuid"): cond.get("area")
            for conds in getattr(self.guider, "conds", {}).values()
            for cond in conds or ()
        }
        for uuid in uuids:
            area = areas.get(uuid)
            if not isinstance(area, tuple | list) or not 2 <= len(area) <= 2 * dims:
                return None
            # sizes, then starts; of fewer axes than the latent has, it is about the last ones
            missing = dims - len(area) // 2
            starts = [0] * missing + list(area[len(area) // 2 :])
            wanted = self.shape[2 : 2 + missing] + tuple(area[: len(area) // 2])
            limits = [whole - start for whole, start in zip(self.shape[2:], starts, strict=True)]
            if [min(a, b) for a, b in zip(wanted, limits, strict=True)] != sizes:
                return None
        return "area", *sizes


def _view_of(x: torch.Tensor, whole: torch.Tensor | None) -> tuple | None:
    """Where a view of another tensor begins and how large it is, or None for any other tensor."""
    if whole is None or x.device != whole.device or x.dtype != whole.dtype or not len(x):
        return None
    same = x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    if not same or not whole.is_contiguous() or x.stride() != whole.stride():
        return None
    offset, starts = x.storage_offset() - whole.storage_offset(), []
    for stride in whole.stride():
        starts.append(offset // stride)
        offset %= stride
    inside = all(
        start + size <= limit
        for start, size, limit in zip(starts, x.shape, whole.shape, strict=True)
    )
    # all videos and channels
    if not inside or starts[:2] != [0, 0] or x.shape[:2] != whole.shape[:2]:
        return None
    return ("tile", *starts[2:], *x.shape[2:])
