"""A file that is not what was written is refused with one sentence."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from sparse_attn.patterns.file import load, save
from tests.patterns.example_pattern import LAYOUT, NAME
from tests.patterns.written_file import assert_refused, change, forge, ordered_pattern


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
