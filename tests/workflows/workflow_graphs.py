"""The graphs in workflows/. `python tests/workflows/workflow_graphs.py` writes them.

Loaders, file names and sampler settings are the ones that ComfyUI's own templates use for these
models; a test compares the files with what this writes.
"""

from pathlib import Path

from tests.workflows import (
    workflow_cogvideox,
    workflow_ltx,
    workflow_minimax,
    workflow_silent,
    workflow_wan,
    workflow_wan_single,
)
from tests.workflows.workflow_builder import Graph

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"

FAMILIES = (
    workflow_wan,
    workflow_wan_single,
    workflow_silent,
    workflow_cogvideox,
    workflow_ltx,
    workflow_minimax,
)


def graphs() -> list[Graph]:
    return [graph for family in FAMILIES for graph in family.graphs()]


if __name__ == "__main__":
    for graph in graphs():
        (WORKFLOWS / f"{graph.name}.json").write_text(graph.as_json(), encoding="utf-8")
