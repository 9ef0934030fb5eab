"""Every sentence of a verdict stands where it is true, and not where it is untrue."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_attn.config import AdaSpaConfig
from sparse_attn.run import verdict
from sparse_attn.run.pace import Speed
from sparse_attn.run.statistics import RunStatistics
from sparse_attn.run.timer import Timing
from sparse_attn.run.verdict import named, numbers, why_dense
from sparse_attn.sentences import ENGLISH, Sentence
from tests.run.fakes import schedule
from tests.run.test_verdict import a_run


def run_with(*, config=None, **fields):
    run = a_run(**config or {})
    for name, value in fields.items():
        setattr(run, name, value)
    return run


def took(seconds, off=None, **timing):
    run = run_with(took=seconds, seconds_off=off)
    run.timing = Timing(**timing) if timing else run.timing
    return run


def without_patterns(**fields):
    run = RunStatistics(AdaSpaConfig(), schedule("DDS" + 17 * "s"), finished=True)
    run.took = 46.0
    for name, value in fields.items():
        setattr(run, name, value)
    return run


def pattern_of(**fields):
    run = a_run()
    run.patterns[0, "positive"] = replace(run.patterns[0, "positive"], **fields)
    return run


SLOW = Speed(3.0, 2.9, 640)
SEARCHED = Timing(search=[4.0], search_dense=[3.0], sparse=[1.0])
FROM_5 = {"dense_from": 5, "why_dense": Sentence("pinned_dense")}
FEW = took(46.0, dense=[3.0], search=[9.0], sparse=[2.0])
OFF = RunStatistics(AdaSpaConfig(enabled=False), schedule("DD"), took=41.2, finished=True)
# code: a run of which it is true, and one of which it is not
RUNS = {
    "high_noise": (run_with(part="high noise"), run_with(part="low noise")),
    "low_noise": (run_with(part="low noise"), a_run()),
    "figures": (a_run(), pattern_of(exact=False)),
    "figures_estimated": (pattern_of(exact=False), a_run()),
    "figures_sampled": (pattern_of(exact=False, carried=True), pattern_of(exact=False)),
    "took": (run_with(timing=Timing(sparse=[1.0])), a_run()),
    "took_off": (OFF, without_patterns()),
    "faster": (a_run(), FEW),
    "faster_measured": (took(46.0, off=92.0), a_run()),
    "even": (took(46.0, dense=[3.0], search=[3.0], sparse=[3.0]), a_run()),
    "slower": (FEW, a_run()),
    "slower_measured": (took(46.0, off=40.0), took(46.0, off=92.0)),
    "untimed": (run_with(timing=Timing(sparse=[1.0])), run_with(timing=SEARCHED)),
    "by_search": (run_with(timing=SEARCHED), a_run()),
    "too_small": (
        took(46.0, dense=[3.0], search=[4.0], sparse=17 * [4.0]),
        FEW,
    ),
    "too_few_steps": (FEW, took(46.0, dense=[3.0], search=[4.0], sparse=17 * [4.0])),
    "very_close": (a_run(recall=0.81), a_run(recall=0.79)),
    "close": (a_run(recall=0.79), a_run(recall=0.81)),
    "may_differ": (a_run(recall=0.69), a_run(recall=0.71)),
    "not_judged": (a_run(recall=0.9, tail="none"), a_run(recall=0.9)),
    "all_dense": (
        without_patterns(kept_dense=Counter({"too short": 4})), without_patterns(kept_dense=Counter())
    ),
    "all_dense_steps": (without_patterns(), without_patterns(unseen=Counter({"unknown why": 2}))),
    "dense_from": (run_with(**FROM_5), without_patterns(**FROM_5)),
    "dense_all": (without_patterns(**FROM_5), run_with(**FROM_5)),
    "too_short_here": (
        run_with(dense_from=5, why_dense=why_dense(SLOW, 0.2)),
        run_with(dense_from=5, why_dense=why_dense(SLOW, 0.95)),
    ),
    "no_faster_here": (
        run_with(dense_from=5, why_dense=why_dense(SLOW, 0.95)),
        run_with(dense_from=5, why_dense=why_dense(SLOW, 0.2)),
    ),
    "stopped": (run_with(stopped_at=6), a_run()),
}  # fmt: skip


def codes_of(said) -> set[str]:
    """The codes of sentences, and of those that they are filled with."""
    found = set()
    for sentence in said:
        if isinstance(sentence, Sentence):
            found |= {sentence.code} | codes_of(sentence.values.values())
    return found


def test_every_sentence_of_a_verdict_has_its_runs():
    source = Path(verdict.__file__).read_text(encoding="utf-8")
    written = {code for code in ENGLISH if re.search(rf'"{code}"', source)}
    # those whose code has an ending
    written |= {code for code in ENGLISH if code.endswith("_measured")}
    written |= {code for code in ENGLISH if code.startswith("figures_")}
    # a reason, which stands inside of a sentence
    assert written - {"why_not_seen"} == set(RUNS)


@pytest.mark.parametrize("code", RUNS)
def test_a_sentence_stands_where_it_is_true_alone(code):
    true, untrue = (codes_of([*named(run), *numbers(run)]) for run in RUNS[code])
    assert code in true
    assert code not in untrue
