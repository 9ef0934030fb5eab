"""A run that was asked for a recall: every search measures exactly, and samples follow."""

import pytest
from close import mass_rounding

from tests.method import truth
from tests.run.fakes import BLOCKS, SCALE, Backend, Run, tensors


@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
def test_every_search_for_a_recall_measures_exactly(one_pass):
    run = Run("DSsSs", Backend(one_pass), recall=0.8)
    assert not run.attends(0)
    did = [run.attend(step, tensors(step))[1] for step in range(1, 5)]
    assert did == [["dense", "masses"], ["sparse"], ["dense", "masses"], ["sparse"]]
    run.state.end_step()
    statistics = run.statistics
    (pattern,) = statistics.patterns.values()
    assert pattern.exact and pattern.step == 3
    q, k, _ = tensors(3)
    keep = run.pattern().mask.to_dense()
    exact = truth.recall(q.double(), k.double(), keep, **BLOCKS)[0]
    assert (exact >= 0.8 - 2 * mass_rounding(q, k, SCALE)).all()
    assert pattern.recall == pytest.approx(exact.tolist(), abs=1e-5)
    assert statistics.memory.held_bytes == run.pattern().mask.bits.nbytes, (
        "no LSE waits for a search"
    )


def test_what_the_mask_still_holds_is_sampled_before_the_next_search():
    run = Run("SssSss", first=4, recall=0.8)
    for step in range(6):
        run.attend(step, tensors(step))
        if step == 2:
            run.attend(step, tensors(step))
            run.state.end_step()
            first = dict(run.statistics.patterns.samples)
    run.state.end_step()
    statistics = run.statistics
    assert statistics.timing.sample and len(statistics.timing.sample) == 2
    ((key, (step, held)),) = first.items()
    assert (key, step) == ((0, "positive"), 6)
    (step, held) = statistics.patterns.samples[key]
    assert step == 9
    q, k, _ = tensors(5)
    keep = run.pattern().mask.to_dense()
    exact = truth.recall(q.double(), k.double(), keep, **BLOCKS)[0]
    # 64 of 640 rows
    assert held == pytest.approx(exact.tolist(), abs=0.05)
    (line,) = [line for line in statistics.lines() if line.startswith("Recall asked for")]
    found = statistics.patterns[key].recall
    assert line == (
        f"Recall asked for: 0.8; the searches found {min(found):.3f} to {max(found):.3f} by head; "
        f"in step 10 {sum(held) / 2:.2f} is left, worst head {min(held):.2f} (sampled)"
    )


def test_nothing_is_sampled_unasked():
    run = Run("Sss")
    for step in range(3):
        run.attend(step)
    run.state.end_step()
    statistics = run.statistics
    assert statistics.patterns.samples == {} and statistics.timing.sample == []
    assert not any(line.startswith("Recall asked for") for line in statistics.lines())
