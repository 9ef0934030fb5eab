"""Patterns of an earlier run: which are offered, and which serve."""

import os
from pathlib import Path

import pytest
import torch

from sparse_attn.patterns.file import load as read
from tests.host.host_fixtures import VIDEO, calls, sample

pytestmark = pytest.mark.any_comfyui


def begin(nodes, model, handle, file="city.safetensors [output]"):
    return nodes["AdaSpaLoadPattern"].execute(model, handle, file).args


def test_the_same_seed_needs_no_search(saved, attention, nodes):
    model, handle = begin(nodes, *attention())
    out = sample(model, seed=1)
    assert calls(handle) == {"sparse": 16}
    statistics = handle.latest()
    assert statistics.reuse.masks == 4 and not statistics.reuse.refused
    # of the search step alone the result differs: it ran sparse
    assert torch.isfinite(out).all() and not torch.equal(out, saved.out)
    (line,) = [line for line in statistics.lines() if line.startswith("Pattern of ")]
    assert line.startswith("Pattern of city.safetensors: 4 masks used without a search, recall 0.")
    # 64 of 288 rows against the whole: the same tensors in step 0
    mean, _ = statistics.patterns.recall()
    assert mean == pytest.approx(read(saved.path).recall(), abs=0.03)


def test_a_loaded_pattern_decides_the_blocks(saved, attention, nodes):
    model, handle = begin(nodes, *attention(sparsity=0.2))
    sample(model, seed=1)
    assert handle.latest().patterns.density() == pytest.approx(read(saved.path).density(), abs=1e-3)


def test_without_a_loaded_pattern_the_wire_is_as_before(saved, attention, nodes):
    model, handle = attention()
    begin(nodes, model, handle)
    sample(model, seed=1)
    assert calls(handle) == {"search": 4, "sparse": 12}


@pytest.mark.parametrize(
    "name, shape, settings, words",
    [
        ("wan_h64", (1, 16, 5, 16, 24), {}, "and this run has 480 tokens (5x8x12 video)"),
        ("wan_h64", VIDEO, {"block_size": "128x64"}, "blocks of 64, and `block_size` is 128x64"),
        ("wan_t2v", VIDEO, {}, "4 heads, and this run has 1 and 2"),
        ("hunyuan", VIDEO, {}, "the pattern is of Wan, and this model is HunyuanVideo"),
    ],
)
def test_a_pattern_that_does_not_fit_is_no_error(saved, attention, nodes, name, shape, settings,
                                                 words):  # fmt: skip
    expected = sample(attention(name, **settings)[0], shape)
    model, handle = begin(nodes, *attention(name, **settings))
    assert torch.equal(sample(model, shape), expected)
    text = "\n".join(handle.latest().lines())
    assert f"Searched after all: {len(handle.latest().patterns)} masks, " in text and words in text


def test_a_video_of_another_batch_searches(saved, attention, nodes):
    model, handle = begin(nodes, *attention())
    sample(model, (2, *VIDEO[1:]))
    assert calls(handle)["search"] == 8
    (reason,) = handle.latest().reuse.refused
    assert reason.startswith("the pattern is for 1 video(s)")


def test_a_damaged_file_is_refused_before_sampling(saved, attention, nodes):
    saved.path.write_bytes(saved.path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"'city\.safetensors' cannot be read"):
        begin(nodes, *attention())


def test_only_files_in_the_users_folders_are_listed(saved, nodes, folders, tmp_path):
    folders.input.mkdir(parents=True)
    (folders.input / "mine.safetensors").write_bytes(saved.path.read_bytes())
    (folders.input / "notes.txt").write_text("no")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(saved.path.read_bytes())
    (folders.input / "link.safetensors").symlink_to(outside)
    (file,) = [put for put in nodes["AdaSpaLoadPattern"].GET_SCHEMA().inputs if put.id == "file"]
    assert file.options == ["city.safetensors [output]", "mine.safetensors [input]"]


def test_what_cannot_be_named_or_read_is_not_listed(saved, nodes, folders):
    for name in (b"caf\xe9.safetensors", b"\xff\xfe.safetensors"):
        try:
            (folders.output / os.fsdecode(name)).write_bytes(saved.path.read_bytes())
        except OSError:
            pytest.skip("this file system has no such names")
    (folders.output / "folder.safetensors").mkdir()
    loop = folders.output / "loop.safetensors"
    loop.symlink_to(loop)
    folders.input.mkdir(parents=True)
    folders.input.rmdir()
    folders.input.write_text("a file where a folder is looked for")
    node = nodes["AdaSpaLoadPattern"]
    (file,) = [put for put in node.GET_SCHEMA().inputs if put.id == "file"]
    assert file.options == ["city.safetensors [output]"]
    assert node.fingerprint_inputs(file="caf\udce9.safetensors [output]") is None


def test_a_folder_that_cannot_be_listed_costs_only_its_own_files(
    saved, nodes, folders, monkeypatch
):
    glob = Path.glob

    def refused(self, pattern):
        if self == folders.input:
            raise PermissionError("no")
        return glob(self, pattern)

    monkeypatch.setattr(Path, "glob", refused)
    (file,) = [p for p in nodes["AdaSpaLoadPattern"].GET_SCHEMA().inputs if p.id == "file"]
    assert file.options == ["city.safetensors [output]"]


@pytest.mark.parametrize("file", ["../outside.safetensors", "link.safetensors [input]", ""])
def test_a_file_that_is_not_listed_is_not_opened(saved, attention, nodes, file):
    with pytest.raises(ValueError, match="There is no pattern"):
        begin(nodes, *attention(), file=file)


def test_a_changed_file_is_read_again(saved, nodes):
    node = nodes["AdaSpaLoadPattern"]
    before = node.fingerprint_inputs(file="city.safetensors [output]")
    assert before == node.fingerprint_inputs(file="city.safetensors [output]")
    saved.path.write_bytes(saved.path.read_bytes() + b" ")
    assert node.fingerprint_inputs(file="city.safetensors [output]") != before


@pytest.mark.parametrize("node, value", [("AdaSpaSavePattern", "city"),
                                         ("AdaSpaLoadPattern", "city.safetensors [output]")])  # fmt: skip
def test_wires_of_two_different_nodes_are_refused(saved, attention, nodes, load, node, value):
    model, _ = attention()
    _, handle = attention()
    for wrong in (model, load("wan_h64")):
        with pytest.raises(ValueError, match="wire both from the same node"):
            nodes[node].execute(wrong, handle, value)


def test_a_new_installation_does_not_keep_the_wishes_of_the_old(saved, attention, nodes):
    model, _ = begin(nodes, *attention())
    sample(model, seed=1)
    again, handle = attention(model)
    sample(again, seed=1)
    assert calls(handle) == {"search": 4, "sparse": 12}


def test_a_stopped_run_writes_nothing(attention, nodes, folders):
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args

    def stop(*args):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(model, callback=stop)
    assert not folders.output.exists()


def test_windows_neither_keep_nor_begin_with_a_pattern(comfyui):
    from sparse_attn.host.families.family import Block
    from sparse_attn.host.model_call import Layer, name_of

    layer = Layer(("a key",), Block("double", 3, 3), 0)
    assert name_of(layer, "positive", None) == ("positive", "double", 3, 0)
    assert name_of(layer, "positive", ("window", 2, (0, 1))) is None
    assert name_of(layer, "conditioning 7", None) is None
    assert name_of(layer._replace(named=False), "positive", None) is None
