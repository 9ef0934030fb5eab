"""The graphs in workflows/: what lies in the files, and what ComfyUI runs of it."""

import json
from collections.abc import Iterator
from math import exp
from pathlib import Path

from sparse_attn.config import AdaSpaConfig, from_preset

ROOT = Path(__file__).resolve().parents[2]
# by name; a number before it sets the order in which ComfyUI lists them
FILES = {path.stem[3:]: path for path in sorted((ROOT / "workflows").glob("*.json"))}
TINY = ROOT / "tests" / "tiny_model" / "workflows" / "tiny_model.json"
# definitions of nodes that the ComfyUI of the tests lacks, as a newer one serves them
NEWER = json.loads(Path(__file__).with_name("newer_nodes.json").read_text(encoding="utf-8"))
# samples one video twice, the first time with AdaSpa off
TWICE = "Wan 2.2 5B with and without"
# the subgraph in a box, whose entry and exit are no nodes
BOXED, ENTRY, EXIT = "Wan 2.2 5B in one box", -10, -20

# nodes of ours that patch, and how many models each serves
SERVES = {"AdaSpaAttention": 1, "AdaSpaAttentionPair": 2}
OURS = (*SERVES, "AdaSpaReport", "AdaSpaCompare")
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustomAdvanced")
# beside these widgets stands a button, which has a value too
UPLOADS = {("LoadImage", "image"), ("LoadImageMask", "image"), ("LoadVideo", "file")}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def levels(workflow: dict) -> list[dict]:
    """The workflow and every subgraph in it, each with its own nodes and groups."""
    return [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]


def unfold(workflow: dict) -> dict:
    """Put the nodes of each subgraph in the place of the node that stands for it."""
    inner = {graph["id"]: graph for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    if not inner:
        return workflow
    nodes, ends = [], [tuple(link[1:]) for link in workflow["links"]]
    for node in workflow["nodes"]:
        if node["type"] not in inner:
            nodes.append(node)
            continue
        graph = inner[node["type"]]
        nodes += graph["nodes"]
        inside = [
            (link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"],
             link["type"])
            for link in graph["links"]
        ]  # fmt: skip
        sources = {end[3]: end[:2] for end in ends if end[2] == node["id"]}
        results = {end[3]: end[:2] for end in inside if end[2] == EXIT}
        ends = [
            (*results[end[1]], *end[2:]) if end[0] == node["id"] else end
            for end in ends
            if end[2] != node["id"]
        ]
        ends += [
            (*sources[end[1]], *end[2:]) if end[0] == ENTRY else end
            for end in inside
            if end[2] != EXIT
        ]
    links = [[i, *end] for i, end in enumerate(ends, 1)]
    nodes = [_wired(node, links) for node in nodes]
    known = {
        "nodes": nodes,
        "links": links,
        "groups": [group for graph in levels(workflow) for group in graph["groups"]],
        "last_link_id": len(links),
    }
    return {key: value for key, value in {**workflow, **known}.items() if key != "definitions"}


def _wired(node: dict, links: list) -> dict:
    into = {link[4]: link[0] for link in links if link[3] == node["id"]}
    inputs = [{**slot, "link": into.get(i)} for i, slot in enumerate(node["inputs"])]
    outputs = [
        {**out, "links": [link[0] for link in links if link[1:3] == [node["id"], i]]}
        for i, out in enumerate(node["outputs"])
    ]
    return {**node, "inputs": inputs, "outputs": outputs}


def nodes_of(workflow: dict, *kinds: str) -> list[dict]:
    return [node for node in workflow["nodes"] if node["type"] in kinds]


def by_id(workflow: dict) -> dict:
    return {node["id"]: node for node in workflow["nodes"]}


def notes(workflow: dict) -> str:
    return "\n".join(node["widgets_values"][0] for node in nodes_of(workflow, "MarkdownNote"))


def widgets_of(node: dict) -> list[str]:
    return [slot["name"] for slot in node["inputs"] if "widget" in slot]


def values_of(node: dict) -> dict:
    """Widget values by name; the control after a seed and an upload button have no name."""
    values, named = list(node["widgets_values"]), {}
    for name in widgets_of(node):
        named[name] = values.pop(0)
        if name in ("seed", "noise_seed"):
            assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
        if (node["type"], name) in UPLOADS:
            assert values.pop(0) == "image"
    assert not values, f"{node['type']} has values without a widget: {values}"
    return named


def source(workflow: dict, node: dict, name: str) -> dict:
    """The node that feeds an input."""
    link = next(slot["link"] for slot in node["inputs"] if slot["name"] == name)
    return by_id(workflow)[next(entry[1] for entry in workflow["links"] if entry[0] == link)]


def upstream(workflow: dict, node: dict, names, kinds) -> dict:
    """The first node of one of `kinds`, following the first wired input of these names."""
    while True:
        wired = [slot["name"] for slot in node["inputs"] if slot["link"]]
        node = source(workflow, node, next(name for name in names if name in wired))
        if node["type"] in kinds:
            return node


def straight(sigma: float) -> float:
    """Progress of a sigma in a schedule without a shift."""
    return 1 - sigma


def ltx_progress(sigma: float) -> float:
    """Inverse of the time shift that LTX-Video's schedule has, by 2.37."""
    return 1 - 1 / (1 + exp(2.37) * (1 / sigma - 1)) if sigma else 1.0


def even(total: int, first: int = 0, last: int | None = None) -> list[float]:
    """Sigmas of steps `first` to `last` of `total`."""
    return [1 - step / total for step in range(first, (total if last is None else last) + 1)]


def runs(workflow: dict) -> Iterator[tuple]:
    """(sigmas, progress of a sigma) of every sampler with AdaSpa."""
    off = [node for node in nodes_of(workflow, *SERVES) if not values_of(node)["enabled"]]
    for sampler in nodes_of(workflow, *SAMPLERS):
        if off and upstream(workflow, sampler, ("model",), SERVES) in off:
            continue
        schedule = sampler
        if sampler["type"] == "SamplerCustomAdvanced":
            schedule = source(workflow, sampler, "sigmas")
        values = values_of(schedule)
        if schedule["type"] == "ManualSigmas":
            yield [float(sigma) for sigma in values["sigmas"].split(",")], ltx_progress
        else:
            first, last = values.get("start_at_step", 0), values.get("end_at_step")
            yield even(values["steps"], first, last), straight


def configs_of_runs(workflow: dict) -> list[AdaSpaConfig]:
    """The preset and the part of the steps that decide when each of `runs` is sparse."""
    return [
        from_preset(values["preset"], start_percent=float(values["start_percent"]))
        for node in nodes_of(workflow, *SERVES)
        if (values := values_of(node))["enabled"]
        for _ in range(SERVES[node["type"]])
    ]
