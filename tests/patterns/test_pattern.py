"""Whether a pattern has a mask for a layer, and why not."""

import pytest
import torch

from sparse_attn.call import Call
from sparse_attn.config import AdaSpaConfig
from sparse_attn.token_layout import TokenLayout
from tests.patterns.example_pattern import FAMILY, LAYOUT, NAME, a_pattern


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, ""),
        ({"family": "Mochi"}, "the pattern is of Wan, and this model is Mochi"),
        ({"layout": TokenLayout(20, 4, 5, 31)}, "and this run has 640 tokens (4x5x31 video"),
        ({"block_size": "128"}, "blocks of 64, and `block_size` is 128"),
        ({"block_size": "128x64"}, "blocks of 64, and `block_size` is 128x64"),
        ({"name": NAME._replace(role="negative")}, "does not know the layer or the prompt"),
        ({"name": None}, "do not share patterns"),
        ({"batch": 2}, "this run has 2 and 3"),
        ({"tail": "pooled"}, "found with `tail` none, and this run has pooled"),
        ({"heads": 4}, "this run has 1 and 4"),
    ],
)
def test_a_mask_is_found_where_everything_fits(change, words):
    fits = {
        "name": NAME, "family": FAMILY, "layout": LAYOUT, "block_size": "64", "batch": 1,
        "heads": 3, "tail": "none",
    }  # fmt: skip
    fits |= change
    q = torch.empty(fits["batch"], fits["heads"], 1, 1)
    call = Call(q, q, q, 1.0, fits["layout"], step=0, dense=lambda: q, name=fits["name"])
    config = AdaSpaConfig(block_size=fits["block_size"], tail=fits["tail"])
    layer, reason = a_pattern().find(call, fits["family"], config)
    assert (layer is None) == bool(words) and words in reason and (words or not reason)
