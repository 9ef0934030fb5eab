import pytest
import torch

from sparse_attn.config import AdaSpaConfig
from sparse_attn.run.report import gib, milliseconds, seconds
from sparse_attn.run.statistics import Pattern, RunStatistics
from sparse_attn.run.timer import Timing
from sparse_attn.schedule import StepKind
from sparse_attn.token_layout import TokenLayout
from tests.run.fakes import schedule

CONFIG = AdaSpaConfig(tail="none")


def statistics_of(kinds):
    return RunStatistics(CONFIG, schedule(kinds))


def pattern(density, recall, exact=True):
    return Pattern(2, exact, density, recall, torch.zeros(2, 4, 4, dtype=torch.uint8))


def a_run():
    """20 steps, 2 dense of 10 s, a search of 11 s, 17 sparse of 3 s."""
    statistics = statistics_of("DDS" + 17 * "s")
    statistics.model, statistics.layout = "Wan", TokenLayout(0, 21, 45, 80)
    statistics.backend = "Triton kernels"
    statistics.timing = Timing(dense=[10.0, 10.0], search=[11.0], sparse=[3.0] * 17)
    statistics.patterns[0, "positive"] = pattern([0.2, 0.2], [0.98, 0.96])
    statistics.patterns[1, "positive"] = pattern([0.3, 0.1], [0.94, 0.76])
    return statistics


def test_density_and_recall_are_means_over_layers_and_heads():
    statistics = a_run()
    assert statistics.patterns.density() == pytest.approx(0.2)
    assert statistics.patterns.recall() == (pytest.approx(0.91), 0.76)
    empty = statistics_of("D").patterns
    assert empty.density() is None and empty.recall() is None


@pytest.mark.parametrize(
    "exact, carried, label",
    [
        ((True, True), (False, False), ""),
        ((False, True), (False, False), "estimated"),
        ((False, False), (True, True), "sampled"),
        # the mean is over both
        ((False, False), (True, False), "estimated"),
    ],
)
def test_the_recall_shown_is_as_sure_as_its_least_sure_layer(exact, carried, label):
    statistics = a_run()
    for layer in (0, 1):
        found = statistics.patterns[layer, "positive"]
        found.exact, found.carried = exact[layer], carried[layer]
    assert statistics.patterns.recall_label() == label


def test_saved_is_measured_against_the_runs_own_dense_calls():
    timing = a_run().timing
    assert timing.spent() == pytest.approx(20 + 11 + 51)
    # dense, the 18 calls after the warm-up would have taken 180 s
    assert timing.saved() == pytest.approx(180 - 11 - 51)


def test_a_later_search_costs_but_replaces_no_call():
    timing = a_run().timing
    before = timing.saved()
    timing.search_again.append(4.0)
    assert timing.saved() == pytest.approx(before - 4)
    assert timing.searching() == 15


def test_a_run_without_dense_steps_measures_against_its_searches_dense_pass():
    timing = Timing(search=[14.0], search_dense=[10.0], sparse=[3.0] * 3)
    assert timing.dense_call() == 10
    assert timing.saved() == pytest.approx(40 - 14 - 9)


def test_one_slow_dense_call_does_not_decide():
    # the first call of a run compiles and loads
    assert Timing(dense=[90.0, 10.0, 10.0]).dense_call() == 10


@pytest.mark.parametrize("timing", [Timing(), Timing(dense=[1.0]), Timing(sparse=[1.0])])
def test_nothing_is_claimed_without_a_measurement(timing):
    assert timing.saved() is None


def test_summary_in_one_line():
    assert (
        a_run()
        .summary()
        .endswith(
            " was not judged. 75,600 tokens, steps 1-2 dense, 3 search, 4-20 sparse, density 0.20, "
            "recall 0.91, worst head 0.76, saved 118 s of attention"
        )
    )


def test_summary_calls_an_estimate_an_estimate():
    statistics = a_run()
    statistics.patterns[0, "positive"].exact = False
    assert "recall 0.91 (estimated), worst head 0.76" in statistics.summary()


def test_summary_admits_a_loss():
    statistics = a_run()
    statistics.timing = Timing(dense=[1.0], search=[3.5], sparse=[1.0])
    assert statistics.summary().endswith("lost 2.5 s of attention")


def test_summary_says_why_every_call_ran_dense():
    statistics = statistics_of("DSss")
    assert statistics.summary() == "Every call ran dense."
    statistics.kept_dense.update({"too short": 40, "an image": 8, "rare": 1})
    assert statistics.summary() == "Every call ran dense: too short."


def test_the_report_line_by_line():
    statistics = a_run()
    statistics.steps = [(StepKind.DENSE, 30.0), (StepKind.DENSE, 20.0), (StepKind.SPARSE, 8.25)]
    statistics.memory.conditionings = {"a", "b"}
    statistics.memory.held_bytes, statistics.memory.predicted_bytes = 2**30, 2**29
    statistics.kept_dense["listed in `dense_layers`"] = 3
    statistics.warn("out of memory while searching")
    statistics.warn("out of memory while searching")
    assert statistics.lines()[2:] == [
        "Model: Wan, 75,600 tokens (21x45x80 video)",
        "Sparse attention by: Triton kernels",
        "Attention: 82 s spent (20 s dense, 11.0 s search, 51 s sparse)",
        "One call: 10000 ms dense, 3000 ms sparse (3.3x), measured against its own dense calls",
        "One step of the whole model: 25 s dense, 8.2 s sparse",
        "Memory held: 1.00 GiB on the GPU for 2 conditioning(s), predicted 0.50 GiB each",
        "Kept dense: 3 calls, listed in `dense_layers`",
        "Note: out of memory while searching",
    ]


def test_the_report_names_the_dense_pass_of_a_search_as_its_yardstick():
    statistics = a_run()
    statistics.timing = Timing(search=[14.0], search_dense=[10.0], sparse=[4.0])
    assert any(
        line.endswith("(2.5x), measured against the dense pass of its searches")
        for line in statistics.lines()
    )


def test_as_dict_holds_the_same_numbers():
    statistics = a_run()
    found = statistics.as_dict()
    assert found["tokens"] == 75_600 and found["steps"] == statistics.schedule.describe()
    assert found["density"] == statistics.patterns.density()
    assert (found["recall"], found["recall_worst_head"]) == statistics.patterns.recall()
    assert found["attention_seconds_saved"] == pytest.approx(118)
    assert (found["dense_call_seconds"], found["sparse_call_seconds"]) == (10, 3)
    empty = statistics_of("D").as_dict()
    assert empty["recall"] is None and empty["sparse_call_seconds"] is None


UNITS = [
    (seconds, 0.123, "0.12 s"),
    (seconds, 1.26, "1.3 s"),
    (seconds, 19.94, "19.9 s"),
    (seconds, 119.4, "119 s"),
    (seconds, 120.4, "2 min"),
    (seconds, 220.2, "3 min 40 s"),
    (seconds, 599.8, "10 min"),
    (seconds, 4210, "70 min"),
    (milliseconds, 0.0123, "12.30 ms"),
    (milliseconds, 0.123, "123 ms"),
    (gib, 3 * 2**20, "3.0 MiB"),
    (gib, 2**30, "1.00 GiB"),
]


@pytest.mark.parametrize("function, value, text", UNITS, ids=lambda x: str(x)[:10])
def test_numbers_for_people(function, value, text):
    assert function(value) == text
