"""The picture of a run, without ComfyUI."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import torch

from sparse_attn.config import AdaSpaConfig
from sparse_attn.run.statistics import Pattern, RunStatistics
from tests.run.fakes import schedule

FILE = Path(__file__).parents[2] / "nodes" / "report_picture.py"
SPEC = spec_from_file_location("report_picture", FILE)
picture = module_from_spec(SPEC)
SPEC.loader.exec_module(picture)


def panel_of(densities):
    """The pixels where the densities of two layers with two heads stand."""
    statistics = RunStatistics(AdaSpaConfig(), schedule("DSs"))
    blank = torch.zeros(2, 4, 4, dtype=torch.uint8)
    for layer, density in enumerate(densities):
        statistics.patterns[layer, "positive"] = Pattern(1, True, density, [0.8, 0.9], blank)
    image = np.asarray(picture.draw(statistics, 0, 0, ["a line"]))
    x = picture.MARGIN + picture.PANEL + picture.GAP
    return image[-picture.PANEL - 60 :, x : x + picture.PANEL]


def yellow(pixels):
    return (pixels == picture.RAMP[-1]).all(-1).mean()


def test_densities_that_are_one_number_are_no_square_of_one_colour():
    assert yellow(panel_of([[0.2, 0.2], [0.2, 0.205]])) == 0
    assert yellow(panel_of([[0.2, 0.1], [0.3, 0.2]])) > 0.1
