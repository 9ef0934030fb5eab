"""What the demo draws and says of its two runs."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from drawings import AMPLIFIED, COLOURS, GAP, HEAD, kinds, race, side_by_side, timelines
from run_demo import from_to, recorded_on_a_gpu, table

NUMBERS = {
    "preset": "Balanced",
    "sampler_steps": 4,
    "dense_seconds": 8.0,
    "dense_step_seconds": 2.0,
    "adaspa_seconds": 5.0,
    "dense_processor_seconds": 12.0,
    "adaspa_processor_seconds": 8.0,
    "load": 0.5,
    "psnr_db": 40.0,
    "steps": "steps 0 dense, 1 search, 2-3 sparse",
    "step_seconds": {"dense": 2.0, "search": 1.5, "sparse": 0.5},
    "dense_call_seconds": 0.5,
    "sparse_call_seconds": 0.1,
    "density": 0.2,
    "recall": 0.9,
}
LEFT = np.full((20, 120, 3), 100, np.uint8)
RIGHT = np.full((20, 120, 3), 103, np.uint8)


@pytest.mark.parametrize("text", ["0", "10001", "x"])
def test_what_the_sampler_refuses_is_refused_before_it_starts(text):
    assert from_to(1, 10_000)("20") == 20
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        from_to(1, 10_000)(text)


def test_each_run_of_the_race_takes_its_own_time():
    assert kinds(NUMBERS["steps"]) == ["dense", "search", "sparse", "sparse"]
    dense, sparse = timelines(NUMBERS)
    assert [end for end, _ in dense] == [2, 4, 6, 8]
    # its own steps, stretched to the 5 s that the prompt took
    assert np.allclose([end for end, _ in sparse], [5 * x / 4.5 for x in (2, 3.5, 4, 4.5)])
    pages, pause = race(LEFT, RIGHT, NUMBERS)
    at = {seconds: pages[int(seconds * 1000 / pause)] for seconds in (0, 4.5, 5.5, 9)}
    places = ((60, HEAD + 10), (120 + GAP + 60, HEAD + 10))
    seen = {now: [page.getpixel(place)[0] for place in places] for now, page in at.items()}
    assert seen == {0: [255, 255], 4.5: [255, 255], 5.5: [255, 103], 9: [100, 103]}
    # two of four steps are over, and the bar says which they were
    assert at[4.5].getpixel((10, 46)) == COLOURS["dense"]
    assert at[4.5].getpixel((120 + GAP + 40, 46)) == COLOURS["search"]
    assert at[4.5].getpixel((100, 46)) == (255, 255, 255)


def test_the_third_panel_shows_the_difference():
    page = side_by_side(LEFT, RIGHT, NUMBERS)
    assert page.getpixel((2 * (120 + GAP) + 60, HEAD + 10)) == (3 * AMPLIFIED,) * 3


def test_the_table_names_both_speed_ups():
    text = table(NUMBERS)
    assert "| 2.00 s | 0.50 s (4.0x) |" in text and "| 8.0 s | 5.0 s (1.6x) |" in text
    processor = "| its processor time (load 0.5 a core) | 12.0 s | 8.0 s (1.5x) |"
    assert (processor in text) is not torch.cuda.is_available()


def test_the_gpu_figures_name_card_and_source():
    text = recorded_on_a_gpu()
    assert "| Wan 2.2 14B, 1280x720, 81 frames | 0.57 s | 0.27 s | 2.2x |" in text
    assert text.endswith("NVIDIA H200; source: tests/bench/results/families_h200.json")
