"""A workflow with its subgraphs unfolded, which is what ComfyUI runs."""

ENTRY, EXIT = -10, -20


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
