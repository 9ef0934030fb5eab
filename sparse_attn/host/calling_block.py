"""Which block of a model an attention call comes from, read from the stack of the calling thread.

The order in which calls come does not tell it: blocks are skipped, cached, answered elsewhere and
repeated. Nothing is written on the model, threads have stacks of their own, and a compiled module
still calls attention from its own frame. Where no block is found, nobody knows, and the call is not
ours.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from .families.family import Block

# every call of a module, compiled or not, goes through one of these
_CALLS = ("_call_impl", "_wrapped_call_impl")
_MODULES = torch.nn.modules.module.__file__


@dataclass(eq=False)
class Caller:
    """A module of a model's blocks.

    Args:
        block: what it was called when it was first met.
        first: `id` of those of its parts that are the first of their class in it.
        shared: whether it stands for several blocks.
        others: ways through its parts that saved patterns have no name for.
    """

    block: Block
    first: frozenset[int]
    shared: bool = False
    others: list[tuple[int, ...]] = field(default_factory=list)


class Callers:
    """The modules of a model's blocks, and what is inside them, as one sampling meets them."""

    def __init__(self):
        self._blocks: dict[int, Caller] = {}
        # whose part a module is; None where it is of several blocks
        self._owners: dict[int, Caller | None] = {}
        # keeps every `id` in here taken
        self._modules: list[torch.nn.Module] = []
        self._orders: dict[int, list[int]] = {}
        # keys of calls that one call of the model has made twice
        self.repeated: set = set()

    def add(self, model: torch.nn.Module, listed: Iterable[tuple[torch.nn.Module, Block]]) -> None:
        """Note the blocks of a model: passes may leave some out of its list, or move them."""
        found = [(module, inner_of(module), block) for module, block in listed]
        order = [id(inner) for _, inner, _ in found]
        if id(model) not in self._orders:
            self._modules.append(model)
            self._orders[id(model)] = order
        times = Counter(order)
        for module, inner, block in found:
            if id(inner) not in self._blocks:
                self._blocks[id(inner)] = self._met(inner, block)
            if id(module) not in self._blocks:
                self._modules.append(module)
                self._blocks[id(module)] = self._blocks[id(inner)]
            self._blocks[id(inner)].shared |= times[id(inner)] > 1

    def _met(self, inner: torch.nn.Module, block: Block) -> Caller:
        modules = list(inner.modules())
        self._modules += modules
        first = {type(part): id(part) for part in reversed(modules[1:])}
        caller = Caller(block, frozenset(first.values()))
        for part in modules[1:]:
            # a second owner makes it nobody's
            self._owners[id(part)] = None if id(part) in self._owners else caller
        return caller

    def of(self, module: torch.nn.Module) -> Block:
        return self._blocks[id(module)].block

    def in_order(self, model: torch.nn.Module, listed) -> bool:
        """Whether a model lists the blocks that it has listed first, so that their numbers hold."""
        return self._orders.get(id(model)) == [id(inner_of(module)) for module, _ in listed]

    def calling(self) -> tuple[Caller | None, tuple[int, ...]]:
        """Tell the block that this thread is inside of, and the way to the call through its parts.

        Returns:
            The block of the innermost module that is one or belongs to one, or None; and the `id` of
            its parts that the call comes through.
        """
        frame, owner, way = sys._getframe(1), None, []
        while frame is not None:
            code = frame.f_code
            if code.co_name in _CALLS and code.co_filename == _MODULES:
                module = id(frame.f_locals.get("self"))
                if module in self._blocks:
                    return owner or self._blocks[module], tuple(way)
                if module in self._owners and way[-1:] != [module]:
                    owner = owner or self._owners[module]
                    way.append(module)
            frame = frame.f_back
        return owner, tuple(way)


def inner_of(module: torch.nn.Module) -> torch.nn.Module:
    """A module itself, or the one that a compiled module wraps."""
    return getattr(module, "_orig_mod", module)
