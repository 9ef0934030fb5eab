"""What is said of a run first: seconds beside dense ones, closeness, and what to do."""

import pytest
import torch

from sparse_attn.config import AdaSpaConfig
from sparse_attn.run.pace import Pace
from sparse_attn.run.statistics import Pattern, RunStatistics
from sparse_attn.run.timer import Timing
from sparse_attn.sentences import ENGLISH, Sentence, told
from tests.run.fakes import schedule


def a_run(took=46.0, recall=0.85, **config):
    """20 steps of one call: 2 dense of 3 s, a search of 4 s, 17 sparse of 1.5 s."""
    run = RunStatistics(AdaSpaConfig(**config), schedule("DDS" + 17 * "s"), finished=True)
    run.took, run.timing = took, Timing(dense=[3.0, 3.0], search=[4.0], sparse=17 * [1.5])
    blank = torch.zeros(1, 1, 1, dtype=torch.uint8)
    run.patterns[0, "positive"] = Pattern(2, True, [0.2], [recall], blank)
    return run


def test_a_verdict_has_the_seconds_and_what_they_would_have_been():
    # 18 calls of 3 s instead of one of 4 s and 17 of 1.5 s
    run = a_run()
    assert run.seconds_dense() == pytest.approx(46 + 54 - 4 - 25.5)
    assert " ".join(run.verdict()) == (
        "Sampling took 46 s; about 70 s without AdaSpa (1.5x). Very close to dense."
    )
    assert run.lines()[0] == " ".join(run.verdict()) and run.as_dict()["verdict"] == run.lines()[0]


def test_a_run_with_adaspa_off_counts_more_than_an_estimate():
    run = a_run()
    run.seconds_off = 92.0
    assert run.verdict()[0] == (
        "Sampling took 46 s; 92 s with AdaSpa off, same size and steps (2.0x)."
    )
    run.seconds_off = 40.0
    assert run.verdict()[0].startswith("Slower: sampling took 46 s; 40 s with AdaSpa off,")


def test_without_a_dense_step_the_next_best_is_said_for_what_it_is():
    run = a_run()
    run.timing = Timing(sparse=17 * [1.5])
    assert run.verdict()[:2] == [
        "Sampling took 46 s.", "No dense step was timed, so what AdaSpa saved is not known."
    ]  # fmt: skip
    run.timing = Timing(search=[4.0], search_dense=[3.0], sparse=17 * [1.5])
    assert run.verdict()[:2] == [
        "Sampling took 46 s.",
        "About 70 s without AdaSpa, by its searches' dense pass: no dense step was timed.",
    ]
    # of an earlier run, as one with AdaSpa off and other steps
    run.dense_step = 4.0
    assert run.verdict()[0] == "Sampling took 46 s; about 80 s without AdaSpa (1.7x)."
    run.entered = set(range(19))
    assert run.verdict()[1].code == "by_search", "a cache would have skipped a dense step, too"
    run.took = None
    assert run.verdict() == ["Very close to dense."]


def test_nothing_is_missed_where_no_call_was_sparse():
    run = RunStatistics(AdaSpaConfig(), schedule("DDDD"), took=46.0, finished=True)
    run.timing, run.dense_from, run.why_dense = Timing(dense=4 * [3.0]), 0, Sentence("pinned_dense")
    assert [said.code for said in run.verdict()] == ["took", "dense_all"]


def test_a_loss_says_why_and_what_to_do():
    run = a_run()
    run.timing.sparse = 17 * [4.0]
    first, why, _ = run.verdict()
    assert first == "Slower: sampling took 46 s; about 28 s without AdaSpa."
    assert why.startswith(
        "Too small: a sparse call takes 4.0 s, a dense one 3.0 s. Try a larger or"
    )
    run.timing = Timing(dense=[3.0], search=[9.0], sparse=[2.0])
    assert run.verdict()[1].startswith("Too few steps: searching cost more than")
    run.timing = Timing(dense=[3.0], search=[3.0], sparse=[3.0])
    assert run.verdict()[0] == "Sampling took 46 s, about as long as without AdaSpa."


@pytest.mark.parametrize(
    "recall, tail, code",
    [
        (0.81, "pooled", "very_close"),
        (0.70, "pooled", "close"),
        (0.69, "pooled", "may_differ"),
        (0.74, "none", "may_differ"),
        (0.9, "none", "not_judged"),
    ],
)
def test_closeness_has_words_where_the_lab_has_judged(recall, tail, code):
    assert a_run(recall=recall, tail=tail).verdict()[-1].code == code


def test_a_run_that_was_stopped_or_off_says_only_that():
    run = a_run()
    run.stopped_at = 6
    assert run.verdict() == ["Stopped at step 7 of 20."]
    run = RunStatistics(AdaSpaConfig(enabled=False), schedule("DD"), took=41.2, finished=True)
    assert run.lines() == ["Sampling took 41 s with AdaSpa off."]


def test_seconds_are_told_beforehand_once_a_dense_step_is_known():
    pace = Pace()
    assert pace.expect("work", 20, 0.5) == []
    for took in (5.0, 4.0):
        pace.note_dense_step("work", took, took - 1.0)
    # 4 s a step, of which 3 s are attention
    assert pace.dense_steps["work"] == (4.0, 3.0)
    assert pace.expect("work", 20, 0.5) == ["About 50 s in all; about 80 s without AdaSpa."]
    assert pace.expect("work", 20, 0.0) == ["About 80 s without AdaSpa."]
    assert pace.expect("other work", 20, 0.5) == []
    # a step whose attention was another's is timed as a whole, before or after such a one
    for work, steps in (("work", [(3.5, None)]), ("later", [(3.5, None), (4.0, 3.0)])):
        for took, attention in steps:
            pace.note_dense_step(work, took, attention)
        assert pace.dense_steps[work] == (3.5, 3.0)


def test_a_sentence_is_its_english_and_travels_with_its_code():
    why = Sentence("too_short", tokens="288", least="8,192")
    said = Sentence("leave_off", why=why)
    assert said == f"{why}: leave AdaSpa off." and isinstance(said, str)
    assert told(said) == {
        "text": str(said), "code": "leave_off", "values": {"why": told(why)}
    }  # fmt: skip
    assert told("as it is") == {"text": "as it is"}
    assert told(why)["values"]["tokens"] == {"text": "288"}


def test_every_english_sentence_reads_as_one():
    for code, text in ENGLISH.items():
        assert text == text.strip() and "  " not in text, code
