"""The stored graphs against a running ComfyUI: it knows every node, and takes every value."""

import json
import re
import urllib.request
from urllib.parse import quote

import pytest

from tests.workflows.stored_graphs import (
    FILES,
    NEWER,
    OURS,
    SERVES,
    UPLOADS,
    nodes_of,
    notes,
    read,
    unfold,
    values_of,
    widgets_of,
)

# the value of these widgets is a file, which a server lists only if it has it
FILE_WIDGETS = (
    "unet_name",
    "ckpt_name",
    "clip_name",
    "clip_name1",
    "clip_name2",
    "text_encoder",
    "vae_name",
    "lora_name",
    "model_name",
)


@pytest.fixture(params=FILES)
def workflow(request):
    """A workflow as it runs, with subgraphs unfolded."""
    return unfold(read(FILES[request.param]))


def test_graphs_for_a_newer_comfyui_say_so(workflow):
    newer = {NEWER[node["type"]]["since"] for node in workflow["nodes"] if node["type"] in NEWER}
    said = re.findall(r"\*\*Needs\*\* ComfyUI ([\d.]+) or newer", notes(workflow))
    assert said == [since.removesuffix(".0") for since in newer]


def fetch(server, path):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.url + path, timeout=60) as response:
        return response.read()


def get(server, path):
    return json.loads(fetch(server, path))


@pytest.fixture(scope="module")
def object_info(comfy_server):
    """The definitions of this ComfyUI, and those recorded of a newer one for what it lacks."""
    return NEWER | get(comfy_server, "/object_info")


def declared(info):
    """The inputs of a node type by name, in order: (type, options). Sockets that grow have many."""
    inputs = {}
    for part in ("required", "optional"):
        for name, (kind, *extra) in info["input"].get(part, {}).items():
            if kind == "COMFY_AUTOGROW_V3":
                template = extra[0]["template"]
                ((inner, *more),) = template["input"]["required"].values()
                for number in range(template["max"]):
                    inputs[f"{name}.{template['prefix']}{number}"] = (inner, (more or [{}])[0])
            else:
                inputs[name] = (kind, (extra or [{}])[0])
    return inputs


def options_of(kind, extra):
    return kind if isinstance(kind, list) else extra.get("options")


def test_server_knows_every_node_with_these_inputs(workflow, object_info):
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":  # lives in the interface only
            continue
        info = object_info[node["type"]]
        inputs = declared(info)
        names = [slot["name"] for slot in node["inputs"]]
        assert set(names) <= set(inputs), node["type"]
        assert set(info["input"].get("required", {})) <= set(names), node["type"]
        for slot in node["inputs"]:
            kind, _ = inputs[slot["name"]]
            if "widget" not in slot:
                assert slot["type"] == kind, (node["type"], slot["name"])
        # newer hosts append outputs to some nodes
        outputs = list(zip(info["output"], info["output_name"], strict=True))
        stored = [(out["type"], out["name"]) for out in node["outputs"]]
        assert stored == outputs[: len(stored)], node["type"]


def test_server_takes_every_widget_value(workflow, object_info):
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        inputs = declared(object_info[node["type"]])
        for name, value in values_of(node).items():
            if name in FILE_WIDGETS or (node["type"], name) in UPLOADS:
                continue
            kind, extra = inputs[name]
            where = f"{node['type']} {name} {value!r}"
            if options := options_of(kind, extra):
                keys = [option["key"] if isinstance(option, dict) else option for option in options]
                assert value in keys, where
            elif kind in ("INT", "FLOAT", "FLOAT,INT"):
                assert extra.get("min", value) <= value <= extra.get("max", value), where
            elif kind == "BOOLEAN":
                assert isinstance(value, bool), where
            else:
                assert kind == "STRING" and isinstance(value, str), where


def test_widgets_stand_in_the_order_of_the_server(workflow, object_info):
    """Values have no names in a file: one out of order would move all that follow."""
    for node in workflow["nodes"]:
        if node["type"] != "MarkdownNote":
            order, widgets = list(declared(object_info[node["type"]])), widgets_of(node)
            assert [name for name in order if name in widgets] == widgets, node["type"]
        if node["type"] in OURS:
            assert set(order) == {slot["name"] for slot in node["inputs"]}


def test_values_of_our_nodes_are_the_defaults(workflow, object_info):
    for node in nodes_of(workflow, *SERVES):
        inputs = declared(object_info[node["type"]])
        for name, value in values_of(node).items():
            if name == "enabled" and nodes_of(workflow, "AdaSpaCompare"):
                continue
            # runs in full while another video steers it
            if name == "start_percent" and nodes_of(workflow, "WanAnimate2ToVideo"):
                continue
            kind, extra = inputs[name]
            assert value == extra.get("default", (options_of(kind, extra) or [None])[0]), name


def test_template_browser_offers_the_files(comfy_server):
    offered = get(comfy_server, "/workflow_templates")
    stems = [path.stem for path in FILES.values()]
    (pack,) = [name for name, files in offered.items() if set(files) & set(stems)]
    assert sorted(offered[pack]) == stems
    for path in FILES.values():
        address = f"/api/workflow_templates/{pack}/{quote(path.stem)}"
        assert get(comfy_server, f"{address}.json") == read(path)
        assert fetch(comfy_server, f"{address}.jpg") == path.with_suffix(".jpg").read_bytes()
