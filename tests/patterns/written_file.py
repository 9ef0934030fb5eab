"""Pattern files of the tests: written, damaged, refused."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_attn.patterns.file import checksum, load
from tests.patterns.example_pattern import LAYOUT, a_pattern

TEXT_BEHIND = torch.arange(LAYOUT.before, dtype=torch.int32).expand(1, 3, -1)


def ordered_pattern():
    """Every head has an order of its own, the text of 20 tokens behind the video."""
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name, layer in a_pattern().layers.items():
        order = torch.rand(1, 3, LAYOUT.video, generator=generator).argsort(-1) + LAYOUT.before
        order = torch.cat([order, TEXT_BEHIND], -1).int()
        layers[name] = replace(layer, order=order)
    return replace(a_pattern(), layers=layers, pooled=True)


def contents(file):
    with safe_open(file, framework="pt") as opened:
        return load_file(file), opened.metadata()


def change(file, damage=None, **metadata):
    """Rewrite a file with other tensors or metadata under its old checksum."""
    tensors, found = contents(file)
    tensors = damage(tensors) if damage else tensors
    found = {key: value for key, value in {**found, **metadata}.items() if value is not None}
    save_file({name: x.contiguous() for name, x in tensors.items()}, file, metadata=found)


def forge(file, damage=None, **metadata):
    """Rewrite a file with other tensors or metadata, as if they had been written so."""
    change(file, damage, **metadata)
    tensors, found = contents(file)
    change(file, crc32=checksum(found, tensors))


def assert_refused(file, words):
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        load(file)
    said = str(refused.value)
    assert len(said.splitlines()) == 1 and len(said) < 400 and repr(file.name) in said
    assert refused.value.__cause__ is None and refused.value.__context__ is None
    said.encode()


def flip(tensors):
    tensors["mask.00001"][0, 0, 5, 0] ^= 2
    return tensors
