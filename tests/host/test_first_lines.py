"""What the node shows before a run and during its first steps."""

import re

import pytest

from tests.host.host_fixtures import assert_same_video, kept_dense, sample, sparse

pytestmark = pytest.mark.any_comfyui


@pytest.fixture
def said(monkeypatch):
    """What the node shows: (lines, done)."""
    from sparse_attn.host import status

    found = []
    monkeypatch.setattr(
        status, "send", lambda node, statistics, said, step, done: found.append((said, done))
    )
    return found


def test_the_first_line_says_what_to_expect(load, said):
    model, handle = sparse(load("wan_h64"), warmup=0.25)
    sample(model)
    assert [done for _, done in said] == [False] * 4 + [True]
    progress, *expected = said[0][0]
    assert progress == "Step 1 of 4: dense."
    # plain torch searches in a pass and a half; 2 of 5 blocks and one of averages in two steps
    assert "288 tokens. Skips 7% of the video's attention, counted in blocks." in expected
    assert handle.latest().as_dict()["expected"] == " ".join(expected)
    # seconds, once a dense step was timed
    assert re.fullmatch(r"About .* s in all; about .* s without AdaSpa\.", said[1][0][-1])


def test_a_short_video_is_told_to_leave_it_off(load, said):
    model, handle = sparse(load("wan_h64"), min_tokens=8192)
    sample(model)
    assert said[0][0][1] == ("too short: 288 tokens, and `min_tokens` is 8,192: leave AdaSpa off.")
    assert len(said) == 5 and kept_dense(handle)


def test_a_model_without_a_layout_still_shows_its_steps(load, said, monkeypatch):
    from sparse_attn.host import install

    monkeypatch.setattr(install, "_layout", lambda *args: (None, "no rule"))
    model, _ = sparse(load("wan_h64"))
    assert_same_video(sample(model), sample(load("wan_h64")), 1e-6)
    assert [lines[0] for lines, _ in said[:4]] == [
        "Step 1 of 4: search.", *(f"Step {n} of 4: sparse." for n in (2, 3, 4)),
    ]  # fmt: skip
