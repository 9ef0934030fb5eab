"""What the pages say of memory is what was recorded, or what the pack computes before a run."""

import json
from pathlib import Path

import pytest

from sparse_attn.config import PRESETS
from sparse_attn.run.estimate import Workload, cache_size
from sparse_attn.schedule import plan
from sparse_attn.token_layout import TokenLayout

BENCH = Path(__file__).resolve().parents[1] / "bench"
RECORDED = json.loads((BENCH / "results" / "memory_h200.json").read_text())
GIB = 2**30
README, CARDS = ((BENCH / page).read_text(encoding="utf-8") for page in ("README.md", "cards.md"))
# latent frames of 45 x 80 tokens, and 256 of text
LENGTHS = {"5 s": 33, "10 s": 63, "16 s": 97, "24 s": 145}
# first cell of a row of "What fits": length or shape of its measurements, layout, heads, layers
FITS = {
    "Wan 2.2 5B": ("Wan 5B", TokenLayout(0, 31, 22, 40), 24, 30),
    "Wan 2.2 14B": ("Wan 14B", TokenLayout(0, 21, 45, 80), 40, 40),
    "HunyuanVideo, 720p, 129": ("5 s", TokenLayout(0, 33, 45, 80, 240), 24, 60),
    "HunyuanVideo, 720p, 24 s": ("24 s", TokenLayout(0, 145, 45, 80, 256), 24, 60),
}
# bits of a weight
BITS = {"bf16": 16, "FP8": 8, "Q8_0": 8.5, "Q4_0": 4.5}


def held_by(layout, heads, layers):
    """GiB of mask, LSE and order of a run of Balanced in 20 steps."""
    config = PRESETS["Balanced"]
    sigmas = [1 - i / 20 for i in range(21)]
    work = Workload(layout, layers, layers, 1, heads)
    size = cache_size(work, plan(sigmas, lambda sigma: 1 - sigma, config), config, one_pass=True)
    return [n / GIB for n in (size.mask_bytes, size.lse_bytes, size.order_bytes)]


def measured(setting, length, step):
    """GiB beside q, k, v and output, in every recorded run of that kind."""
    return [
        row["work_gib"]
        for command in RECORDED["growth"] for run in command["runs"] for row in run["steps"]
        if (run["setting"], run["length"], row["step"]) == (setting, length, step)
    ]  # fmt: skip


def rows_of(text, first):
    """The cells of every row of a table that follow the first one, by that."""
    start = text.index(first)
    lines = text[start:].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_memory_by_length_is_as_recorded():
    table = rows_of(README, "| GiB beside q, k, v and output |")
    rows = {
        "search": [("tail 64x64", "search")],
        "sparse, tail / none": [("tail 64x64", "sparse"), ("none 64x64", "sparse")],
        "sparse, tail, `int8`": [("tail 64x64 int8", "sparse")],
        "later search and its sparse call / `int8`": [
            ("tail 64x64", "search again, and sparse"),
            ("tail 64x64 int8", "search again, and sparse"),
        ],
    }
    for name, asked in rows.items():
        for length, cell in zip(LENGTHS, table[name], strict=True):
            said = cell.split(" / ") if len(asked) > 1 else [cell]
            for (setting, step), figure in zip(asked, said, strict=True):
                found = measured(setting, length, step)
                # halves go up
                figures = [f"{x + 1e-6:.2f}" for x in found]
                assert figure in (figures or ["not run"]), (name, length)
    layouts = [TokenLayout(0, frames, 45, 80, 256) for frames in LENGTHS.values()]
    parts = [held_by(layout, 24, 60) for layout in layouts]
    for length, figure, sizes in zip(LENGTHS, table["held, 60 layers"], parts, strict=True):
        (held,) = {
            row["gib"]
            for command in RECORDED["growth"] for run in command["runs"] for row in run["steps"]
            if (run["setting"], run["length"]) == ("tail 64x64", length) and "gib" in row
        }  # fmt: skip
        assert figure == f"{60 * held:.2f}" and 60 * held == pytest.approx(sum(sizes), abs=0.01)
    words = [
        f"{length} " + " + ".join(f"{x:.1f}" for x in sizes)
        for length, sizes in zip(LENGTHS, parts, strict=True)
    ]
    assert ", ".join(words) in " ".join(README.split())


@pytest.mark.parametrize("name", FITS)
def test_what_attention_needs_is_as_computed_and_recorded(name):
    shape, layout, heads, layers = FITS[name]
    (cells,) = [
        rest for first, rest in rows_of(CARDS, "| | q, k, v and output |").items()
        if first.startswith(name)
    ]  # fmt: skip
    ours = 4 * layout.tokens * heads * 128 * 2 / GIB
    found = measured("tail 64x64", shape, "search") + measured("tail 64x64", shape, "sparse")
    call, held = max(found), sum(held_by(layout, heads, layers))
    figures = [float(cell.split(",")[0]) for cell in cells]
    assert figures == [round(x, 1) for x in (ours, call, held, ours + call + held)]


def test_what_fits_follows_from_peak_held_and_weights():
    peaks = {
        model: max(
            max(row["above"])
            for command in RECORDED["peaks"] for row in command["rows"]
            if (row["model"], row["layers"]) == (model, "4")
        )
        for model in ("wan", "hunyuan")
    }  # fmt: skip
    assert f"{peaks['wan']:.1f} GiB at Wan 14B and {peaks['hunyuan']:.1f} at Hunyuan" in CARDS
    table = rows_of(CARDS, "| memory of the card")
    needs = [
        # parameters in 10^9; what weights cannot have
        (5, 4 * 27_280 * 24 * 128 * 2 / GIB + 0.7 + sum(held_by(*FITS["Wan 2.2 5B"][1:]))),
        (14, peaks["wan"] + sum(held_by(*FITS["Wan 2.2 14B"][1:]))),
        (13, peaks["hunyuan"] + sum(held_by(*FITS["HunyuanVideo, 720p, 129"][1:]))),
    ]
    for column, (billions, taken) in enumerate(needs):
        weights = {kind: billions * 1e9 * bits / 8 / GIB for kind, bits in BITS.items()}
        assert ", ".join(f"{x:.1f}" for x in list(weights.values())[:3]) in " ".join(
            CARDS[CARDS.index("| memory of the card") :].split()
        )
        for memory in (8, 12, 16, 24):
            said = table[f"{memory} GB"][column]
            left = memory - taken
            whole = {kind for kind, size in weights.items() if size <= left}
            if len(whole) == len(BITS):
                assert said.startswith("all whole"), (memory, said)
            elif whole:
                rest = BITS.keys() - whole
                named = "all but" in said or all(kind in said for kind in whole)
                assert named and "whole" in said and not said.startswith("all whole"), (said, rest)
            elif left > 0:
                assert said.startswith(f"all offloaded, {left:.1f} left"), (memory, said, left)
            else:
                assert "does not fit" in said or "with **cache** `cpu`" in said, (memory, said)
