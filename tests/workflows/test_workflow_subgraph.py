"""The graph whose loader, AdaSpa, sampler and report are one node."""

import uuid

import pytest

from tests.workflows.stored_graphs import (
    BOXED,
    ENTRY,
    EXIT,
    FILES,
    ROOT,
    read,
    unfold,
    values_of,
    widgets_of,
)
from tests.workflows.test_graphs_on_a_server import get

BLUEPRINT = ROOT / "subgraphs" / "Sample with AdaSpa.json"


@pytest.fixture
def boxed():
    return read(FILES[BOXED])


def test_subgraph_and_the_node_that_stands_for_it_agree(boxed):
    (inner,) = boxed["definitions"]["subgraphs"]
    (box,) = [node for node in boxed["nodes"] if node["type"] == inner["id"]]
    uuid.UUID(inner["id"])
    for own, outside in ((inner["inputs"], box["inputs"]), (inner["outputs"], box["outputs"])):
        assert [(s["name"], s["type"]) for s in own] == [(s["name"], s["type"]) for s in outside]
    links = {link["id"]: link for link in inner["links"]}
    for slot, socket in enumerate(inner["inputs"]):
        ends = {(links[i]["origin_id"], links[i]["origin_slot"]) for i in socket["linkIds"]}
        assert ends == {(ENTRY, slot)}
    for slot, socket in enumerate(inner["outputs"]):
        (link,) = socket["linkIds"]
        assert (links[link]["target_id"], links[link]["target_slot"]) == (EXIT, slot)
    inside = {str(node["id"]): node for node in inner["nodes"]}
    for number, widget in box["properties"]["proxyWidgets"]:
        assert widget in [*widgets_of(inside[number]), "control_after_generate"]
    # an id twice would make one of the two nodes unreachable
    assert not {node["id"] for node in boxed["nodes"]} & {node["id"] for node in inner["nodes"]}
    kinds = [node["type"] for node in inner["nodes"]]
    assert kinds == [
        "UNETLoader",
        "AdaSpaAttention",
        "ModelSamplingSD3",
        "KSampler",
        "AdaSpaReport",
    ]


def as_prompt(nodes, links):
    """Nodes as the server takes them; a link from elsewhere is left open."""
    prompt, ids = {}, {node["id"] for node in nodes}
    for node in nodes:
        inputs = values_of(node)
        for link, start, slot, end, place, _ in links:
            if end == node["id"] and start in ids:
                assert node["inputs"][place]["link"] == link
                inputs[node["inputs"][place]["name"]] = [str(start), slot]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def test_subgraph_runs_on_a_server(comfy_server, boxed):
    (inner,) = boxed["definitions"]["subgraphs"]
    numbers = {node["type"]: str(node["id"]) for node in inner["nodes"]}
    whole = unfold(boxed)
    nodes = [node for node in whole["nodes"] if str(node["id"]) in numbers.values()]
    prompt = as_prompt(nodes, whole["links"])
    # a tiny model, and conditionings that need no text encoder
    prompt[numbers["UNETLoader"]]["inputs"]["unet_name"] = "tiny_wan_h64.safetensors"
    prompt[numbers["AdaSpaAttention"]]["inputs"].update(
        preset="Custom", min_tokens=64, verdict="sparse"
    )  # fmt: skip
    prompt[numbers["KSampler"]]["inputs"].update(
        steps=4, sampler_name="euler", positive=["text", 0], negative=["text", 0],
        latent_image=["latent", 0],
    )  # fmt: skip
    prompt["text"] = {"class_type": "AdaSpaHostTestPrompt", "inputs": {"tokens": 7, "seed": 0}}
    size = {"width": 192, "height": 128, "length": 9, "batch_size": 1}
    prompt["latent"] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": size}
    entry = comfy_server.post(prompt)
    (text,) = entry["outputs"][numbers["AdaSpaReport"]]["text"]
    assert "288 tokens, steps 1 dense, 2 search, 3-4 sparse, density" in text


def test_the_blueprint_is_the_box_of_the_graph(boxed):
    blueprint = read(BLUEPRINT)
    assert blueprint["definitions"] == boxed["definitions"]
    (alone,) = blueprint["nodes"]
    (box,) = [node for node in boxed["nodes"] if node["type"] == alone["type"]]
    assert alone["properties"] == box["properties"]
    assert all(slot["link"] is None for slot in alone["inputs"])
    assert [slot["name"] for slot in alone["inputs"]] == [slot["name"] for slot in box["inputs"]]


def test_server_offers_the_blueprint(comfy_server):
    ours = [
        entry["name"]
        for entry in get(comfy_server, "/global_subgraphs").values()
        if entry["info"]["node_pack"] == "custom_nodes.adaspa"
    ]
    assert ours == [BLUEPRINT.stem]
