"""Which step an evaluation of the model belongs to."""

import math
import random
from itertools import pairwise

import pytest

from sparse_attn.schedule import StepCounter
from tests.sigma_lists import LISTS, RESTART, linear, rising, shifted


def evaluate(sigmas, calls):
    """Steps of a sampler's evaluations; None among them is where it calls back."""
    counter, found = StepCounter(sigmas), []
    for sigma in calls:
        found += [counter.spoken()] if sigma is None else [counter.of(sigma)]
    return [step for step in found if step is not None]


def euler(sigmas, speaks=True):
    return [x for sigma in sigmas[:-1] for x in ((sigma, None) if speaks else (sigma,))]


@pytest.mark.parametrize("space", [linear, shifted, rising])
@pytest.mark.parametrize("steps", [1, 4, 20, 50, 200, 3000])
def test_a_sigma_finds_its_step(space, steps):
    sigmas = space(steps)
    for shift in (0, 6e-8, -6e-8):
        # a sigma that went through float32, either way
        calls = [sigma and sigma * (1 + shift) for sigma in euler(sigmas)]
        assert evaluate(sigmas, calls) == list(range(steps))


@pytest.mark.parametrize("name", [n for n in LISTS if n not in ("not finite", "equal")])
@pytest.mark.parametrize("speaks", [True, False], ids=["calls back", "silent"])
def test_every_step_of_any_list_is_found(name, speaks):
    sigmas = LISTS[name]
    found = evaluate(sigmas, euler(sigmas, speaks))
    expected = list(range(len(sigmas) - 1))
    if not speaks:
        # of steps of no length only the first is seen
        expected = [sigmas.index(sigma) if "repeated" in name else i
                    for i, sigma in enumerate(sigmas[:-1])]  # fmt: skip
    assert found == expected


def test_steps_at_one_sigma_are_told_apart_where_the_sampler_calls_back():
    assert evaluate([0.7] * 9, euler([0.7] * 9)) == list(range(8))
    assert evaluate([0.7] * 9, euler([0.7] * 9, speaks=False)) == 8 * [0]


def test_two_conditionings_at_one_sigma_are_one_step():
    sigmas = linear(3)
    calls = [x for sigma in sigmas[:-1] for x in (sigma, sigma, None)]
    assert evaluate(sigmas, calls) == [0, 0, 1, 1, 2, 2]


def heun(sigmas):
    """Each step evaluates at its own sigma and at the next; the last one only at its own."""
    calls = []
    for sigma, following in pairwise(sigmas):
        calls += [sigma, None, *([following] if following else [])]
    return calls


def test_heun_counts_by_sigma_not_by_calls():
    sigmas = linear(4)
    assert evaluate(sigmas, heun(sigmas)) == [0, 1, 1, 2, 2, 3, 3]
    silent = [sigma for sigma in heun(sigmas) if sigma is not None]
    assert evaluate(sigmas, silent) == [0, 1, 1, 2, 2, 3, 3]


def test_heun_follows_a_restart():
    assert evaluate(RESTART, heun(RESTART)) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def heunpp2(sigmas):
    """Each step but the last two looks two sigmas ahead."""
    calls, steps = [], len(sigmas) - 1
    for step in range(steps):
        ahead = sigmas[step + 1 : step + 3 if step < steps - 2 else step + 2]
        calls += [sigmas[step], None, *(sigma for sigma in ahead if sigma)]
    return calls


@pytest.mark.parametrize("sigmas", [linear(5), shifted(5), RESTART], ids=["falls", "", "restart"])
def test_a_look_two_sigmas_ahead_belongs_to_the_next_step(sigmas):
    found, present = evaluate(sigmas, heunpp2(sigmas)), []
    # step 0: at 0, 1 and 2; step 1: at 1, 2 and 3
    assert found[:6] == [0, 1, 1, 1, 2, 2]
    assert found == sorted(found) and set(found) == set(range(len(sigmas) - 1))
    for call in heunpp2(sigmas):
        if call is not None:
            present.append(found[len(present)])
    assert len(present) == len(found)


def test_a_sampler_that_calls_back_only_once_goes_on():
    sigmas = linear(6)
    calls = [sigmas[0], None, *sigmas[1:-1]]
    assert evaluate(sigmas, calls)[-3:] == [3, 4, 5]


def test_dpm_2_midpoints_belong_to_the_step_they_are_in():
    for sigmas in (shifted(8), RESTART, rising(8)):
        calls, expected = [], []
        for step, (begin, end) in enumerate(pairwise(sigmas)):
            calls += [begin, None, (begin * max(end, begin / 100)) ** 0.5]
            expected += [step, step]
        assert evaluate(sigmas, calls) == expected


def test_a_sampler_that_goes_back_is_followed_there():
    sigmas = linear(5)
    back = [sigmas[0], sigmas[1], sigmas[2], sigmas[1], sigmas[2], sigmas[3], sigmas[4]]
    assert evaluate(sigmas, back) == [0, 1, 2, 1, 2, 3, 4]


def test_sigmas_outside_the_run_go_to_its_ends():
    sigmas = linear(8)[2:6]
    assert evaluate(sigmas, [1.0, 0.0]) == [0, 2]
    assert evaluate(sigmas[::-1], [0.0, 1.0]) == [0, 2]
    assert evaluate(sigmas, [sigmas[1], math.nan, sigmas[2]]) == [1, 1, 2]


def test_ancestral_sigmas_of_an_epsilon_model_find_their_steps():
    # 14.6 to 0.03 in equal ratios, as Karras-like schedules are
    sigmas = [14.6 * (0.03 / 14.6) ** (i / 19) for i in range(20)] + [0.0]
    assert evaluate(sigmas, sigmas[:-1]) == list(range(20))


@pytest.mark.parametrize("seed", range(50))
def test_whatever_the_list_and_the_sampler_a_step_is_found(seed):
    """Random lists and evaluations: always a step of the run, and the one whose interval holds it."""
    draw = random.Random(seed)
    sigmas = [draw.choice([draw.random(), 0.5, 0.0]) for _ in range(draw.randint(2, 12))]
    counter = StepCounter(sigmas)
    for _ in range(100):
        if draw.random() < 0.3:
            counter.spoken()
        sigma = draw.choice([draw.uniform(-0.2, 1.2), draw.choice(sigmas)])
        step = counter.of(sigma)
        assert 0 <= step < len(sigmas) - 1
        # a look ahead belongs to the step before it
        near, within = (
            [min(a, b) - more <= sigma <= max(a, b) + more for a, b in pairwise(sigmas)]
            for more in (1e-3, 0)
        )
        assert any(near[step : step + 2]) or not any(within)
