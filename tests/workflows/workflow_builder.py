"""Nodes, links and groups as ComfyUI's interface stores them, for the files in workflows/.

What the graphs contain is in workflow_graphs.py, the sockets of a node in workflow_nodes.py.
"""

import json
import uuid

from tests.workflows.workflow_nodes import NODES

VERSIONS = {"adaspa": "0.1.0", "comfy-core": "0.30.0"}

COLORS = {
    "AdaSpaAttention": {"color": "#24534a", "bgcolor": "#2c3f3b"},
    "AdaSpaAttentionPair": {"color": "#24534a", "bgcolor": "#2c3f3b"},
    "AdaSpaReport": {"color": "#24534a", "bgcolor": "#2c3f3b"},
    "MarkdownNote": {"color": "#4a4023", "bgcolor": "#2f2b1f"},
}

TITLE_HEIGHT = 30
GAP = 80


def pairs(text: str) -> list[tuple[str, str]]:
    return [tuple(item.replace("~", " ").split(":")) for item in text.split()]


def address(model: str | tuple[str, str]) -> str:
    return model if isinstance(model, str) else model[0]


def name_of(model: str | tuple[str, str]) -> str:
    return address(model).rsplit("/", 1)[1]


def folder(model: str | tuple[str, str]) -> str:
    return model.rsplit("/", 2)[1] if isinstance(model, str) else model[1]


class Column:
    """Places nodes below each other."""

    def __init__(self, x: int, width: int, y: int = 0):
        self.x, self.width, self.y = x, width, y

    def next(self, height: int) -> tuple[list[int], list[int]]:
        at = [self.x, self.y], [self.width, height]
        self.y += height + GAP
        return at


class Graph:
    def __init__(self, name: str, first: int = 1):
        self.name, self.nodes, self.links, self.groups = name, [], [], []
        self.first, self.boxes = first, []

    def every_node(self) -> list[dict]:
        """Nodes, those inside of boxes too."""
        return self.nodes + [node for box in self.boxes for node in box.nodes]

    def add(self, kind, at, values=(), title=None, models=(), mode=0, **sources) -> dict:
        """A node; `at` is (position, size), each keyword a socket and the output that feeds it.

        A model is its address, with the folder it belongs in where the address does not say so.
        """
        sockets, widgets, outputs = (pairs(text) for text in NODES[kind])
        properties = {}
        if kind != "MarkdownNote":
            pack = "adaspa" if kind.startswith("AdaSpa") else "comfy-core"
            properties = {"cnr_id": pack, "ver": VERSIONS[pack], "Node name for S&R": kind}
        if models:
            properties["models"] = [
                {"name": name_of(model), "url": address(model), "directory": folder(model)}
                for model in models
            ]
        node = {
            "id": self.first + len(self.nodes),
            "type": kind,
            "pos": at[0],
            "size": at[1],
            "flags": {},
            "order": len(self.nodes),
            "mode": mode,
            "inputs": [
                {"name": n, "type": t.rstrip("?"), "link": None}
                | ({"shape": 7} if t.endswith("?") else {})
                for n, t in sockets
            ]
            + [{"name": n, "type": t, "widget": {"name": n}, "link": None} for n, t in widgets],
            "outputs": [{"name": n, "type": t, "links": []} for n, t in outputs],
            "properties": properties,
            "widgets_values": list(values),
        }
        if title:
            node["title"] = title
        node |= COLORS.get(kind, {})
        return self._put(node, sources)

    def _put(self, node: dict, sources: dict) -> dict:
        self.nodes.append(node)
        for name, (source, output) in sources.items():
            self.link(source, output, node, name)
        return node

    def box(self, inner: "Subgraph", at, **sources) -> dict:
        """A subgraph as one node."""
        self.boxes.append(inner)
        outside = ("name", "type")
        node = {
            "id": self.first + len(self.nodes),
            "type": inner.id,
            "title": inner.name,
            "pos": at[0],
            "size": at[1],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [
                {key: slot[key] for key in outside} | {"link": None}
                for slot in inner.entry["outputs"]
            ],
            "outputs": [
                {key: slot[key] for key in outside} | {"links": []} for slot in inner.exit["inputs"]
            ],
            "properties": {
                "proxyWidgets": inner.shown, "cnr_id": "adaspa", "ver": VERSIONS["adaspa"],
            },
            "widgets_values": [],
            **COLORS["AdaSpaAttention"],
        }  # fmt: skip
        return self._put(node, sources)

    def link(self, source: dict, output: str, target: dict, name: str) -> None:
        from_slot = [out["name"] for out in source["outputs"]].index(output)
        to_slot = [slot["name"] for slot in target["inputs"]].index(name)
        out, slot = source["outputs"][from_slot], target["inputs"][to_slot]
        slot["link"] = len(self.links) + 1
        out["links"].append(slot["link"])
        self.links.append(
            [slot["link"], source["id"], from_slot, target["id"], to_slot, out["type"]]
        )

    def group(self, title: str, nodes: list[dict], color: str = "#7d97a5") -> None:
        left = min(node["pos"][0] for node in nodes) - 40
        top = min(node["pos"][1] for node in nodes) - TITLE_HEIGHT - 60
        right = max(node["pos"][0] + node["size"][0] for node in nodes) + 40
        bottom = max(node["pos"][1] + node["size"][1] for node in nodes) + 40
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": [left, top, right - left, bottom - top],
                "color": color,
                "font_size": 24,
                "flags": {},
            }
        )

    def as_json(self) -> str:
        workflow = {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"adaspa/{self.name}")),
            "revision": 0,
            "last_node_id": max(node["id"] for node in self.every_node()),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.5, "offset": [640, 240]}},
            "version": 0.4,
        }
        if self.boxes:
            workflow["definitions"] = {"subgraphs": [box.definition() for box in self.boxes]}
        return json.dumps(workflow, indent=2, ensure_ascii=False) + "\n"


class Subgraph(Graph):
    """A graph that is one node of another; `entry` and `exit` stand for that node's sockets."""

    def __init__(self, name: str, description: str, first: int):
        super().__init__(name, first)
        self.id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"adaspa/subgraph/{name}"))
        self.description = description
        self.entry = {"id": -10, "outputs": []}
        self.exit = {"id": -20, "inputs": []}
        # widgets of inner nodes that the outer node shows
        self.shown = []

    def take(self, name: str, kind: str) -> tuple[dict, str]:
        """A socket at the left of the outer node, as a source for inner nodes."""
        self.entry["outputs"].append({"name": name, "type": kind, "links": []})
        return self.entry, name

    def give(self, source: dict, output: str) -> None:
        """A socket at the right of the outer node."""
        kind = next(out["type"] for out in source["outputs"] if out["name"] == output)
        self.exit["inputs"].append({"name": output, "type": kind, "link": None})
        self.link(source, output, self.exit, output)

    def show(self, node: dict, *widgets: str) -> None:
        self.shown += [[str(node["id"]), widget] for widget in widgets]

    def definition(self) -> dict:
        left = min(node["pos"][0] for node in self.nodes) - 260
        right = max(node["pos"][0] + node["size"][0] for node in self.nodes) + 140
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        return {
            "id": self.id,
            "version": 1,
            "state": {
                "lastGroupId": len(self.groups),
                "lastNodeId": max(node["id"] for node in self.nodes),
                "lastLinkId": len(self.links),
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": self.name,
            "inputNode": {"id": -10, "bounding": [left, 0, 120, 100]},
            "outputNode": {"id": -20, "bounding": [right, 0, 120, 100]},
            "inputs": [self._socket("in", slot, slot["links"]) for slot in self.entry["outputs"]],
            "outputs": [self._socket("out", slot, [slot["link"]]) for slot in self.exit["inputs"]],
            "widgets": [],
            "nodes": self.nodes,
            "groups": self.groups,
            "links": [dict(zip(keys, link, strict=True)) for link in self.links],
            "extra": {},
            "category": "AdaSpa",
            "description": self.description,
        }

    def _socket(self, side: str, slot: dict, links: list[int]) -> dict:
        name = f"adaspa/subgraph/{self.name}/{side}/{slot['name']}"
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
            "name": slot["name"],
            "type": slot["type"],
            "linkIds": links,
        }
