"""Pattern files: what they hold, and that a damaged one is refused in one sentence."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_attn.patterns.file import checksum, load, save
from sparse_attn.patterns.pattern import CarriedPattern
from tests.patterns.example_pattern import FAMILY, LAYOUT, NAME, a_pattern

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path):
    return save(a_pattern(), tmp_path, "city")


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


def test_a_file_holds_the_order_of_every_head(tmp_path):
    saved = ordered_pattern()
    loaded = load(save(saved, tmp_path, "city"))
    assert loaded.order == "similarity" and loaded.nbytes() == saved.nbytes()
    assert saved.nbytes() == a_pattern().nbytes() + 2 * 3 * LAYOUT.tokens * 4
    for name, layer in saved.layers.items():
        assert torch.equal(loaded.layers[name].order, layer.order)


def doubled(order):
    order[0, 1, 5] = order[0, 1, 6]
    return order


def beyond_the_last(order):
    order[0, 1, 5] = LAYOUT.tokens
    return order


ORDER_DAMAGE = {
    "doubled": (doubled, "is not one of all tokens"),
    "beyond": (beyond_the_last, "tokens that there are not"),
    "text elsewhere": (lambda x: x.flip(-1), "is not one of all tokens"),
    "dtype": (lambda x: x.long(), "torch.int64"),
    "shape": (lambda x: x[..., 1:], "a token order of shape [1, 3, 639]"),
}


@pytest.mark.parametrize("name", ORDER_DAMAGE)
def test_a_wrong_order_is_refused(tmp_path, name):
    damage, words = ORDER_DAMAGE[name]
    path = save(ordered_pattern(), tmp_path, "city")
    forge(path, lambda x: {**x, "order.00001": damage(x["order.00001"])})
    assert_refused(path, words)


def test_a_lost_order_is_refused(tmp_path):
    path = save(ordered_pattern(), tmp_path, "city")
    change(path, lambda x: {k: v for k, v in x.items() if k != "order.00001"})
    assert_refused(path, "it is not what was written")


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


def rows_of_nothing(tensors):
    tensors["mask.00000"][0, 1, 3] = 0
    return tensors


def beyond(tensors):
    tensors["mask.00000"][0, 1, 3, 1] |= 128
    return tensors


NUMBERS = [0.5] * 3
SECOND = (*NAME._replace(block_index=1), NUMBERS, NUMBERS)


def layers(*first, second=SECOND):
    return {"layers": json.dumps([first, second])}


DAMAGE = {
    "an empty row": (rows_of_nothing, {}, "leaves a part of the video without attention"),
    "blocks behind the last": (beyond, {}, "lists blocks behind the last"),
    "dtype": (lambda x: {k: v.int() for k, v in x.items()}, {}, "torch.int32 instead of uint8"),
    "shape": (lambda x: {k: v[:, :, :9] for k, v in x.items()}, {}, "of shape [1, 3, 9, 2]"),
    "no head": (lambda x: {k: v[:, :0] for k, v in x.items()}, {}, "of shape [1, 0, 10, 2]"),
    "heads": (lambda x: {k: v[:, :2] for k, v in x.items()}, {}, "numbers per head"),
    "a mask lost": (lambda x: {"mask.00000": x["mask.00000"]}, {}, "1 masks for other layers"),
    "a mask of another name": (
        lambda x: {"mask.00000": x["mask.00000"], "mask.7": x["mask.00001"]},
        {},
        "mask.00001 is missing",
    ),
    "order": (None, {"order": "hilbert"}, "token order 'hilbert'"),
    "order of another tail": (
        None,
        {"tail": "pooled"},
        "token order 'raster' is not rods or similarity",
    ),
    "no orders": (None, {"tail": "pooled", "order": "similarity"}, "0 token orders of 2 masks"),
    "tail": (None, {"tail": "weighted"}, "tail 'weighted' is not one of none, pooled"),
    "a long tail": (None, {"tail": "ab" * 9999}, "tail 'abab"),
    "grid of two": (None, {"grid": "[5, 4]"}, "a grid of '[5, 4]'"),
    "negative grid": (None, {"grid": "[-5, -4, 31]"}, "a grid of"),
    "grid of nothing": (None, {"grid": "[0, 4, 31]"}, "is not positive"),
    "grid without end": (None, {"grid": "[1e400, 4, 31]"}, "a grid of"),
    "a nested grid": (None, {"grid": "[" * 99999}, "damaged"),
    "grid of words": (None, {"grid": '"abc"'}, "a grid of"),
    "before": (None, {"before": "٢٠"}, "tokens beside the video"),
    "after": (None, {"after": "1" * 5000}, "tokens beside the video"),
    "block size": (None, {"block_size": "96"}, "blocks of '96' instead of 64, 128, 128x64"),
    "other blocks": (None, {"block_size": "128x64"}, "of shape [1, 3, 10, 2] for 5 x 10 blocks"),
    "no family": (None, {"family": None}, "family is missing"),
    "a family of two lines": (None, {"family": "Wan\nMochi"}, "a name of 'Wan\\nMochi'"),
    "no JSON": (None, {"layers": "[["}, "damaged"),
    "nested layers": (None, {"layers": "[" * 99999}, "damaged"),
    "layers of a number": (None, {"layers": "2"}, "2 masks for other layers"),
    "a layer of nothing": (None, {"layers": "[[], []]"}, "a layer of []"),
    "recall": (None, layers(*NAME, [2.0] * 3, NUMBERS), "outside 0 to 1"),
    "no number": (None, layers(*NAME, [float("nan")] * 3, NUMBERS), "outside 0 to 1"),
    "numbers of words": (None, layers(*NAME, ["0.5"] * 3, NUMBERS), "instead of a number per head"),
    "one number": (None, layers(*NAME, 0.5, NUMBERS), "instead of a number per head"),
    "an index without end": (
        None,
        {"layers": layers(*NAME, NUMBERS, NUMBERS)["layers"].replace("0, 0,", "1e400, 0,")},
        "a layer of ['positive', 'double', inf",
    ),
    "an index of a word": (None, layers("positive", "double", "0", 0, NUMBERS, NUMBERS), "a layer of"),
    "a role of two lines": (None, layers("a\nb", *NAME[1:], NUMBERS, NUMBERS), "a name of"),
    "a role of a list": (None, layers([], *NAME[1:], NUMBERS, NUMBERS), "a name of []"),
    "two layers of one name": (
        None,
        layers(*NAME, NUMBERS, NUMBERS, second=(*NAME, NUMBERS, NUMBERS)),
        "two masks of one layer, positive double 0 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_malformed_file_is_refused_with_one_sentence(file, name):
    damage, metadata, words = DAMAGE[name]
    forge(file, damage, **metadata)
    assert_refused(file, words)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_malformed_file_of_the_first_release_too(file, name):
    damage, metadata, _ = DAMAGE[name]
    change(file, damage, **metadata, version="2")
    assert_refused(file, "is damaged (")


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_is_not_what_was_written_is_refused(file, name):
    damage, metadata, _ = DAMAGE[name]
    change(file, damage, **metadata)
    assert_refused(file, "it is not what was written")


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"version": "4"}, "written by a newer AdaSpa (format 4"),
        ({"version": "²"}, "is not an AdaSpa pattern file"),
        ({"version": "1" * 5000}, "is not an AdaSpa pattern file"),
        ({"version": None}, "is not an AdaSpa pattern file"),
        ({"format": None}, "is not an AdaSpa pattern file"),
        ({"crc32": None}, "crc32 is missing"),
        ({"crc32": "0"}, "it is not what was written"),
        ({"family": "Mochi"}, "it is not what was written"),
        ({"more": "x"}, "it is not what was written"),
    ],
    ids=str,
)
def test_other_metadata_is_refused(file, metadata, words):
    change(file, **metadata)
    assert_refused(file, words)


def test_a_flipped_bit_is_refused_wherever_it_is(file):
    """Every byte, header and padding included; which of its bits changes with the byte."""
    whole = file.read_bytes()
    loaded = []
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1 << place * 5 % 8
        file.write_bytes(broken)
        try:
            load(file)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1, place
        else:
            loaded.append(place)
    assert loaded == []


@pytest.mark.parametrize("size", [0, 5, 200, -3])
def test_a_truncated_file_is_refused(file, size):
    file.write_bytes(file.read_bytes()[:size])
    assert_refused(file, "cannot be read")


def test_a_name_that_is_no_text_is_shown_as_one(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    try:
        path.write_bytes(b"no pattern")
    except OSError:
        pytest.skip("this file system has no such names")
    assert_refused(path, r"'caf\udce9.safetensors' cannot be read")


def test_a_file_of_something_else_or_none_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    assert_refused(path, "is not an AdaSpa pattern file")
    assert_refused(tmp_path / "absent.safetensors", "cannot be read")


def test_nothing_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no pattern to save"):
        save(CarriedPattern(FAMILY, LAYOUT, "64"), tmp_path, "none")
    assert not list(tmp_path.iterdir())


# ---- several savers


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    """A file system with hard links, and one without."""

    def refused(*args):
        raise OSError("not supported")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refused)


def test_a_failed_save_leaves_no_part_and_the_earlier_file(file, monkeypatch, links):
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save(a_pattern(), file.parent, "city")
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_save_that_is_stopped_while_it_takes_its_name_leaves_nothing(tmp_path, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    for step, after in (("link", "replace"), ("replace", "link")):
        monkeypatch.setattr(os, step, stopped)
        if after == "link":
            monkeypatch.setattr(os, "link", lambda *args: os.stat(tmp_path / "absent"))
        with pytest.raises(KeyboardInterrupt):
            save(a_pattern(), tmp_path, "city")
        assert not list(tmp_path.iterdir())


def test_a_file_that_others_may_read(file):
    plain = file.with_name("plain")
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode


SAVER = """
import sys
from pathlib import Path
from sparse_attn.patterns.file import load, save
pattern = load(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(10):
    save(pattern, Path(sys.argv[2]), "tower")
"""


def assert_a_file_each(folder, paths, count):
    """Fail unless `count` savers of "tower", among them those of `paths`, wrote a file each."""
    numbered = [f"tower_{n:05}_.safetensors" for n in range(1, count)]
    assert sorted(path.name for path in folder.iterdir()) == ["tower.safetensors", *numbered]
    assert len(set(paths)) == len(paths)
    assert all(len(load(path).layers) == 2 for path in folder.iterdir())


def test_threads_that_save_one_name_never_overwrite_each_other(tmp_path, links):
    pattern, folder = a_pattern(), tmp_path / "new" / "folder"
    with ThreadPoolExecutor(30) as threads:
        paths = list(threads.map(lambda _: save(pattern, folder, "tower"), range(60)))
    assert_a_file_each(folder, paths, 60)


def test_processes_that_save_one_name_never_overwrite_each_other(file, tmp_path):
    folder = tmp_path / "new"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, file, folder], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        paths = [save(a_pattern(), folder, "tower") for _ in range(10)]
    assert process.returncode == 0
    assert_a_file_each(folder, paths, 20)
