"""The workflow that `run.py serve` offers for the tiny model."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny_model"))

from workflow import FOLDER, graph

from sparse_attn.config import PRESETS, from_preset, parse_numbers
from tests.workflows.workflow_builder import NODES, pairs


def test_file_is_what_the_script_writes():
    written = (FOLDER / "workflows" / "tiny_model.json").read_text(encoding="utf-8")
    assert written == graph().as_json()


def test_shown_values_are_the_preset_s_own():
    workflow = json.loads(graph().as_json())
    (node,) = [node for node in workflow["nodes"] if node["type"] == "AdaSpaAttention"]
    names = [name for name, _ in pairs(NODES["AdaSpaAttention"][1])]
    values = dict(zip(names, node["widgets_values"], strict=True))
    preset = values.pop("preset")
    values["search_points"] = parse_numbers(values["search_points"], float, "search_points")
    values["dense_layers"] = parse_numbers(values["dense_layers"], int, "dense_layers")
    config = from_preset(preset, **values)
    # Custom searches where it is told to, also on fewer steps
    assert config == from_preset("Custom", search_gap=config.search_gap, **values)
    assert config.sparsity == PRESETS[preset].sparsity


def test_every_link_joins_sockets_of_one_type():
    workflow = graph()
    nodes = {node["id"]: node for node in workflow.nodes}
    for _, source, from_slot, target, to_slot, kind in workflow.links:
        assert nodes[source]["outputs"][from_slot]["type"] == kind
        assert nodes[target]["inputs"][to_slot]["type"] == kind
