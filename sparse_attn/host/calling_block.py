"""Which block of a model an attention call comes from, read from the stack of the calling thread.

The order in which calls come does not tell it: blocks are skipped, cached, answered elsewhere and
repeated. Nothing is written on the model, threads have stacks of their own, and a compiled module
still calls attention from its own frame. Where no block is found, nobody knows, and the call is not
ours.
"""

import sys
from collections.abc import Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name")
# every call of a module, compiled or not, goes through one of these
_CALLS = ("_call_impl", "_wrapped_call_impl")
_MODULES = torch.nn.modules.module.__file__


def calling_block(blocks: Mapping[int, Name]) -> Name | None:
    """Return the innermost of some modules that this thread is inside of.

    Args:
        blocks: names by `id` of the module; the caller keeps the modules alive.

    Returns:
        The name, or None outside all of them.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in _CALLS and code.co_filename == _MODULES:
            name = blocks.get(id(frame.f_locals.get("self")))
            if name is not None:
                return name
        frame = frame.f_back
    return None
