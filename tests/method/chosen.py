"""Selection with plain torch, as a map of bools."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from sparse_attn.backends.choice import plain_torch
from sparse_attn.method.selection import Selection

TORCH = plain_torch()


def select(masses, layout, config, scores=None):
    """Mask and recall of all heads at once."""
    selection = Selection(TORCH, layout, config, masses)
    selection.add(masses, scores)
    return selection.settle()


def chosen(masses, layout, config, scores=None):
    """(keep [B, H, Nq, Nk] bool, recall [B, H]) of `select`."""
    mask, held = select(masses, layout, config, scores)
    return mask.to_dense(), held


@contextmanager
def measured():
    """Yield what a search of one group of heads chooses by: `masses`, and `scores` or None."""
    seen, add = SimpleNamespace(), Selection.add

    def noted(self, masses, scores=None):
        seen.masses, seen.scores = masses, scores
        return add(self, masses, scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selection, "add", noted)
        yield seen
