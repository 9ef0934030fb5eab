"""Selection with plain torch, as a map of bools."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from sparse_attn.backends.choice import plain_torch
from sparse_attn.method.selection import select

TORCH = plain_torch()


def chosen(masses, layout, config, scores=None):
    """(keep [B, H, Nq, Nk] bool, recall [B, H]) of `select`."""
    mask, held = select(TORCH, masses, layout, config, scores)
    return mask.to_dense(), held


@contextmanager
def measured(search):
    """Yield what the search of a module chooses by: `masses`, and `scores` or None."""
    seen = SimpleNamespace()

    def noted(backend, masses, layout, config, scores=None):
        seen.masses, seen.scores = masses, scores
        return select(backend, masses, layout, config, scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "select", noted)
        yield seen
