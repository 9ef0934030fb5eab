"""Pattern files: what they hold, and that a damaged one is refused in one sentence."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_attn.patterns.file import load, save
from sparse_attn.patterns.pattern import CarriedPattern
from tests.patterns.example_pattern import FAMILY, LAYOUT, NAME, a_pattern


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "city.safetensors"
    save(a_pattern(), path)
    return path


def test_a_file_gives_back_what_was_saved(file):
    saved, loaded = a_pattern(), load(file)
    assert replace(loaded, layers={}, source="") == replace(saved, layers={})
    assert loaded.source == "city.safetensors"
    assert list(loaded.layers) == list(saved.layers)
    for name, layer in saved.layers.items():
        assert torch.equal(loaded.layers[name].bits, layer.bits)
        assert loaded.layers[name].recall == layer.recall
        assert loaded.layers[name].density == layer.density


def test_a_file_names_what_it_is_for_and_is_compact(file):
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    expected = {
        "format": "adaspa pattern", "version": "2", "family": FAMILY, "grid": "[5, 4, 31]",
        "before": "20", "after": "0", "block_size": "64", "order": "raster", "density": "0.4000",
        "recall": "0.8000",
    }  # fmt: skip
    assert expected.items() <= metadata.items()
    masks = a_pattern().nbytes()
    assert masks == 2 * 3 * 10 * 2
    assert masks < file.stat().st_size < masks + 1500


@pytest.mark.parametrize("pooled, order", [(True, "rods"), (False, "raster")])
def test_a_file_tells_the_order_and_the_tail_of_its_masks(tmp_path, pooled, order):
    path = tmp_path / "city.safetensors"
    save(replace(a_pattern(), pooled=pooled), path)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    assert (metadata["order"], metadata["tail"]) == (order, "pooled" if pooled else "none")
    assert load(path).pooled == pooled


def test_a_file_of_an_earlier_version_has_no_tail(file):
    rewritten(file, tail=None, version="1")
    assert not load(file).pooled


def test_a_file_of_the_first_version_is_in_rods(tmp_path):
    path = tmp_path / "city.safetensors"
    save(replace(a_pattern(), pooled=True), path)
    rewritten(path, version="1")
    loaded = load(path)
    assert loaded.pooled and loaded.order == "rods"
    assert all(layer.order is None for layer in loaded.layers.values())


def ordered_pattern():
    """Every head has an order of its own, the text of 20 tokens behind the video."""
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name, layer in a_pattern().layers.items():
        order = torch.rand(1, 3, LAYOUT.video, generator=generator).argsort(-1) + LAYOUT.before
        order = torch.cat([order, torch.arange(LAYOUT.before).expand(1, 3, -1)], -1).int()
        layers[name] = replace(layer, order=order)
    return replace(a_pattern(), layers=layers, pooled=True)


def test_a_file_holds_the_order_of_every_head(tmp_path):
    path, saved = tmp_path / "city.safetensors", ordered_pattern()
    save(saved, path)
    loaded = load(path)
    assert loaded.order == "similarity" and loaded.nbytes() == saved.nbytes()
    assert saved.nbytes() == a_pattern().nbytes() + 2 * 3 * LAYOUT.tokens * 4
    for name, layer in saved.layers.items():
        assert torch.equal(loaded.layers[name].order, layer.order)


def swapped(order):
    order[0, 1, 5], order[0, 1, 6] = order[0, 1, 6].clone(), order[0, 1, 5].clone()
    return order


def doubled(order):
    order[0, 1, 5] = order[0, 1, 6]
    return order


def beyond_the_last(order):
    order[0, 1, 5] = LAYOUT.tokens
    return order


ORDER_DAMAGE = {
    "swapped": (swapped, "not those that were written"),
    "doubled": (doubled, "is not one of all tokens"),
    "beyond": (beyond_the_last, "tokens that there are not"),
    "text elsewhere": (lambda x: x.flip(-1).contiguous(), "is not one of all tokens"),
    "dtype": (lambda x: x.long(), "torch.int64"),
    "shape": (lambda x: x[..., 1:].contiguous(), "a token order of shape [1, 3, 639]"),
}


@pytest.mark.parametrize("name", ORDER_DAMAGE)
def test_a_damaged_order_is_refused(tmp_path, name):
    change, words = ORDER_DAMAGE[name]
    path = tmp_path / "city.safetensors"
    save(ordered_pattern(), path)
    rewritten(path, lambda x: {**x, "order.00001": change(x["order.00001"])})
    with pytest.raises(ValueError, match=re.escape(words)):
        load(path)


def test_a_lost_order_is_refused(tmp_path):
    path = tmp_path / "city.safetensors"
    save(ordered_pattern(), path)
    rewritten(path, lambda x: {k: v for k, v in x.items() if k != "order.00001"})
    with pytest.raises(ValueError, match="not those that were written"):
        load(path)


def test_saving_leaves_the_old_file_and_no_part_when_it_fails(file, monkeypatch):
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save(a_pattern(), file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def rewritten(file, change_tensors=None, **metadata):
    with safe_open(file, framework="pt") as opened:
        found = {**opened.metadata(), **metadata}
    tensors = load_file(file)
    if change_tensors:
        tensors = change_tensors(tensors)
    save_file(tensors, file, metadata={k: v for k, v in found.items() if v is not None})


def flip(tensors):
    tensors["mask.00001"][0, 0, 5, 0] ^= 2
    return tensors


def rows_of_nothing(tensors):
    tensors["mask.00000"][0, 1, 3] = 0
    return tensors


def beyond(tensors):
    tensors["mask.00000"][0, 1, 3, 1] |= 128
    return tensors


DAMAGE = {
    "newer": (None, {"version": "3"}, "written by a newer AdaSpa (format 3"),
    "not ours": (None, {"format": None}, "is not an AdaSpa pattern file"),
    "a flipped bit": (flip, {}, "not those that were written"),
    "an empty row": (rows_of_nothing, {}, "leaves a part of the video without attention"),
    "blocks behind the last": (beyond, {}, "lists blocks behind the last"),
    "dtype": (lambda x: {k: v.int() for k, v in x.items()}, {}, "torch.int32 instead of uint8"),
    "shape": (lambda x: {k: v[:, :, :9] for k, v in x.items()}, {}, "of shape [1, 3, 9, 2]"),
    "heads": (lambda x: {k: v[:, :2] for k, v in x.items()}, {}, "numbers per head"),
    "a mask lost": (lambda x: {"mask.00000": x["mask.00000"]}, {}, "1 masks for 2 layers"),
    "order": (None, {"order": "hilbert"}, "token order 'hilbert'"),
    "order of another tail": (
        None,
        {"tail": "pooled"},
        "token order 'raster' is not rods or similarity",
    ),
    "no orders": (None, {"tail": "pooled", "order": "similarity"}, "0 token orders of 2 masks"),
    "tail": (None, {"tail": "weighted"}, "tail 'weighted' is not one of none, pooled"),
    "grid": (None, {"grid": "[5, 4]"}, "damaged"),
    "negative grid": (None, {"grid": "[-5, -4, 31]"}, "is not positive"),
    "block size": (None, {"block_size": "96"}, "blocks of 96 instead of 64, 128, 128x64"),
    "other blocks": (None, {"block_size": "128x64"}, "of shape [1, 3, 10, 2] for 5 x 10 blocks"),
    "no family": (None, {"family": None}, "family is missing"),
    "no JSON": (None, {"layers": "[["}, "damaged"),
    "recall": (None, {"layers": json.dumps(2 * [[*NAME, [2.0] * 3, [0.5] * 3]])}, "outside 0 to 1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_with_one_sentence(file, name):
    change, metadata, words = DAMAGE[name]
    rewritten(file, change and (lambda x: {k: v.contiguous() for k, v in change(x).items()}),
              **metadata)  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        load(file)
    assert "\n" not in str(refused.value) and "city.safetensors" in str(refused.value)


@pytest.mark.parametrize("size", [0, 5, 200, -3])
def test_a_truncated_file_is_refused(file, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"city\.safetensors cannot be read"):
        load(file)


def test_a_file_of_something_else_or_none_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not an AdaSpa pattern file"):
        load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "absent.safetensors")


def test_nothing_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no pattern to save"):
        save(CarriedPattern(FAMILY, LAYOUT, "64"), tmp_path / "none.safetensors")
    assert not list(tmp_path.iterdir())
