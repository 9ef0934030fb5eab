"""What each step of a sampler run does."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_attn.config import PRESETS, AdaSpaConfig, from_preset
from sparse_attn.schedule import Schedule, StepKind, plan
from tests.bench import few_steps
from tests.sigma_lists import LISTS, linear, rising, shifted, unshift

LETTERS = {"D": StepKind.DENSE, "S": StepKind.SEARCH, "s": StepKind.SPARSE}


def letters(schedule):
    return "".join({kind: letter for letter, kind in LETTERS.items()}[k] for k in schedule.kinds)


def planned(sigmas, config, progress_of=lambda sigma: 1 - sigma, **pattern):
    return plan(sigmas, progress_of, config, **pattern)


PLANS = [
    # preset, steps, kinds: D dense, S search, s sparse
    ("Balanced", 1, "D"),
    ("Balanced", 2, "DS"),  # a warm-up that rounds to no step still gets one
    ("Balanced", 4, "DSss"),
    ("Balanced", 5, "DSsss"),
    ("Balanced", 7, "DSsssss"),  # 2 steps are too few between two searches
    ("Balanced", 8, "DSssSsss"),
    ("Balanced", 20, "DD" + "S" + 6 * "s" + "S" + 10 * "s"),
    ("Balanced", 50, 6 * "D" + "S" + 16 * "s" + "S" + 26 * "s"),
    ("Quality", 4, "DSss"),
    ("Quality", 6, "DSssSs"),
    ("Quality", 8, "DDSssSss"),
    ("Quality", 20, 4 * "D" + "S" + 7 * "s" + "S" + 7 * "s"),
    ("Quality", 50, 10 * "D" + "S" + 19 * "s" + "S" + 19 * "s"),
    ("Fast", 4, "DSss"),
    ("Fast", 5, "DSsss"),
    ("Fast", 8, "DSssSsss"),
    ("Fast", 20, "DDS" + 6 * "s" + "S" + 10 * "s"),
    ("Fast", 50, 5 * "D" + "S" + 17 * "s" + "S" + 26 * "s"),
    ("Paper", 4, "DSSs"),  # 0.6 of 4 rounds to step 2
    ("Paper", 8, "DDSssSss"),
    ("Paper", 20, 4 * "D" + "S" + 7 * "s" + "S" + 7 * "s"),
    ("Paper", 50, 10 * "D" + "S" + 19 * "s" + "S" + 19 * "s"),  # the paper's own schedule
]


@pytest.mark.parametrize("preset, steps, kinds", PLANS, ids=lambda x: str(x)[:8])
def test_presets_on_every_usual_number_of_steps(preset, steps, kinds):
    assert len(kinds) == steps
    assert letters(planned(linear(steps), PRESETS[preset])) == kinds
    assert letters(planned(shifted(steps), PRESETS[preset], unshift)) == kinds


CONFIGS = [
    # fields, steps, kinds
    ({"warmup": 0.25}, 10, "DDDSssssss"),  # half a step rounds up
    ({"warmup": 0.0, "search_points": (0.5,)}, 10, "SssssSssss"),
    ({"warmup": 0.3, "search_points": (0.3, 0.6)}, 10, "DDDSssSsss"),  # 0.3 is the first search
    ({"warmup": 0.2, "search_points": (0.5, 0.52)}, 10, "DDSssSssss"),  # two points, one step
    ({"warmup": 0.0, "start_percent": 0.3, "end_percent": 0.8}, 10, "DDDSssssDD"),
    ({"warmup": 0.2, "end_percent": 0.1}, 10, 10 * "D"),  # the window ends before the search
    ({"warmup": 0.0, "search_points": (0.9,), "end_percent": 0.8}, 10, "Ssss" + "ssss" + "DD"),
    ({"warmup": 0.2, "search_points": (0.4, 0.7), "search_gap": 3}, 10, "DDSssssSss"),
    ({"warmup": 0.2, "search_points": (0.4, 0.7)}, 10, "DDSsSssSss"),
    ({"warmup": 0.99}, 10, 10 * "D"),  # rounds to all steps
    ({"warmup": 0.0}, 1, "D"),  # nothing follows that could use a search
    ({"warmup": 0.7}, 10, 7 * "D" + "Sss"),
    ({"warmup": 0.9}, 10, 10 * "D"),
    ({"warmup": 0.2, "search_points": (0.9,)}, 10, "DDSsssssss"),
]


@pytest.mark.parametrize("fields, steps, kinds", CONFIGS, ids=str)
def test_windows_and_search_points(fields, steps, kinds):
    assert letters(planned(linear(steps), AdaSpaConfig(**fields))) == kinds


def test_two_halves_make_the_whole():
    sigmas = shifted(20)
    whole = planned(sigmas, PRESETS["Paper"], unshift)
    first = planned(sigmas[:11], PRESETS["Paper"], unshift)
    second = planned(sigmas[10:], PRESETS["Paper"], unshift)
    assert letters(first) == letters(whole)[:10]
    # the second sampler knows nothing of the first one's mask, so it begins with a search
    assert letters(second) == "Ss" + letters(whole)[12:]
    assert (first.first_step, first.total_steps) == (0, 20)
    assert (second.first_step, second.total_steps) == (10, 20)
    assert first.describe() == "steps 1-4 dense, 5 search, 6-10 sparse"
    assert second.describe() == "steps 11 search, 12 sparse, 13 search, 14-20 sparse"


@pytest.mark.parametrize("preset", ["Quality", "Balanced", "Fast"])
def test_a_second_search_is_some_steps_away_and_more_than_the_last(preset):
    searched = set()
    for steps in range(2, 60):
        kinds = letters(planned(linear(steps), PRESETS[preset]))
        first, *again = (i for i, kind in enumerate(kinds) if kind == "S")
        searched.add(len(again))
        assert first >= 1 and all(i - first >= 3 and i < steps - 1 for i in again)
    assert searched == {0, 1}


def test_no_warm_up_is_taken_at_its_word():
    assert letters(planned(linear(8), AdaSpaConfig(warmup=0.0))) == "S" + 7 * "s"


@pytest.mark.parametrize("steps, kinds", [(4, "DSss"), (8, "DSsssSss")])
def test_custom_values_do_not_search_every_other_step(steps, kinds):
    config = from_preset("Custom", search_points=(0.6,))
    assert letters(planned(linear(steps), config)) == kinds


def test_a_second_sampler_does_not_search_twice_in_a_row():
    # its first search is at step 10, and that of the whole schedule would be due at step 12
    second = planned(linear(20)[10:], PRESETS["Balanced"])
    assert letters(second) == "S" + 9 * "s"


def test_a_first_sampler_does_not_search_in_its_last_step():
    first = planned(linear(20)[:11], PRESETS["Balanced"])
    assert letters(first) == "DDS" + 7 * "s"
    asked = AdaSpaConfig(warmup=0.1, search_points=(0.45,))
    assert letters(planned(linear(20)[:11], asked)) == "DDS" + 7 * "s"
    kept = planned(linear(20)[:11], asked, keeps_pattern=True)
    assert letters(kept) == "DDS" + 6 * "s" + "S"


def test_a_slice_inside_the_warm_up_is_dense():
    assert letters(planned(linear(50)[:6], PRESETS["Paper"])) == "DDDDD"


def test_denoise_below_one_keeps_its_place():
    # 10 steps over the last half of the schedule: 20 steps would have made the whole
    schedule = planned(linear(20)[10:], PRESETS["Quality"])
    assert (schedule.first_step, schedule.total_steps) == (10, 20)
    assert letters(schedule) == "S" + 9 * "s"


def test_a_short_slice_claims_no_absurd_schedule():
    schedule = planned([0.5, 0.4999999], PRESETS["Balanced"])
    assert schedule.total_steps <= 1000 and len(schedule.kinds) == 1
    assert 0 <= schedule.first_step < schedule.total_steps


def test_progress_that_stands_still_counts_the_steps_themselves():
    schedule = plan(linear(8), lambda sigma: 0.0, PRESETS["Balanced"])
    assert (schedule.first_step, schedule.total_steps) == (0, 8)
    assert letters(schedule) == "DSssSsss"


@pytest.mark.parametrize("sigmas", [[], [1.0]], ids=["none", "one"])
def test_zero_steps_plan_nothing(sigmas):
    schedule = planned(sigmas, PRESETS["Balanced"])
    assert schedule.kinds == () and schedule.describe() == "no steps"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("pattern", ["keeps_pattern", "begins_with_pattern", None])
def test_a_search_in_the_last_step_needs_someone_to_use_it(preset, pattern):
    """Slices of one step and more, such as samplers that run step by step."""
    for steps in (1, 2, 5, 20):
        for first in range(steps):
            for last in range(first + 1, steps + 1):
                more = {pattern: True} if pattern else {}
                made = planned(linear(steps)[first : last + 1], PRESETS[preset], **more)
                kinds = letters(made)
                alone = set(kinds[:-1]) <= {"D"}
                # a search that runs sparse serves its own step
                serves = made.sparse_search and kinds == "DS"
                if pattern is None or not alone:
                    useful = serves or pattern == "keeps_pattern"
                    assert kinds[-1] != "S" or useful, (steps, first, last)
                if pattern and alone:
                    # what another run has found is taken in its place
                    warm = PRESETS[preset].warmup * steps > last - 0.5 or last == 1
                    assert kinds[-1] == ("D" if warm else "S"), (steps, first, last)
                assert made.may_search(last - first - 1) == (pattern == "keeps_pattern")
                assert all(made.may_search(step) for step in range(last - first - 1))


@pytest.mark.parametrize(("steps", "asked", "straight"), [(2, "Ss", "DS"), (4, "Ssss", "DSss")])
def test_a_recall_on_few_steps_costs_no_second_dense_one(steps, asked, straight):
    config = replace(PRESETS["Balanced"], search_points=())
    assert letters(planned(linear(steps), config)) == straight
    with_recall = planned(linear(steps), replace(config, recall=0.9))
    assert letters(with_recall) == asked and not with_recall.sparse_search


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20, 50])
def test_rising_sigmas_are_planned_from_their_beginning(preset, steps):
    config = PRESETS[preset]
    upward = planned(rising(steps), config)
    assert letters(upward) == letters(planned(linear(steps), config))
    assert (upward.first_step, upward.total_steps) == (0, steps)
    # its second half goes on where the first stopped
    half = planned(rising(steps)[steps // 2 :], config)
    assert (half.first_step, half.total_steps) == (steps // 2, steps)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_any_list_is_planned_step_by_step(name, preset):
    sigmas = LISTS[name]
    made = planned(sigmas, PRESETS[preset], lambda sigma: min(max(1 - sigma, 0.0), 1.0))
    steps = len(sigmas) - 1
    assert len(made.kinds) == steps <= made.total_steps <= max(steps, 1000)
    assert 0 <= made.first_step <= made.total_steps - steps
    assert not re.search(r"-\d+-|s -", made.describe())
    kinds = letters(made)
    assert kinds.lstrip("D")[:1] in ("S", "") and "D" not in kinds.lstrip("D")


def test_a_list_that_turns_counts_its_own_steps():
    for name in ("restart", "two phases", "restart of a slice"):
        sigmas = LISTS[name]
        made = planned(sigmas, PRESETS["Balanced"])
        assert (made.first_step, made.total_steps) == (0, len(sigmas) - 1)
        assert letters(made) == letters(planned(linear(len(sigmas) - 1), PRESETS["Balanced"]))


def test_more_than_a_thousand_steps_keep_their_numbers():
    made = planned(linear(1620), PRESETS["Balanced"])
    assert (
        made.describe()
        == "steps 1-194 dense, 195 search, 196-729 sparse, 730 search, 731-1620 sparse"
    )


def made(kinds, first=0):
    return Schedule(tuple(LETTERS[k] for k in kinds), first, len(kinds) + first, tuple(kinds))


def test_only_the_dense_step_before_a_search_keeps_its_lse():
    schedule = made("DDSssSsD")
    assert [i for i in range(8) if schedule.wants_lse(i)] == [1]
    assert not any(made("DDD").wants_lse(i) for i in range(3))


def test_lse_is_kept_while_a_search_is_to_come():
    schedule = made("DSssSsss")
    assert [schedule.searches_after(i) for i in range(8)] == 4 * [True] + 4 * [False]


def test_the_last_sparse_step_is_the_one_furthest_from_its_search():
    schedule = made("DSssSsDSs")
    assert [i for i in range(9) if schedule.is_last_sparse(i)] == [3, 5, 8]


DESCRIPTIONS = [
    ("Ssss", 0, "steps 1 search, 2-4 sparse"),
    ("DDSss", 0, "steps 1-2 dense, 3 search, 4-5 sparse"),
    ("S", 0, "step 1 search"),
    ("sss", 10, "steps 11-13 sparse"),
]


@pytest.mark.parametrize("kinds, first, text", DESCRIPTIONS, ids=lambda x: str(x)[:6])
def test_describes_itself_in_step_numbers(kinds, first, text):
    assert made(kinds, first).describe() == text


def test_the_paper_in_words():
    schedule = planned(linear(50), PRESETS["Paper"])
    assert schedule.describe() == (
        "steps 1-10 dense, 11 search, 12-30 sparse, 31 search, 32-50 sparse"
    )


def test_the_table_of_few_steps_is_what_is_planned():
    readme = Path(few_steps.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert few_steps.table() in readme
    # a search after a dense step measures on the way, one without it needs a pass of its own
    assert few_steps.milliseconds("DSs", "Balanced") < few_steps.milliseconds("SDs", "Balanced")
