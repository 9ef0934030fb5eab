"""What the benches of real layers say of a run's calls."""

import dataclasses

import torch

from sparse_attn.config import PRESETS


def test_a_bench_finds_no_error_where_every_call_is_taken_or_declined_as_expected(comfyui):
    from tests.bench import real_stacks
    from tests.bench.stack_runs import StackRuns

    config = dataclasses.replace(PRESETS["Balanced"], min_tokens=0)
    with torch.no_grad():
        runs = StackRuns(real_stacks.STACKS["wan"], True, torch.device("cpu"))
        statistics = runs.sparse(config, 2)[2]
        assert statistics.beside and not runs.errors
        runs.check(statistics, 3, runs.shapes)
    assert len(runs.errors) == 2, "neither the calls nor the declined ones are those of three steps"
