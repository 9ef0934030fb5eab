"""Runs in low precision with the kernels themselves, interpreted where there is no GPU."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.backends.choice import triton_kernels
from tests.run.fakes import L, Run, call_of

SCALE = 0.125


def relative_error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


def make_run(kinds, **config):
    return Run(kinds, triton_kernels(), **config).state


@pytest.fixture
def qkv(device):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, 1, L, 64, generator=generator).to(device, torch.bfloat16).unbind(0)


def attend(run, step, qkv):
    return run.attend(replace(call_of(qkv, step), scale=SCALE))


@pytest.mark.parametrize("block_size", ["64", "128x64"])
def test_a_run_reads_its_mask_in_low_precision(qkv, block_size):
    run = make_run("Ss", precision="int8", block_size=block_size)
    for step in range(2):
        out = attend(run, step, qkv)
    run.end_step()
    assert run.statistics.low_precision.calls == 1 and not run.statistics.low_precision.declined
    mask = run.layers["layer 0"].pattern.mask
    assert not mask.to_dense().all()
    exact, _ = reference.attention(*(x.double() for x in qkv), scale=SCALE, mask=mask)
    # random data leaves little but noise in the output; what bf16 gets is told beside it
    usual = make_run("Ss", block_size=block_size)
    for step in range(2):
        same = attend(usual, step, qkv)
    assert relative_error(same, exact) < 0.01 < relative_error(out, exact) < 0.15
    assert torch.equal(
        usual.layers["layer 0"].pattern.mask.bits, run.layers["layer 0"].pattern.mask.bits
    )


def test_a_run_with_a_tail_errs_little_more_than_one_in_full_precision(qkv):
    outs, masks = [], []
    for more in ({"precision": "int8"}, {}):
        run = make_run("Ss", tail="pooled", **more)
        for step in range(2):
            out = attend(run, step, qkv)
        run.end_step()
        outs.append(out)
        masks.append(run.layers["layer 0"].pattern.mask.bits)
        assert run.statistics.low_precision.calls == len(more)
        assert not run.statistics.low_precision.declined
    assert torch.equal(*masks)
    assert 0.001 < relative_error(outs[0], outs[1].double()) < 0.15


@pytest.mark.parametrize("tail", ["none", "pooled"])
def test_a_later_search_measures_in_int8(qkv, tail):
    held = []
    for more in ({"precision": "int8"}, {}):
        run = make_run("SsSs", tail=tail, token_order="position", **more)
        for step in range(3):
            attend(run, step, qkv)
        run.end_step()
        assert run.statistics.low_precision.searches == len(more)
        held.append(run.layers["layer 0"].pattern.recall.item())
    assert held[0] == pytest.approx(held[1], abs=0.002)


def test_a_dense_step_runs_in_low_precision_where_it_is_fastest(qkv):
    run = make_run("DDS", precision="int8")

    def fastest(call, candidates):
        assert {"host", "own", "own int8"} <= set(candidates)
        return "own int8"

    run.dense.choice.fastest = fastest
    out = run.dense.serve(replace(call_of(qkv), scale=SCALE))
    exact, _ = reference.attention(*(x.double() for x in qkv), scale=SCALE)
    assert out.shape == exact.shape and relative_error(out, exact) < 0.15
    assert run.statistics.dense_choice == "own int8, not exact"


def test_what_the_kernels_cannot_serve_runs_as_usual(qkv):
    run = make_run("Ss", precision="int8")
    odd = [x.float() for x in qkv]
    assert "float16 or bfloat16" in triton_kernels().why_not_quantised(*odd, 64, 64)
    run.precision._reason = lambda *args: "a reason"
    for step in range(2):
        out = attend(run, step, qkv)
    mask = run.layers["layer 0"].pattern.mask
    exact, _ = reference.attention(*(x.double() for x in qkv), scale=SCALE, mask=mask)
    assert_within("out", out, exact, 2e-2)
    assert run.statistics.low_precision.declined == {"a reason": 1}
