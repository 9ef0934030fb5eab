import pytest

from sparse_attn.config import PRESETS, AdaSpaConfig, from_preset
from sparse_attn.schedule import Schedule, StepKind, plan

LETTERS = {"D": StepKind.DENSE, "S": StepKind.SEARCH, "s": StepKind.SPARSE}


def linear(steps):
    """Sigmas from 1 to 0 whose progress is 1 - sigma."""
    return [1 - i / steps for i in range(steps + 1)]


def shifted(steps, shift=5.0):
    """Sigmas as flow models with a shift space them."""
    return [shift * s / (1 + (shift - 1) * s) for s in linear(steps)]


def unshift(sigma, shift=5.0):
    return 1 - sigma / (shift - (shift - 1) * sigma)


def letters(schedule):
    return "".join({kind: letter for letter, kind in LETTERS.items()}[k] for k in schedule.kinds)


def planned(sigmas, config, progress_of=lambda sigma: 1 - sigma):
    return plan(sigmas, progress_of, config)


PLANS = [
    # preset, steps, kinds: D dense, S search, s sparse
    ("Balanced", 4, "Ssss"),  # a warm-up that rounds to no step: the search is the first step
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
    ("Fast", 4, "Ssss"),
    ("Fast", 5, "DSsss"),  # rounds to no dense step, and gets one
    ("Fast", 8, "DSssSsss"),
    ("Fast", 20, "DS" + 7 * "s" + "S" + 10 * "s"),
    ("Fast", 50, 3 * "D" + "S" + 19 * "s" + "S" + 26 * "s"),
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
    ({"warmup": 0.0}, 1, "S"),
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
    assert first.describe() == "steps 0-3 dense, 4 search, 5-9 sparse"
    assert second.describe() == "steps 10 search, 11 sparse, 12 search, 13-19 sparse"


@pytest.mark.parametrize("preset", ["Quality", "Balanced", "Fast"])
def test_a_second_search_is_some_steps_away_and_more_than_the_last(preset):
    searched = set()
    for steps in range(1, 60):
        kinds = letters(planned(linear(steps), PRESETS[preset]))
        first, *again = (i for i, kind in enumerate(kinds) if kind == "S")
        searched.add(len(again))
        assert first >= (steps >= 5) and all(i - first >= 3 and i < steps - 1 for i in again)
    assert searched == {0, 1}


def test_no_warm_up_is_taken_at_its_word():
    assert letters(planned(linear(8), AdaSpaConfig(warmup=0.0))) == "S" + 7 * "s"


@pytest.mark.parametrize("steps, kinds", [(4, "Ssss"), (8, "DSsssSss")])
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
    asked = {"warmup": 0.1, "search_points": (0.45,)}
    assert letters(planned(linear(20)[:11], AdaSpaConfig(**asked))) == "DDS" + 6 * "s" + "S"


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


@pytest.mark.parametrize("space", [linear, shifted])
@pytest.mark.parametrize("steps", [1, 4, 20, 50, 200])
def test_a_sigma_finds_its_step(space, steps):
    sigmas = space(steps)
    schedule = planned(sigmas, PRESETS["Balanced"])
    for step, sigma in enumerate(sigmas[:-1]):
        assert schedule.step_of(sigma) == step
        # a sigma that went through float32, either way
        assert schedule.step_of(sigma * (1 + 6e-8)) == step
        assert schedule.step_of(sigma * (1 - 6e-8)) == step


def test_heun_counts_by_sigma_not_by_calls():
    sigmas = linear(4)
    schedule = planned(sigmas, PRESETS["Balanced"])
    # each step evaluates at its own sigma and at the next; the last one only at its own
    calls = [s for i in range(4) for s in sigmas[i : i + 2] if s > 0]
    assert [schedule.step_of(s) for s in calls] == [0, 1, 1, 2, 2, 3, 3]


def test_dpm_2_midpoints_belong_to_the_step_they_are_in():
    sigmas = shifted(8)
    schedule = planned(sigmas, PRESETS["Balanced"])
    for step in range(7):
        middle = (sigmas[step] * sigmas[step + 1]) ** 0.5
        assert schedule.step_of(middle) == step
    assert schedule.step_of(sigmas[7] / 100) == 7


def test_sigmas_outside_the_run_go_to_its_ends():
    schedule = planned(linear(8)[2:6], PRESETS["Balanced"])
    assert schedule.step_of(1.0) == 0 and schedule.step_of(0.0) == 2


def test_ancestral_sigmas_of_an_epsilon_model_find_their_steps():
    # 14.6 to 0.03 in equal ratios, as Karras-like schedules are
    sigmas = [14.6 * (0.03 / 14.6) ** (i / 19) for i in range(20)] + [0.0]
    schedule = planned(sigmas, PRESETS["Balanced"], lambda sigma: 1 - sigma / 14.6)
    assert [schedule.step_of(s) for s in sigmas[:-1]] == list(range(20))


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
    ("Ssss", 0, "steps 0 search, 1-3 sparse"),
    ("DDSss", 0, "steps 0-1 dense, 2 search, 3-4 sparse"),
    ("S", 0, "step 0 search"),
    ("sss", 10, "steps 10-12 sparse"),
]


@pytest.mark.parametrize("kinds, first, text", DESCRIPTIONS, ids=lambda x: str(x)[:6])
def test_describes_itself_in_step_numbers(kinds, first, text):
    assert made(kinds, first).describe() == text


def test_the_paper_in_words():
    schedule = planned(linear(50), PRESETS["Paper"])
    assert schedule.describe() == (
        "steps 0-9 dense, 10 search, 11-29 sparse, 30 search, 31-49 sparse"
    )
