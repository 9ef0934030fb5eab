"""Who answered a block's self-attention in our place, as far as that can be seen."""

import re
import sys
from functools import partial

import torch

from ..sentences import Sentence
from .calling_block import inner_of
from .families.family import Block

UNKNOWN = Sentence("why_unknown")
_HOSTS_OWN = "comfy.ldm.modules.attention"


def replaced_by(module: torch.nn.Module, block: Block, options: dict, override) -> str:
    """Say what stands in the place of a block's self-attention, or `UNKNOWN`.

    Args:
        module: the block.
        options: `transformer_options` as they are once the model has been entered.
        override: ours.
    """
    top = options.get("optimized_attention_override", override)
    if top is not override:
        return Sentence("why_override", name=_origin(top))
    for key, patch in (options.get("patches_replace") or {}).get("dit", {}).items():
        if key in ((f"{block.kind}_block", block.index), ("block", block.index)):
            return Sentence("why_patch", name=_origin(patch))
    inner = inner_of(module)
    for part in inner.modules():
        forward = vars(part).get("forward")
        # the host leaves the class's own behind when it takes a patch back; a compiled module has one
        # of its own too, and so has a layer with an adapter on it
        if forward is None or getattr(forward, "__func__", None) is type(part).forward:
            continue
        if not hasattr(part, "_orig_mod") and any(part.children()):
            return Sentence("why_forward", name=_origin(forward))
    for name in dict.fromkeys(type(part).__module__ for part in inner.modules()):
        function = getattr(sys.modules.get(name), "optimized_attention", None)
        # the host's are wrapped in what offers their calls to overrides
        hosts = _module(function) == _HOSTS_OWN and hasattr(function, "__wrapped__")
        if function is not None and not hosts:
            return Sentence("why_function", where=name, name=_origin(function))
    return UNKNOWN


def _module(made) -> str:
    while isinstance(made, partial):
        made = made.func
    return str(getattr(made, "__module__", None) or type(made).__module__)


def _origin(made) -> str:
    """Where a function is from, without the folders above: those of custom nodes are whole paths."""
    return re.split(r"[/\\]", _module(made))[-1]
