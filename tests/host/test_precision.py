"""Low precision as the host sees it: who may ask for it, who may forbid it, what is shown."""

from dataclasses import replace

import pytest

from sparse_attn.backends import choice
from sparse_attn.run.precision import NOT_ALLOWED
from tests.host.host_fixtures import assert_other_video, assert_same_video, calls, sample, sparse


@pytest.fixture
def quantising(monkeypatch):
    """Let plain torch serve low precision, with values in eighths."""
    plain = choice.plain_torch()

    def quantised_attention(q, k, v, **options):
        return plain.attention(q, k, (v * 8).round() / 8, **options)

    backend = replace(
        plain, quantised_attention=quantised_attention, why_not_quantised=lambda *args: None
    )
    monkeypatch.setattr(choice, "choose", lambda *args: (backend, backend.name))


def forbid(executor, x, t, c_concat=None, c_crossattn=None, control=None,
           transformer_options=None, **inputs):  # fmt: skip
    """A wrapper of the model call that wants all of it in full precision."""
    options = {**transformer_options, "low_precision_attention": False}
    return executor(x, t, c_concat, c_crossattn, control, options, **inputs)


@pytest.mark.parametrize("name", ["wan_h64", "hunyuan"])
def test_sparse_calls_run_in_low_precision_on_request(load, quantising, name):
    model, handle = sparse(load(name), precision="int8", tail="none")
    out = sample(model)
    assert_other_video(out, sample(sparse(load(name), tail="none")[0]), 1e-4)
    statistics = handle.latest()
    assert statistics.low_precision.calls == calls(handle)["sparse"] > 0
    assert not statistics.low_precision.declined
    assert f"Precision: {calls(handle)['sparse']} calls in int8" in statistics.lines()


def test_a_machine_without_it_computes_as_usual_and_says_why(load):
    model, handle = sparse(load("wan_h64"), precision="int8")
    assert_same_video(sample(model), sample(sparse(load("wan_h64"))[0]), 1e-6)
    text = "\n".join(handle.latest().lines())
    assert "Precision: 0 calls in int8" in text
    assert "Not in int8: 12 calls, plain torch computes in float32" in text


def test_the_host_s_word_against_it_is_honoured(load, quantising):
    import comfy.patcher_extension

    model, handle = sparse(load("wan_h64"), precision="int8")
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    model.add_wrapper_with_key(kind, "forbid", forbid)
    assert_same_video(sample(model), sample(sparse(load("wan_h64"))[0]), 1e-6)
    assert handle.latest().low_precision.calls == 0
    assert handle.latest().low_precision.declined == {NOT_ALLOWED: 12}


def test_the_call_s_own_word_against_it_is_honoured(load, quantising, monkeypatch):
    import comfy.ldm.wan.model as wan

    attend = wan.optimized_attention
    monkeypatch.setattr(
        wan, "optimized_attention",
        lambda *args, **kwargs: attend(*args, **{**kwargs, "low_precision_attention": False}),
    )  # fmt: skip
    model, handle = sparse(load("wan_h64"), precision="int8", warmup=0.25, dense_attention="auto")
    sample(model)
    statistics = handle.latest()
    assert statistics.low_precision.calls == 0 and "int8" not in statistics.dense_choice
    # dense calls too, one for each layer and batch of prompts
    assert statistics.low_precision.declined[NOT_ALLOWED] == len(statistics.timing.sparse) + 4
