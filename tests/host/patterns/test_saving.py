"""Patterns that a run leaves behind, in the user's folder."""

import sys

import pytest
import torch

from sparse_attn.patterns.file import load as read
from tests.host.host_fixtures import sample
from tests.tools import comfy_inprocess

pytestmark = pytest.mark.any_comfyui


def test_a_run_writes_its_pattern_when_it_ends(saved):
    pattern = read(saved.path)
    assert pattern.family == "Wan" and pattern.layout.tokens == 288
    # two layers, two prompts
    assert {(name.role, name.block_index) for name in pattern.layers} == {
        ("positive", 0), ("positive", 1), ("negative", 0), ("negative", 1),
    }  # fmt: skip
    statistics = saved.handle.latest()
    assert pattern.density() == pytest.approx(statistics.patterns.density(), abs=1e-3)
    assert pattern.recall() == pytest.approx(statistics.patterns.recall()[0], abs=1e-3)
    assert any(line.startswith("Pattern saved: city.safetensors, ") for line in statistics.lines())


def test_saving_changes_nothing_else(saved, attention):
    model, handle = attention()
    assert torch.equal(sample(model, seed=1), saved.out)
    assert not any("Pattern" in line for line in handle.latest().lines())
    assert handle.pattern is None and saved.handle.pattern is None


def test_a_file_is_never_overwritten(saved, attention, nodes, folders):
    before = saved.path.read_bytes()
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city.safetensors").args
    sample(model, seed=2)
    sample(model, seed=3)
    assert saved.path.read_bytes() == before
    assert sorted(path.name for path in folders.output.iterdir()) == [
        "city.safetensors", "city_00001_.safetensors", "city_00002_.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "", " ", "../city", "a/b", "a\\b", "/city", "..", ".hidden", "C:city", "a\0b", "a\nb",
        "city.", "city. ", "city..safetensors", ".safetensors", "\udce9", 101 * "a", 51 * "é",
        34 * "城", "nul", "CON", "con.txt", "Aux .b", "com1", "LPT9.city", "COM¹", "prn.safetensors",
    ],
)  # fmt: skip
def test_a_name_that_no_system_takes_is_refused_before_sampling(attention, nodes, folders, name):
    model, handle = attention()
    with pytest.raises(ValueError, match="`name` must be a file name"):
        nodes["AdaSpaSavePattern"].execute(model, handle, name)
    assert not folders.output.exists()


@pytest.mark.parametrize(
    "name, file",
    [
        (100 * "a", 100 * "a"), (33 * "城", 33 * "城"), (" city .safetensors", "city"),
        ("nul_1", "nul_1"), ("console", "console"), ("com10", "com10"), ("cafe\u0301", "café"),
        ("v1.2 (night)", "v1.2 (night)"),
    ],
)  # fmt: skip
def test_any_other_name_becomes_the_file(attention, nodes, folders, name, file):
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, name).args
    sample(model)
    assert [path.name for path in folders.output.iterdir()] == [f"{file}.safetensors"]


def test_a_full_disk_does_not_cost_the_video(attention, nodes, monkeypatch, saved):
    def full(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "other").args
    assert torch.equal(sample(model, seed=1), saved.out)
    assert "the pattern was not saved (no space left)" in handle.latest().warnings


def test_a_dense_run_has_no_pattern_to_save(attention, nodes, folders):
    model, handle = attention(min_tokens=8192)
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args
    sample(model)
    assert "no pattern was saved, because no layer ran sparse" in handle.latest().warnings
    assert not folders.output.exists()


@pytest.fixture
def messages(nodes):
    """The pack's own module of messages; the nodes do not know those of the tests."""
    return sys.modules[f"{comfy_inprocess.load_pack().__name__}.sparse_attn.host.status"]


@pytest.fixture
def prompt(messages, monkeypatch):
    """prompt(id): from now on the server says that it runs this prompt."""

    def runs(prompt_id):
        monkeypatch.setattr(messages, "prompt_id", lambda: prompt_id)

    return runs


def not_saved(handle):
    lines = handle.latest().lines()
    return any(line.startswith("Pattern not saved: an earlier sampler of this") for line in lines)


def test_of_the_samplers_of_a_prompt_the_first_writes(attention, nodes, folders, prompt):
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args
    found = []
    for number in (1, 1, 1, 2, 2):
        prompt(f"prompt {number}")
        sample(model, cfg=1.0)
        found.append((len(list(folders.output.iterdir())), not_saved(handle)))
    assert found == [(1, False), (1, True), (1, True), (2, False), (2, True)]


def test_every_sampler_writes_where_that_is_asked_for(attention, nodes, folders, prompt):
    model, handle = attention()
    save = nodes["AdaSpaSavePattern"]
    (model,) = save.execute(model, handle, "city", every_sampler=True).args
    prompt("prompt 1")
    for _ in range(3):
        sample(model, cfg=1.0)
        assert not not_saved(handle)
    assert len(list(folders.output.iterdir())) == 3


def test_a_run_that_has_nothing_to_save_or_fails_to_leaves_it_to_the_next(
    attention, nodes, folders, prompt, monkeypatch
):
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args
    prompt("prompt 1")
    # too short
    sample(model, (1, 16, 1, 4, 4), cfg=1.0)
    with monkeypatch.context() as full:
        full.setattr("safetensors.torch.save_file", lambda *args, **options: 1 / 0)
        sample(model, cfg=1.0)
    assert "the pattern was not saved (division by zero)" in handle.latest().warnings
    sample(model, cfg=1.0)
    assert [path.name for path in folders.output.iterdir()] == ["city.safetensors"]


def test_the_size_is_said_before_the_file_is_written(
    attention, nodes, folders, messages, monkeypatch
):
    told = []
    monkeypatch.setattr(
        messages, "say", lambda node, text: told.append((text, folders.output.exists()))
    )
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args
    sample(model)
    (before, existed), (after, exists) = told
    assert (existed, exists) == (False, True)
    # two layers, two prompts, four heads of 5 x 5 blocks in a byte a row, and 288 tokens in order
    assert before == f"Writing a pattern of {2 * 2 * 4 * (5 + 288 * 4) / 2**20:.1f} MiB."
    assert after.startswith("Saved city.safetensors, ")


def test_a_message_that_cannot_be_sent_costs_neither_the_file_nor_the_run(
    attention, nodes, folders, messages, monkeypatch
):
    class Server:
        client_id = None

        def send_progress_text(self, *args):
            raise UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed")

        def send_sync(self, *args):
            pass

    monkeypatch.setattr(messages, "_server", Server)
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args
    monkeypatch.setattr(model.get_attachment("adaspa_save"), "node_id", "7")
    sample(model)
    assert (folders.output / "city.safetensors").exists()
