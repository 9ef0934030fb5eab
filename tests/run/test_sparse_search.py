"""A first search whose step runs sparse, with the LSE of the dense step before it."""

from dataclasses import replace

import pytest
import torch

from sparse_attn.run.estimate import SEARCH_WORK
from tests.run.fakes import Backend, Run, assert_best_choice, host_attention, no_memory, tensors


def run_of(kinds, one_pass=False, **config):
    run = Run(kinds, Backend(one_pass), **config)
    run.statistics.schedule = replace(run.state.schedule, sparse_search=True)
    return run


@pytest.mark.parametrize("one_pass", [False, True])
def test_the_search_takes_the_lse_of_the_dense_step_and_runs_sparse(one_pass):
    run = run_of("DSss", one_pass)
    q, k, v = tensors(1)
    assert run.attends(0), "it has to keep its LSE"
    _, did = run.attend(0, (q * 0.99, k, v))
    assert did == ["dense"]
    out, did = run.attend(1, (q, k, v))
    assert did == ["masses", "sparse"] and not torch.equal(out, host_attention(q, k, v))
    keep = assert_best_choice(run, q, k)
    assert run.layer().lse is None and run.statistics.timing.search == []
    assert run.attend(2, (q, k, v))[1] == ["sparse"]
    assert torch.equal(run.pattern().mask.to_dense(), keep)


def test_in_low_precision_it_measures_in_int8():
    run = run_of("DSss", precision="int8")
    run.attend(0)
    assert run.attend(1)[1] == ["int8 masses", "int8"]
    assert run.statistics.low_precision.searches == 1 and run.layer().lse is None


def test_the_lse_stays_for_a_later_search():
    run = run_of("DSsSs")
    did = [run.attend(step)[1] for step in range(5)]
    assert did == [["dense"], ["masses", "sparse"], ["sparse"], ["masses", "sparse"], ["sparse"]]


def test_without_an_lse_the_search_runs_dense():
    run = run_of("Sss")
    _, did = run.attend(0)
    assert did == ["dense", "masses"]


def test_a_recall_is_measured_beside_a_dense_pass():
    run = run_of("DSss", recall=0.9)
    assert not run.attends(0), "it need not keep its LSE"
    assert run.attend(1)[1] == ["dense", "masses"]


def test_without_memory_for_it_the_search_runs_dense():
    run = run_of("DSss")
    run.attend(0)
    run.backend.fails = {"masses": no_memory()}
    assert run.attend(1)[1] == ["masses", "dense", "masses", "host"]


def test_the_estimate_counts_no_dense_pass_for_it():
    run, other = run_of("DSss"), Run("DSss")
    sparse, dense = (1 - x.estimate().skipped for x in (run, other))
    kept = (4 * dense - 2 - SEARCH_WORK) / 2
    assert 4 * sparse == pytest.approx(1 + SEARCH_WORK + 3 * kept)
