"""The graph that `run.py serve` offers for the tiny model."""

from tests.workflows.stored_graphs import TINY, by_id, read


def test_every_link_joins_sockets_of_one_type():
    workflow = read(TINY)
    nodes = by_id(workflow)
    assert {node["type"] for node in nodes.values()} >= {"AdaSpaAttention", "AdaSpaReport"}
    for link, origin, from_slot, target, to_slot, kind in workflow["links"]:
        out, slot = nodes[origin]["outputs"][from_slot], nodes[target]["inputs"][to_slot]
        assert link in out["links"] and slot["link"] == link
        assert out["type"] == slot["type"] == kind
