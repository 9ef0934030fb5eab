"""The tables that people read first have the figures that were recorded."""

import json
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
PAGE = (BENCH / "README.md").read_text(encoding="utf-8")
OURS = ("0.2", "0.1", "0.05")
# label of a row -> names in the record, in the order of its figures
ATTENTION = {
    "dense, torch's flash (ComfyUI's default there)": ["torch flash"],
    "dense, torch's cuDNN": ["torch cuDNN"],
    "dense with the search inside, ours": ["ours, dense, with LSE and masses"],
    "a later search from a kept LSE, ours": ["ours, masses from cached LSE"],
    "density 0.2: comfy-kitchen `sol_attn` (ComfyUI's own sparse node)": [
        "comfy-kitchen sol_attn top-k at 0.2"
    ],
    "density 0.2: FlexAttention, blocks of 128": ["FlexAttention 128x128 at 0.2"],
    "density 0.2, ours, blocks of 64": ["ours, sparse 64x64 at 0.2"],
    "density 0.2, ours, 128 queries x 64 keys (block_size `128x64`)": [
        "ours, sparse 128x64 at 0.2"
    ],
    "density 0.1 / 0.05, ours, blocks of 64": [f"ours, sparse 64x64 at {x}" for x in OURS[1:]],
    "density 0.1 / 0.05, ours, `128x64`": [f"ours, sparse 128x64 at {x}" for x in OURS[1:]],
    "density 0.1 / 0.05, `sol_attn`": [f"comfy-kitchen sol_attn top-k at {x}" for x in OURS[1:]],
    "precision `int8`, density 0.2 / 0.1 / 0.05, ours, `128x64`": [
        f"ours, int8 sparse 128x64 at {x}" for x in OURS
    ],
    "precision `int8`, density 0.2 / 0.1 / 0.05, ours, blocks of 64": [
        f"ours, int8 sparse 64x64 at {x}" for x in OURS
    ],
    "dense in `int8`, ours": ["ours, int8 dense, quantisation included"],
}


def recorded(name):
    return json.loads((BENCH / "results" / f"{name}.json").read_text())


def rows_below(header):
    """The cells of a table's rows, without bold, by the first of them."""
    lines = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    rows = ([x.strip() for x in line.strip("|").split("|")] for line in lines)
    return {first.replace("**", ""): [x.replace("**", "") for x in rest] for first, *rest in rows}


def assert_told(cell, values):
    """Fail unless a cell has the values, each in as many digits as it shows."""
    for figure, value in zip(cell.rstrip("x").split(" / "), values, strict=True):
        figure = figure.rstrip("x")
        digits = len(figure.partition(".")[2])
        assert abs(float(figure) - value) <= 0.5 * 10**-digits + 1e-9, (cell, values)


@pytest.mark.parametrize("label", ATTENTION)
def test_one_attention_call_takes_what_was_recorded(label):
    shape = recorded("attention_h200")["shapes"]["hunyuan-720p-129f"]
    rows = {row["name"]: row for row in shape["rows"]}
    milliseconds, gain = rows_below("| attention | ms | over cuDNN dense |")[label]
    found = [rows[name] for name in ATTENTION[label]]
    assert_told(milliseconds, [row["ms"] for row in found])
    if gain:
        assert_told(gain, [rows["torch cuDNN"]["ms"] / row["ms"] for row in found])


def test_the_table_of_attention_has_no_other_row_but_one_of_another_record():
    others = rows_below("| attention | ms | over cuDNN dense |").keys() - ATTENTION.keys()
    assert others == {"the same with precision `int8`, quantisation included"}


@pytest.mark.parametrize(
    "stack", recorded("families_h200")["stacks"].values(), ids=lambda x: x["model"]
)
def test_steps_of_families_take_what_was_recorded(stack):
    rows = {
        size: rest for size, *rest in rows_below("| model and video | tokens, heads |").values()
    }
    default, dense, *sparse = rows[f"{stack['tokens']:,}, {stack['heads']} x {stack['head_dim']}"]
    seconds = stack["seconds"]
    assert_told(default, [seconds["host_default"]])
    assert_told(dense, [seconds["dense"]])
    for density, cell in zip(OURS[:2], sparse, strict=True):
        took, gain = cell.split(", ")
        assert_told(took, [seconds[f"sparse_{density}"]])
        assert_told(gain, [seconds["dense"] / seconds[f"sparse_{density}"]])
