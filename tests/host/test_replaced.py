"""Self-attention that another node answers: the report says whose, or that it does not know."""

import types
from functools import partial

import pytest
import torch

from sparse_attn.host.replaced import UNKNOWN
from tests.host.host_fixtures import calls, sample, sparse
from tests.host.test_caches import cached

CACHE = "skipped by a cache"
# of two layers, two prompts and four steps
EVERY, HALF = 16, 8


def lines(handle):
    return "\n".join(handle.latest().lines())


def forward_replaced(model, layers=(0, 1)):
    """As packs that patch the attention modules; the cross-attention still comes."""
    model = model.clone()

    def forward(self, x, *args, **kwargs):
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(x))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, self.v(x)))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).flatten(2))

    for layer in layers:
        attention = model.get_model_object(f"diffusion_model.blocks.{layer}.self_attn")
        model.add_object_patch(
            f"diffusion_model.blocks.{layer}.self_attn.forward",
            types.MethodType(forward, attention),
        )
    return model


def block_patched(model, layers=(0, 1)):
    """As skip-layer guidance: the block is not run."""
    model = model.clone()
    for layer in layers:
        model.set_model_patch_replace(
            lambda args, more: {"img": args["img"]}, "dit", "double_block", layer
        )
    return model


def override_after(model, layers=()):
    """As packs that put their attention on top once the model has been entered."""
    import comfy.patcher_extension

    def wrapper(executor, *args, **kwargs):
        (options,) = [x for x in (*args, *kwargs.values()) if isinstance(x, dict) and "adaspa" in x]
        options["optimized_attention_override"] = lambda func, *call, **named: func(*call, **named)
        return executor(*args, **kwargs)

    model = model.clone()
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    model.add_wrapper_with_key(kind, "other", wrapper)
    return model


def function_replaced(model, layers=(), from_step=0):
    """As packs that swap the module's function for as long as the model runs."""
    import comfy.ldm.wan.model as wan

    original, made = wan.optimized_attention, []

    def mine(*args, **kwargs):
        return original.__wrapped__(*args, **kwargs)

    def wrapper(apply, given):
        made.append(None)
        # two prompts of unlike length, so two calls in a step
        if len(made) > 2 * from_step:
            wan.optimized_attention = mine
        try:
            return apply(given["input"], given["timestep"], **given["c"])
        finally:
            wan.optimized_attention = original

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


def inside_the_block(model, layers=(0, 1)):
    """Blocks answered by something that leaves no trace on the model."""
    model = model.clone()
    for layer in layers:
        block = model.get_model_object(f"diffusion_model.blocks.{layer}")
        model.add_object_patch(
            f"diffusion_model.blocks.{layer}.self_attn", Elsewhere(block.self_attn)
        )
    return model


class Elsewhere(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.width = attention.o.out_features

    def forward(self, x, *args, **kwargs):
        return x


WAYS = [
    (forward_replaced, "a `forward` of "),
    (block_patched, "a block patch of "),
    (override_after, "an override of "),
    (function_replaced, "comfy.ldm.wan.model.optimized_attention is of "),
    (inside_the_block, None),
]


@pytest.mark.parametrize("way, words", WAYS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("order", ["before", "after"])
def test_what_took_the_place_of_the_self_attention_is_named(load, way, words, order):
    if order == "before":
        model, handle = sparse(way(load("wan_h64")))
    else:
        model, handle = sparse(load("wan_h64"))
        model = way(model)
    sample(model)
    run = handle.latest()
    ((why, count),) = run.unseen.items()
    assert count == EVERY and not calls(handle) and not run.kept_dense
    if words is None:
        assert why == UNKNOWN
    else:
        assert why.startswith(f"another node replaced it: {words}") and "test_replaced" in why
    text = lines(handle)
    assert f"Video's self-attention not seen: 16 calls, {why}" in text
    assert f"Every call ran dense: not seen, {why}." in run.summary()
    assert CACHE not in text and run.skipped() == []


@pytest.mark.parametrize("way", [forward_replaced, block_patched, inside_the_block])
def test_a_part_that_was_replaced_is_counted_apart(load, way):
    model, handle = sparse(way(load("wan_h64"), layers=(0,)))
    sample(model)
    assert sum(handle.latest().unseen.values()) == HALF
    assert calls(handle) == {"search": 2, "sparse": 6}
    assert {layer for layer, _ in handle.latest().patterns} == {1}


def test_what_the_host_leaves_of_an_earlier_patch_is_not_blamed(load):
    sample(forward_replaced(load("wan_h64")), steps=1)
    blocks = load("wan_h64").model.diffusion_model.blocks
    assert "forward" in vars(blocks[0].self_attn)
    model, handle = sparse(inside_the_block(load("wan_h64")))
    sample(model, steps=1)
    assert set(handle.latest().unseen) == {UNKNOWN}


def test_attention_that_is_replaced_in_a_later_step_is_no_cache(load):
    model, handle = sparse(load("wan_h64"))
    sample(function_replaced(model, from_step=1))
    assert CACHE not in lines(handle) and handle.latest().skipped() == []
    ((why, count),) = handle.latest().unseen.items()
    assert count == EVERY - 4 and "another node replaced it" in why
    # the seconds of a step that another node served are none of a sparse step
    assert [kind.value for kind, _ in handle.latest().steps] == ["search"]


@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("way", [None, forward_replaced])
def test_a_cache_is_told_from_a_replacement(load, node, way):
    model, handle = sparse(load("wan_h64"))
    model = cached(way(model) if way else model, node)
    sample(model, steps=10)
    run = handle.latest()
    skipped = len(run.skipped())
    assert skipped and f"Skipped by a cache: {skipped} steps" in lines(handle)
    assert sum(run.unseen.values()) == (4 * (10 - skipped) if way else 0)


def test_a_model_that_does_not_say_when_it_is_entered_is_not_taken_for_a_cache(load, monkeypatch):
    """As Mochi, which offers its call to no wrapper."""
    from comfy.ldm.wan.model import WanModel

    def direct(self, x, timestep, context, clip_fea=None, time_dim_concat=None,
               transformer_options={}, **more):  # fmt: skip  # noqa: B006
        return self._forward(
            x, timestep, context, clip_fea, time_dim_concat, transformer_options, **more
        )

    monkeypatch.setattr(WanModel, "forward", direct)
    model, handle = sparse(load("wan_h64"))
    sample(function_replaced(model, from_step=1))
    assert CACHE not in lines(handle) and handle.latest().skipped() == []
    assert sum(handle.latest().unseen.values()) == EVERY - 4


def test_an_origin_is_told_without_the_folders_of_this_machine():
    from sparse_attn.host.replaced import _origin

    def function():
        pass

    function.__module__ = "/" + "home/ann/ComfyUI/custom_nodes/SomePack.attention"
    assert _origin(partial(function)) == "SomePack.attention"
    function.__module__ = "C:" + "\\ComfyUI\\custom_nodes\\SomePack"
    assert _origin(function) == "SomePack"
