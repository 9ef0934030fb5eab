"""Tiles that were tuned on a card serve that card, that Triton and that version of the pack alone."""

import json

import pytest
import torch

pytest.importorskip("triton")

from sparse_attn.backends import choice, doctor, tiles, tuned
from tests.bench import tune_tiles

CARD = (8, 9)
FASTER = {name: some[0] for name, some in tuned.candidates().items()}
CUDA = torch.device("cuda")


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "_tuned", {})
    path = tmp_path / "user" / tuned.FILE
    tuned.write(path, CARD, FASTER)
    return path


def of_table():
    found = tiles.attention(CARD, 64, 128), tiles.attention(CARD, 128, 128)
    return *found, tiles.block_masses(CARD, True, False), tiles.quantised_attention(CARD, 128)


def test_a_file_changes_the_tiles_of_its_card_and_is_named(file, monkeypatch):
    before, others = of_table(), tiles.attention((12, 0), 64, 128)
    assert tuned.use(file, CARD) == tuned.USED
    assert set(of_table()) == set(FASTER.values()) != set(before)
    assert tiles.attention((12, 0), 64, 128) == others
    assert tiles.attention(CARD, 64, 64) not in FASTER.values(), "heads of 64 were not tuned"
    monkeypatch.setattr(tiles, "card_of", lambda device=None: CARD)
    monkeypatch.setattr(choice, "why_no_triton", lambda: None)
    assert choice.triton_kernels().name == f"Triton kernels ({tuned.USED})"
    assert doctor.tiles_of(CUDA, str(file.parent)) == tuned.USED
    file.unlink()
    assert tuned.use(file, CARD) == ""
    assert of_table() == before and choice.triton_kernels().name == "Triton kernels"


def changed(**fields):
    return lambda kept: json.dumps({**kept, "for": {**kept["for"], **fields}})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (changed(card=[8, 6]), "of another card"),
        (changed(Triton="3.0.0"), "of another Triton"),
        (changed(**{"version of the pack": "x"}), "of another version of the pack"),
        (lambda kept: json.dumps({**kept, "tiles": {"attention 64": [64, 512, 4, 9, None]}}), ""),
        (lambda kept: json.dumps({**kept, "tiles": {"attention 64": {}}}), ""),
        (lambda kept: json.dumps({**kept, "tiles": [1]}), ""),
        (lambda kept: json.dumps({**kept, "tiles": {"another": [64, 16, 2, 2, None]}}), ""),
        (lambda kept: json.dumps(kept)[:-9], ""),
        (lambda kept: "[" * 100_000, ""),
        (lambda kept: "7", ""),
        (lambda kept: "", ""),
    ],
)
def test_another_file_is_not_used_and_says_so(file, monkeypatch, change, why):
    before = of_table()
    file.write_text(change(json.loads(file.read_text())))
    said = tuned.use(file, CARD)
    assert (
        said == f"tuned tiles are not used: {f'they are {why}' if why else 'their file is damaged'}"
    )
    assert of_table() == before
    monkeypatch.setattr(tiles, "card_of", lambda device=None: CARD)
    monkeypatch.setattr(choice, "why_no_triton", lambda: None)
    assert choice.triton_kernels().name == f"Triton kernels ({said})"
    assert said in doctor.tiles_of(CUDA, str(file.parent))


def test_a_file_that_cannot_be_read_harms_nothing(file):
    file.write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in tuned.use(file, CARD)
    file.unlink()
    file.mkdir()
    assert "cannot be read" in tuned.use(file, CARD)


def test_the_fastest_right_tile_wins(file):
    """With times that are told: 32 keys are slow, 3 stages do not fit, one tile is wrong."""
    file.unlink()
    wrong = tiles.Tile(64, 16, 4, 2)
    right, said = torch.ones(4), []

    def call():
        tile = tiles.attention(CARD, 64, 128)
        if tiles.in_use(CARD)[0] and tile.num_stages == 3:
            raise RuntimeError("out of resource: shared memory\nmore")
        return right * 2 if tile == wrong else right

    def milliseconds(call):
        tile = tiles.attention(CARD, 64, 128)
        in_table = not tiles.in_use(CARD)[0]
        return 10.0 if in_table else {16: 5.0 if tile == wrong else 8.0, 32: 9.9}[tile.tile_k]

    won = tune_tiles.tune(CARD, {"attention 64": call}, milliseconds, said.append)
    assert won == {"attention 64": tiles.Tile(64, 16, 2, 2)}
    assert any("out of resource: shared memory" in line for line in said)
    assert tune_tiles.tune(CARD, {"attention 64": call}, lambda call: 10.0, said.append) == {}
    assert tiles.in_use(CARD) == ({}, "")


def test_each_kernel_of_the_candidates_is_called(device):
    """Every call is of the kernel whose tile it is to tell."""
    qkv = torch.zeros(3, 1, 1, 64, 64, device=device, dtype=torch.bfloat16)
    asked = tune_tiles.calls(*qkv, choice.triton_kernels())
    assert asked.keys() == tuned.candidates().keys()
    for call in asked.values():
        assert call().isfinite().all()
