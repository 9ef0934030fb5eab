"""What the notes in the stored graphs say is what the code does and what was measured."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from math import ceil
from types import SimpleNamespace

import pytest

from sparse_attn.config import AdaSpaConfig, from_preset
from sparse_attn.schedule import plan
from tests.workflows.stored_graphs import (
    FILES,
    ROOT,
    configs_of_runs,
    even,
    nodes_of,
    notes,
    read,
    runs,
    straight,
    unfold,
    values_of,
)

RESULTS = ROOT / "tests" / "bench" / "results"


@pytest.fixture(params=FILES)
def workflow(request):
    """A workflow as it runs, with subgraphs unfolded."""
    return unfold(read(FILES[request.param]))


def test_note_names_the_steps_that_the_schedule_gives(workflow):
    for config, (sigmas, progress) in zip(configs_of_runs(workflow), runs(workflow), strict=True):
        schedule = plan(sigmas, progress, config)
        assert schedule.describe().removeprefix("steps ") in notes(workflow)


@pytest.mark.parametrize(
    ("name", "steps", "config"),
    [
        ("MiniMax-H3 text to video", 6, from_preset("Balanced")),
        ("MiniMax-H3 image to video", 6, from_preset("Balanced")),
        (
            "Wan 2.1 VACE reference to video in 4 steps",
            4,
            replace(from_preset("Balanced"), warmup=0.25),
        ),
    ],
)
def test_advice_of_the_note_does_what_it_says(name, steps, config):
    workflow = read(FILES[name])
    described = plan(even(steps), straight, config).describe().removeprefix("steps ")
    if steps == 6:
        assert f"6 steps it becomes {described};" in notes(workflow)
    else:
        assert described == "1 dense, 2 search, 3-4 sparse"
        assert not plan(even(steps), straight, config).sparse_search
        said = f"*warmup* {config.warmup}, with which the search step runs in full too"
        assert said in notes(workflow)


# edge of a token in pixels, latent frames of a length, distance between lengths
FOURS = (16, lambda length: (length - 1) // 4 + 1, 4)
SEVENTEENS = (32, lambda length: (length - 5) // 17 * 5 + 2, 17)
SIZES = {
    "VOIDInpaintConditioning": (16, lambda length: ((length - 1) // 4 + 1) // 2, 8),
    "EmptyHunyuanLatentVideo": FOURS,
    "EmptyHunyuanVideo15Latent": FOURS,
    "EmptyLTXVLatentVideo": (32, lambda length: (length - 1) // 8 + 1, 8),
    "HunyuanVideo15ImageToVideo": FOURS,
    "Kandinsky5ImageToVideo": FOURS,
    "MiniMaxH3ImageToVideo": SEVENTEENS,
    "MiniMaxH3ReferenceToVideo": SEVENTEENS,
    "Wan22ImageToVideoLatent": (32, *FOURS[1:]),
    "WanAnimate2ToVideo": FOURS,
    "WanFirstLastFrameToVideo": FOURS,
    "WanImageToVideo": FOURS,
    "WanSCAILToVideo": FOURS,
    "WanVaceToVideo": (16, lambda length: (length - 1) // 4 + 2, 4),
}


def sizes(workflow):
    """(width, height, length, rule) of every video that is sampled."""
    (node,) = nodes_of(workflow, *SIZES)
    width, height, length = (values_of(node)[name] for name in ("width", "height", "length"))
    for window in nodes_of(workflow, "WanContextWindowsManual"):
        length = values_of(window)["context_length"]
    yield width, height, length, SIZES[node["type"]]
    if nodes_of(workflow, "LTXVLatentUpsampler"):
        yield 2 * width, 2 * height, length, SIZES[node["type"]]


def test_note_counts_the_tokens_of_this_video(workflow):
    for width, height, length, (pixels, frames, step) in sizes(workflow):
        plane = (width // pixels) * (height // pixels)
        assert width % pixels == height % pixels == 0
        assert f"{plane * frames(length):,} tokens" in notes(workflow)
        assert plane * frames(length) > AdaSpaConfig().min_tokens
        assert f"{AdaSpaConfig().min_tokens:,} tokens" in notes(workflow)
        lengths = range(length % step or step, length + 1, step)
        begins = next(n for n in lengths if plane * frames(n) >= AdaSpaConfig().min_tokens)
        assert f"At {width} x {height} that is passed from {begins} frames on" in notes(workflow)


def test_note_says_what_was_measured(workflow):
    results = json.loads((RESULTS / "families_h200.json").read_text("utf-8"))
    stacks = results["stacks"].values()
    named = [stack for stack in stacks if f" layers of {stack['model']} at " in notes(workflow)]
    (stack,) = named
    said = (
        f"at {stack['tokens']:,} tokens ({stack['video']}) took {stack['seconds']['dense']:.2f} s"
    )
    assert said in notes(workflow)
    assert f"and {stack['seconds']['sparse_0.2']:.2f} s in a sparse one" in notes(workflow)
    assert stack["hardware"] in notes(workflow) and not stack["errors"]


def test_notes_of_wan_14b_say_what_the_smaller_size_gains():
    results = json.loads((RESULTS / "runs_480_h200.json").read_text("utf-8"))
    rows = {row["name"]: row for row in results["rows"]}
    ours, host = rows["Balanced, int8"], rows["ComfyUI's default"]
    assert (ours["steps"], ours["layers"], ours["tokens"]) == (20, 4, 32760)
    assert [host[key] for key in ("steps", "layers", "tokens")] == [20, 4, 32760]
    said = (
        f"on an {results['hardware']}, {ours['steps']} steps of {ours['layers']} of the model's 40 "
        f"layers took {host['seconds']:.1f} s by ComfyUI's default and {ours['seconds']:.1f} s with "
        "*precision* int8."
    )
    told = [name for name in FILES if "At 832 x 480" in notes(read(FILES[name]))]
    large = [name for name in told if "32,760 tokens: it needs less" in notes(read(FILES[name]))]
    assert len(large) == 4 and all(said in notes(read(FILES[name])) for name in large)


@pytest.mark.parametrize(
    ("name", "sized", "reference"),
    [
        ("Wan 2.2 14B long video", "EmptyHunyuanLatentVideo", 0),
        ("Wan Animate 2 move a character", "WanAnimate2ToVideo", 1),
    ],
)
def test_long_video_is_cut_into_the_windows_that_the_note_counts(comfyui, name, sized, reference):
    """The reference picture is one more latent frame, before the video's."""
    from comfy.context_windows import ContextSchedules, get_matching_context_schedule

    workflow = read(FILES[name])
    set_to, *others = (values_of(n) for n in nodes_of(workflow, "WanContextWindowsManual"))
    assert all(other == set_to for other in others)
    # windows that moved would need a search at every step
    assert set_to["context_schedule"] == ContextSchedules.STATIC_STANDARD
    (size,) = nodes_of(workflow, sized)
    length = values_of(size)["length"]
    handler = SimpleNamespace(
        context_length=(set_to["context_length"] - 1) // 4 + 1,
        context_overlap=set_to["context_overlap"] // 4,
    )
    schedule = get_matching_context_schedule(set_to["context_schedule"])
    windows = schedule.func((length - 1) // 4 + 1 + reference, handler, {})
    starts = [window[0] for window in windows]
    # evenly, so that no two overlap more than they say
    assert len({b - a for a, b in pairwise(starts)}) == 1
    assert f"{length} frames long" in notes(workflow)
    assert f"{len(windows)} windows of {set_to['context_length']} frames" in notes(workflow)
    assert f"by {set_to['context_overlap']};" in notes(workflow)
    assert length > 2 * set_to["context_length"]


def test_adaspa_begins_where_the_motion_no_longer_steers():
    """While it does, Wan Animate 2 runs in full: steps planned as sparse would not be."""
    workflow = read(FILES["Wan Animate 2 move a character"])
    values = {node["type"]: values_of(node) for node in workflow["nodes"] if node["inputs"]}
    steps = values["KSampler"]["steps"]
    ends = values["WanAnimate2ToVideo"]["pose_end_percent"]
    begins = values["AdaSpaAttention"]["start_percent"]
    # the first step of each, and none in which the motion lets go and still steers
    assert ceil(ends * steps) == ceil(begins * steps) and (ends * steps) % 1
    said = f"for {ends:.0%} of the steps here".replace("%", " %")
    assert said in notes(workflow) and f"begins at {begins * 100:.0f} %" in notes(workflow)


def test_prompts_avoid_what_a_note_cannot_show(workflow):
    for node in nodes_of(workflow, "MarkdownNote"):
        text = node["widgets_values"][0]
        # a single line break inside a paragraph would be shown as one
        assert not re.search(r"[^\n\-]\n[^\n\-#]", text), text
        # the interface would take it for markup and leave it out
        assert not re.search(r"(?<!`)<\w", text), text
