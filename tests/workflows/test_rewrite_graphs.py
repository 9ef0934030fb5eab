"""The script that follows a change of our widgets and presets through the stored graphs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from sparse_attn import config
from sparse_attn.schedule import plan
from tests.tools import comfy_inprocess
from tests.workflows.rewrite_graphs import renewed, rewritten
from tests.workflows.stored_graphs import (
    FILES,
    TINY,
    configs_of_runs,
    nodes_of,
    notes,
    read,
    runs,
    unfold,
    values_of,
)

PATHS = [*FILES.values(), TINY]


@pytest.fixture
def schemas(comfyui):
    nodes = comfy_inprocess.nodes_of(comfy_inprocess.load_pack())
    return {name: node.GET_SCHEMA() for name, node in nodes.items()}


def changed(path, schemas, tmp_path):
    file = tmp_path / path.name
    file.write_text(rewritten(path.read_text("utf-8"), schemas), "utf-8")
    return unfold(read(file))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_files_are_up_to_date(path, schemas):
    text = path.read_text("utf-8")
    assert rewritten(text, schemas) == text


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_new_preset_and_a_new_widget_reach_every_graph(path, schemas, tmp_path, monkeypatch):
    preset = values_of(nodes_of(unfold(read(path)), "AdaSpaAttention", "AdaSpaAttentionPair")[0])
    preset = preset["preset"]
    sparser = replace(config.PRESETS[preset], sparsity=0.66, warmup=0.5, search_points=())
    monkeypatch.setitem(config.PRESETS, preset, sparser)
    for name in ("AdaSpaAttention", "AdaSpaAttentionPair"):
        inputs = [SimpleNamespace(**vars(put)) for put in schemas[name].inputs]
        (first,) = [put for put in inputs if put.id == "preset"]
        first.extra_dict = {"presets": {preset: {"sparsity": 0.66, "warmup": 0.5}}}
        inputs.append(SimpleNamespace(id="new", default="x", get_io_type=lambda: "STRING"))
        schemas[name] = SimpleNamespace(inputs=inputs)
    before, after = unfold(read(path)), changed(path, schemas, tmp_path)
    for old, node in zip(before["nodes"], after["nodes"], strict=True):
        if node["type"] in ("AdaSpaAttention", "AdaSpaAttentionPair"):
            values = values_of(old) | {"sparsity": 0.66, "warmup": 0.5, "new": "x"}
            assert list(values_of(node).items()) == list(values.items())
        elif node["type"] != "MarkdownNote":
            assert node == old
    if path != TINY:
        assert "skips 66 %" in notes(after) or "keeps the first 50 % of the steps" in notes(after)
        for found, (sigmas, progress) in zip(configs_of_runs(after), runs(after), strict=True):
            assert found.warmup == sparser.warmup
            described = plan(sigmas, progress, found).describe().removeprefix("steps ")
            assert described in notes(after)


def test_a_note_that_counts_other_samplers_is_refused():
    workflow = unfold(read(FILES["Wan 2.2 14B text to video"]))
    for words in (
        "Here: steps 1 dense, 2 search.",
        "steps 1 dense, steps 2 search, steps 3 sparse",
    ):
        with pytest.raises(ValueError, match="The graph has 2 samplers"):
            renewed(words, workflow)
