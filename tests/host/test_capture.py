"""Under a CUDA graph's capture every call runs dense, through whoever served before."""

import pytest
import torch

from sparse_attn.host import model_call
from sparse_attn.host.model_call import CAPTURED
from tests.host.host_fixtures import assert_same_video, calls, kept_dense, sample, sparse
from tests.host.test_overrides import Override, with_override


@pytest.fixture
def capture(monkeypatch):
    """Say that a graph is being captured, in the whole model call or inside it alone."""

    def begin(whole):
        monkeypatch.setattr(model_call, "captured", lambda device: True)
        if whole:
            monkeypatch.setattr("sparse_attn.host.install.captured", lambda device: True)

    return begin


@pytest.mark.parametrize("whole", [True, False], ids=["model call", "attention call"])
def test_a_captured_call_runs_dense_on_the_previous_override_and_says_so_once(load, capture, whole):
    other = Override()
    model, handle = sparse(with_override(load("wan_h64"), other))
    capture(whole)
    assert_same_video(sample(model), sample(load("wan_h64")), 1e-6)
    assert calls(handle) == {}
    # 4 steps, 2 prompts of their own length, 2 layers; cross-attention as often
    assert other.count(288, 288) == 16 and len(other.calls) == 32
    assert kept_dense(handle)[CAPTURED] == (32 if whole else 16)
    lines = handle.latest().lines()
    count = kept_dense(handle)[CAPTURED]
    assert lines.count(f"Kept dense: {count} calls, {CAPTURED}") == 1
    assert "Every call ran dense: " in handle.latest().summary()


def test_a_run_goes_on_sparse_after_a_capture(load, capture, monkeypatch):
    model, handle = sparse(load("wan_h64"))

    def between_steps(number, *args):
        monkeypatch.setattr(model_call, "captured", lambda device: number == 0)

    sample(model, callback=between_steps)
    # step 1 searches, 1 is captured
    assert calls(handle) == {"search": 4, "sparse": 8}
    assert kept_dense(handle)[CAPTURED] == 4


def test_no_cpu_captures():
    assert not model_call.captured(torch.device("cpu"))
