"""What a pattern file holds, and that it is read as it was written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sparse_attn.patterns.file import load, save
from tests.patterns.example_pattern import FAMILY, LAYOUT, a_pattern
from tests.patterns.written_file import TEXT_BEHIND, change, flip, ordered_pattern


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
        "format": "adaspa pattern", "version": "3", "family": FAMILY, "grid": "[5, 4, 31]",
        "before": "20", "after": "0", "block_size": "64", "order": "raster", "density": "0.4000",
        "recall": "0.8000",
    }  # fmt: skip
    assert expected.items() <= metadata.items()
    masks = a_pattern().nbytes()
    assert masks == 2 * 3 * 10 * 2
    assert masks < file.stat().st_size < masks + 1500


@pytest.mark.parametrize("pooled, order", [(True, "rods"), (False, "raster")])
def test_a_file_tells_the_order_and_the_tail_of_its_masks(tmp_path, pooled, order):
    path = save(replace(a_pattern(), pooled=pooled), tmp_path, "city")
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    assert (metadata["order"], metadata["tail"]) == (order, "pooled" if pooled else "none")
    assert load(path).pooled == pooled


FILES = Path(__file__).parent / "files"


@pytest.mark.parametrize(
    "name, order",
    [
        ("format_1", "raster"), ("format_1_rods", "rods"), ("format_2", "raster"),
        ("format_2_rods", "rods"), ("format_2_similarity", "similarity"),
    ],
)  # fmt: skip
def test_files_of_the_first_release_load(name, order):
    loaded = load(FILES / f"{name}.safetensors")
    assert loaded.order == order and loaded.pooled == (order != "raster")
    assert (loaded.family, loaded.layout) == (FAMILY, LAYOUT)
    expected = a_pattern().layers
    assert list(loaded.layers) == list(expected)
    for key, layer in loaded.layers.items():
        assert (layer.density, layer.recall) == ((0.4,) * 3, (0.9, 0.8, 0.7))
        if order != "similarity":
            assert torch.equal(layer.bits, expected[key].bits)
        else:
            assert torch.equal(layer.order[..., LAYOUT.video :], TEXT_BEHIND)


@pytest.mark.parametrize("name", ["format_1", "format_2_similarity"])
def test_masks_and_orders_of_the_first_release_are_checked(tmp_path, name):
    """Their checksum covers no more than these."""
    path = tmp_path / "city.safetensors"
    path.write_bytes((FILES / f"{name}.safetensors").read_bytes())
    change(path, flip)
    with pytest.raises(ValueError, match="masks are not those that were written"):
        load(path)


def test_a_file_holds_the_order_of_every_head(tmp_path):
    saved = ordered_pattern()
    loaded = load(save(saved, tmp_path, "city"))
    assert loaded.order == "similarity" and loaded.nbytes() == saved.nbytes()
    assert saved.nbytes() == a_pattern().nbytes() + 2 * 3 * LAYOUT.tokens * 4
    for name, layer in saved.layers.items():
        assert torch.equal(loaded.layers[name].order, layer.order)
