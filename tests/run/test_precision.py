"""Runs in low precision with the kernels themselves, interpreted where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from close import assert_within

from sparse_attn.backends import reference, triton_backend
from sparse_attn.config import AdaSpaConfig
from sparse_attn.run import state as run_state
from sparse_attn.run.state import Call, RunState
from sparse_attn.schedule import Schedule
from tests.run.test_run_state import KINDS, LAYOUT, L

SCALE = 0.125


def relative_error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


@pytest.fixture
def make_run(monkeypatch):
    def make(kinds, **config):
        monkeypatch.setattr(
            run_state.attention, "choose", lambda *args: (triton_backend, "Triton kernels")
        )
        schedule = Schedule(tuple(KINDS[k] for k in kinds), 0, len(kinds), tuple(kinds))
        fields = {"sparsity": 0.6, "min_tokens": 0, "tail": "none", **config}
        return RunState(AdaSpaConfig(**fields), schedule)

    return make


@pytest.fixture
def qkv(device):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, 1, L, 64, generator=generator).to(device, torch.bfloat16).unbind(0)


def call_at(step):
    return Call("layer 0", 0, "positive", step, LAYOUT, SCALE, dense=None)


@pytest.mark.parametrize("block_size", ["64", "128x64"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_run_reads_its_mask_in_low_precision(make_run, qkv, precision, block_size):
    run = make_run("Ss", precision=precision, block_size=block_size)
    why = triton_backend.why_not_low_precision(*qkv, *run.config.blocks.values(), precision)
    if why is not None:
        pytest.skip(why)
    for step in range(2):
        out = run.attend(call_at(step), *qkv)
    run.end_step()
    assert run.statistics.low_precision_calls == 1 and not run.statistics.not_low_precision
    keep = run.layers["layer 0"].mask.to_dense()
    assert not keep.all()
    exact, _ = reference.sparse_attention(
        *(x.double() for x in qkv), keep, **run.config.blocks, scale=SCALE
    )
    # random data leaves little but noise in the output; what bf16 gets is told beside it
    usual = make_run("Ss", block_size=block_size)
    for step in range(2):
        same = usual.attend(call_at(step), *qkv)
    assert relative_error(same, exact) < 0.01 < relative_error(out, exact) < 0.15
    assert torch.equal(usual.layers["layer 0"].mask.bits, run.layers["layer 0"].mask.bits)


def test_a_run_with_a_tail_errs_little_more_than_one_in_full_precision(make_run, qkv):
    outs, masks = [], []
    for more in ({"precision": "int8"}, {}):
        run = make_run("Ss", tail="pooled", **more)
        for step in range(2):
            out = run.attend(call_at(step), *qkv)
        run.end_step()
        outs.append(out)
        masks.append(run.layers["layer 0"].mask.bits)
        assert run.statistics.low_precision_calls == len(more)
        assert not run.statistics.not_low_precision
    assert torch.equal(*masks)
    assert 0.001 < relative_error(outs[0], outs[1].double()) < 0.15


@pytest.mark.parametrize("tail", ["none", "pooled"])
def test_a_later_search_measures_in_int8(make_run, qkv, tail):
    held = []
    for more in ({"precision": "int8"}, {}):
        run = make_run("SsSs", tail=tail, token_order="position", **more)
        for step in range(3):
            run.attend(call_at(step), *qkv)
        run.end_step()
        assert run.statistics.low_precision_searches == len(more)
        held.append(run.layers["layer 0"].recall.item())
    assert held[0] == pytest.approx(held[1], abs=0.002)


def test_a_dense_step_runs_in_low_precision_where_it_is_fastest(make_run, qkv, monkeypatch):
    run = make_run("DDS", precision="int8")

    def measure(self, q, k, v, candidates):
        assert list(candidates) == ["host", "cudnn", "own", "own int8"]
        return {name: 1.0 if name == "own int8" else 2.0 for name in candidates}

    monkeypatch.setattr("sparse_attn.run.dense.DenseChoice._measure", measure)
    out = run.dense_steps.serve(*qkv, scale=SCALE, host=None)
    exact, _ = reference.dense_attention(*(x.double() for x in qkv), scale=SCALE)
    assert out.shape == exact.shape and relative_error(out, exact) < 0.15
    assert run.statistics.dense_choice == "own int8, not exact"


def test_what_the_kernels_cannot_serve_runs_as_usual(make_run, qkv):
    run = make_run("Ss", precision="int8")
    odd = [x.float() for x in qkv]
    assert "float16 or bfloat16" in triton_backend.why_not_low_precision(*odd, 64, 64, "int8")
    q, k, v = qkv
    run.low_precision._reason = lambda *args: "a reason"
    for step in range(2):
        out = run.attend(call_at(step), q, k, v)
    keep = run.layers["layer 0"].mask.to_dense()
    exact, _ = reference.sparse_attention(
        *(x.double() for x in qkv), keep, **run.config.blocks, scale=SCALE
    )
    assert_within("out", out, exact, 2e-2)
    assert run.statistics.not_low_precision == {"a reason": 1}
