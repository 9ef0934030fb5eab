"""Rewrites the stored graphs after a change of our widgets or presets.

    COMFYUI_PATH=... python tests/workflows/rewrite_graphs.py

The files in workflows/ and subgraphs/ are edited in ComfyUI's interface, or by hand. What follows from the code is
written here: new widgets of our nodes get their default, those that a preset decides its values,
and notes the preset's percentages and the steps that it gives. All else stays as it is.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# run as a script, Python looks beside the script only
sys.path.insert(0, str(ROOT))

from sparse_attn.config import PRESETS, AdaSpaConfig  # noqa: E402
from sparse_attn.schedule import plan  # noqa: E402
from tests.workflows.stored_graphs import (  # noqa: E402
    FILES,
    TINY,
    configs_of_runs,
    even,
    levels,
    nodes_of,
    runs,
    straight,
    unfold,
    values_of,
)

STEPS = r"\d+(?:-\d+)? (?:dense|search|sparse)"
STEPS = rf"{STEPS}(?:, {STEPS})*"


def rewritten(text: str, schemas: dict) -> str:
    """Return the text of a graph's file, brought up to date.

    Args:
        schemas: of our nodes, by node id.
    """
    graph = json.loads(text)
    for level in levels(graph):
        for node in level["nodes"]:
            if node["type"] in schemas:
                set_widgets(node, schemas[node["type"]])
    for note in nodes_of(graph, "MarkdownNote"):
        (words,) = note["widgets_values"]
        note["widgets_values"] = [renewed(words, unfold(graph))]
    return json.dumps(graph, indent=2, ensure_ascii=False) + "\n"


def set_widgets(node: dict, schema) -> None:
    """Add the widgets that are missing, and set those that the node's preset decides."""
    values = values_of(node)
    widgets = {put.id: put for put in schema.inputs if hasattr(put, "default")}
    decided = {} if "preset" not in widgets else widgets["preset"].extra_dict["presets"]
    for name, put in widgets.items():
        if name not in values:
            slot = {"name": name, "type": put.get_io_type(), "widget": {"name": name}, "link": None}
            node["inputs"].append(slot)
            values[name] = put.default
    values |= decided.get(values.get("preset"), {})
    node["widgets_values"] = list(values.values())


def renewed(words: str, workflow: dict) -> str:
    """Bring up to date what a note says of presets and steps.

    Raises:
        ValueError: it speaks of the steps of more or fewer samplers than there are.
    """
    for preset, config in PRESETS.items():
        share = {"skips": config.sparsity, "keeps the first": config.warmup}
        for verb, value in share.items():
            words = re.sub(rf"(\*{preset}\* {verb}) \d+ %", rf"\g<1> {value * 100:.0f} %", words)
    if not re.search(rf"steps {STEPS}", words):
        return words
    described = _described(workflow)
    words = re.sub(rf"(?<=steps ){STEPS}", lambda _: next(described, "?"), words)
    if "steps ?" in words or next(described, None):
        raise ValueError(
            f"The graph has {len([*runs(workflow)])} samplers, and its note says {words!r}"
        )
    config = configs_of_runs(workflow)[0]
    return re.sub(
        rf"(\d+) steps it becomes {STEPS}",
        lambda found: (
            f"{found[1]} steps it becomes {_steps(even(int(found[1])), straight, config)}"
        ),
        words,
    )


def _described(workflow: dict) -> Iterator[str]:
    for config, (sigmas, progress) in zip(configs_of_runs(workflow), runs(workflow), strict=True):
        yield _steps(sigmas, progress, config)


def _steps(sigmas, progress, config: AdaSpaConfig) -> str:
    """Such as "0-1 dense, 2 search, 3-8 sparse"."""
    return plan(sigmas, progress, config).describe().removeprefix("steps ")


def main() -> None:
    from tests.tools import comfy_inprocess

    comfy_inprocess.start()
    nodes = comfy_inprocess.nodes_of(comfy_inprocess.load_pack())
    schemas = {name: node.GET_SCHEMA() for name, node in nodes.items()}
    for path in (*FILES.values(), TINY, *(ROOT / "subgraphs").glob("*.json")):
        path.write_text(rewritten(path.read_text("utf-8"), schemas), "utf-8", newline="\n")


if __name__ == "__main__":
    main()
