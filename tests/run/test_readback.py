"""What is read at a step's end, as on a GPU, where NaN is known only then."""

import pytest
import torch

from sparse_attn.run.readback import Readback
from sparse_attn.run.serving import NOT_A_NUMBER
from tests.run.fakes import Run, call_of, tensors

NAN = float("nan")


@pytest.fixture
def read_later(monkeypatch):
    """Let runs look for NaN as they do on a GPU: at the step's end."""

    monkeypatch.setattr("sparse_attn.run.serving.waits", lambda device: True)


@pytest.mark.parametrize(
    "place, bad", [(0, NAN), (1, NAN), (2, NAN), (2, float("inf"))], ids=["q", "k", "v", "v inf"]
)
def test_a_layer_that_met_nan_runs_dense_after_the_step_and_its_mask_does_not_count(
    read_later, place, bad
):
    run, broken = Run("Sss", first=7), tensors()
    broken[place][0, 1, 100, 3] = bad
    run.attend(0, broken)
    run.attend(0, key="other", layer=1)
    run.state.end_step()
    statistics = run.statistics
    assert [*statistics.patterns] == [(1, "positive")]
    assert run.layer().dense_reason == NOT_A_NUMBER and run.pattern() is None
    assert statistics.warnings == [f"{NOT_A_NUMBER}: the layers concerned run dense after step 8"]
    assert run.attend(1)[1] == ["host"] and run.attend(1, key="other")[1] == ["sparse"]
    assert statistics.kept_dense == {NOT_A_NUMBER: 1}


def test_a_pattern_that_was_used_stays_when_a_later_step_meets_nan(read_later):
    run, broken = Run("Sss"), tensors()
    broken[2][0, 1, 100, 3] = float("nan")
    for step, qkv in enumerate((tensors(), broken)):
        run.attend(step, qkv)
        run.state.end_step()
    assert run.layer().dense_reason == NOT_A_NUMBER and len(run.statistics.patterns) == 1


@pytest.mark.parametrize("recall", [float("nan"), float("inf"), -0.1, 1.1])
def test_a_recall_that_is_no_share_marks_the_layer(recall):
    run = Run("Ss")
    run.attend(0)
    run.state.end_step()
    readback, call, layer = Readback(run.statistics), call_of(tensors(), 1), run.layer()
    readback.add_sample(call, layer, torch.tensor([0.5, recall]))
    assert readback.read() == [((1, 0, "positive"), layer)] and not run.statistics.patterns.samples
    assert readback.read() == []
