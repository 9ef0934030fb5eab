"""Which steps of a run may be forecast."""

import pytest

from sparse_attn.forecast.plan import LEAST_STEPS, plan_forecasts
from tests.run.fakes import schedule


def sigmas(steps):
    return [1 - i / steps for i in range(steps + 1)]


def allowed(steps, first=0, total=None, kinds=None):
    planned = None if kinds is None else schedule(kinds, first)
    found = plan_forecasts(sigmas(steps), first, total or steps, planned)
    return sorted(found.allowed), found.why_not


def test_neither_the_first_fifth_nor_the_last_step_is_forecast():
    assert allowed(20) == (list(range(4, 19)), "")
    assert allowed(21) == (list(range(5, 20)), "")


def test_a_slice_is_counted_in_the_whole_schedule_and_ends_with_a_computed_step():
    assert allowed(10, 10, 20)[0] == list(range(9))
    assert allowed(10, 0, 20)[0] == list(range(4, 9))


@pytest.mark.parametrize("steps", [1, 4, LEAST_STEPS - 1])
def test_few_steps_are_left_alone(steps):
    assert allowed(steps) == ([], f"{steps} steps are too few, {LEAST_STEPS} are needed")
    assert allowed(LEAST_STEPS)[0]


def test_searches_and_the_steps_whose_lse_they_need_are_computed():
    #                      01234567890123
    assert allowed(14, kinds="DDDDDSssSsssDS")[0] == [3, 6, 7, 9, 10, 11]


def test_no_steps_have_no_forecast():
    assert plan_forecasts([1.0], 0, 0).allowed == frozenset()
    assert plan_forecasts([], 0, 0).allowed == frozenset()
