"""What a run holds is what was said before it, whatever its settings: drawn at random, to the byte."""

import random

import pytest
import torch

from sparse_attn import block_mask
from sparse_attn.config import BLOCK_SIZES, CHOICES
from sparse_attn.token_layout import TokenLayout
from tests.run.fakes import Backend, D, Run, call_of

KINDS = ["Ss", "DSs", "DSss", "SsSs", "DSsS", "DSSs", "DSsSs", "SDsSs", "DD"]
DRAWS = 40


def drawn(number):
    """Layout, kinds of steps, batch, layers, whether searches take one pass, most pairs, settings."""
    pick = random.Random(number)
    layout = TokenLayout(
        pick.choice([0, 0, 5, 70]), pick.randint(2, 5), pick.randint(2, 9), pick.randint(7, 23),
        pick.choice([0, 0, 33]),
    )  # fmt: skip
    settings = {
        "block_size": pick.choice(list(BLOCK_SIZES)),
        "tail": pick.choice(CHOICES["tail"]),
        "token_order": pick.choice(CHOICES["token_order"]),
        "recall": pick.choice([0.0, 0.0, 0.7]),
        "query_stride": pick.choice([1, 4]),
        "cache": pick.choice(CHOICES["cache"]),
    }
    settings["head_adaptive"] = not settings["recall"] and pick.random() < 0.3
    most_pairs = pick.choice([block_mask.MOST_PAIRS, 30, 9])
    return (
        layout, pick.choice(KINDS), pick.choice([1, 2]), pick.choice([1, 3]), pick.random() < 0.5,
        most_pairs, settings,
    )  # fmt: skip


@pytest.mark.parametrize("number", range(DRAWS))
def test_a_run_holds_what_was_said_before_it(monkeypatch, number):
    layout, kinds, batch, layers, one_pass, most_pairs, settings = drawn(number)
    monkeypatch.setattr(block_mask, "MOST_PAIRS", most_pairs)
    run = Run(kinds, Backend(one_pass), layout=layout, **settings)
    generator = torch.Generator().manual_seed(number)
    qkv = torch.randn(3, batch, 2, layout.tokens, D, generator=generator).unbind(0)
    run.estimate(qkv, layers=layers)
    for step in range(len(kinds)):
        for layer in range(layers):
            if not run.state.is_plainly_dense(call_of(qkv, step, layout=layout)):
                run.attend(step, qkv, key=layer, layer=layer)
    memory = run.statistics.memory
    assert memory.held_bytes == memory.predicted_bytes, (layout, kinds, settings)
    assert not run.statistics.warnings or settings["block_size"] == "128"
    assert (memory.held_bytes > 0) == ("S" in kinds)
    # and it is what lies there: the tensors of all layers, which are no views of larger ones
    held = [x for layer in run.state.layers.values() for x in tensors_of(layer)]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in held)


def tensors_of(layer):
    pattern = layer.pattern
    own = [] if pattern is None else [pattern.mask.bits, pattern.own_order]
    return [x for x in (layer.lse, *own) if x is not None]
