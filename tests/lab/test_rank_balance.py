"""Heads shared between GPUs, in their order and dealt anew."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "lab"), str(TESTS / "tiny_model")]

import rank_balance as balance  # noqa: E402


def test_the_fullest_makes_the_others_wait():
    assert balance.excess([[0.2, 0.2], [0.2, 0.2]]) == 0
    assert balance.excess([[0.4, 0.2], [0.1, 0.1]]) == pytest.approx(0.5)


def test_heads_dealt_anew_are_more_even():
    densities = [0.4, 0.3, 0.1, 0.2]
    assert balance.in_order(densities, 2) == [[0.4, 0.3], [0.1, 0.2]]
    shares = balance.dealt(densities, 2)
    assert sorted(map(sorted, shares)) == [[0.1, 0.4], [0.2, 0.3]]
    # equally many each, whatever they weigh
    assert [len(share) for share in balance.dealt([0.9, 0.1, 0.1, 0.1], 2)] == [2, 2]


def test_layers_are_drawn_from_the_deviations_of_the_heads():
    even, uneven = [[0.3] * 3] * 2, [[0.1, 0.3, 0.5]] * 2
    assert balance.drawn(even, 8, 2) == {"in_order": 0.0, "dealt": 0.0}
    found = balance.drawn(uneven, 8, 2)
    assert 0 <= found["dealt"] < found["in_order"] < 1
    assert balance.drawn(uneven, 32, 2)["in_order"] < found["in_order"]
