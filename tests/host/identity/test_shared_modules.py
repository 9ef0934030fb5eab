"""One module in the place of several layers: its calls are told apart, or they run dense."""

import random

import pytest
import torch

from sparse_attn.host.model_call import REPEATED, UNKNOWN_LAYER
from sparse_attn.host.sampling import UNNAMED
from tests.host.family_cases import CASES
from tests.host.family_models import build
from tests.host.host_fixtures import calls, kept_dense, sample, sparse
from tests.host.identity.test_blocks import answered_elsewhere, elsewhere
from tests.host.identity.truth import ONE_EACH, in_every_call
from tests.host.test_families import sample as sample_case

KEY = "optimized_attention_override"
# the list of blocks of a model, and the attention over the video in each of them
MODELS = {"wan": ("blocks", "self_attn"), "ltxv": ("transformer_blocks", "attn1")}


class InTurn(torch.nn.Module):
    """Several blocks behind one entry of a model's list."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x, **inputs):
        for block in self.blocks:
            x = block(x, **inputs)
        return x


def counted(patcher, truth, module):
    """Let the truth number a module's calls within each call of the model."""
    numbers = []

    def enter(module, inputs):
        truth.here.stack = [*getattr(truth.here, "stack", []), len(numbers)]
        numbers.append(0)

    def leave(module, inputs, outputs):
        truth.here.stack = truth.here.stack[:-1]

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)

    def wrapper(executor, *args, **inputs):
        numbers.clear()
        return executor(*args, **inputs)

    in_every_call(patcher, wrapper)


def leaving_out(patcher, truth, numbers, seed=0):
    """Answer some of the numbered calls elsewhere, others in every call of the model."""
    draw = random.Random(seed)

    def wrapper(executor, x, t, c_concat, c_crossattn, control, options, **inputs):
        left_out = {number for number in numbers if draw.random() < 0.4}
        options = {**options, KEY: answered_elsewhere(options[KEY], left_out, truth)}
        return executor(x, t, c_concat, c_crossattn, control, options, **inputs)

    in_every_call(patcher, wrapper)


@pytest.mark.parametrize("name", MODELS)
def test_one_attention_of_several_blocks_belongs_to_each_of_them(comfyui, truth, name):
    attribute, part = MODELS[name]
    model, handle = sparse(build(name), search_points=(0.5,))
    blocks = getattr(model.model.diffusion_model, attribute)
    for number, block in enumerate(blocks):
        setattr(block, part, getattr(blocks[0], part))
        truth.watch(block, number)
    leaving_out(model, truth, range(len(blocks)))
    sample_case(model, CASES[ONE_EACH[name]], steps=6)
    assert truth.holds() and calls(handle)["sparse"]
    assert not {REPEATED, UNKNOWN_LAYER} & set(kept_dense(handle))
    assert set(truth.layers) == {0, 1}


@pytest.mark.parametrize("name", MODELS)
def test_several_blocks_behind_one_entry_are_told_apart(comfyui, truth, name):
    attribute, _ = MODELS[name]
    model, handle = sparse(build(name), search_points=(0.5,))
    diffusion = model.model.diffusion_model
    blocks = list(getattr(diffusion, attribute))
    setattr(diffusion, attribute, torch.nn.ModuleList([InTurn(blocks)]))
    for number, block in enumerate(blocks):
        truth.watch(block, number)
    leaving_out(model, truth, range(len(blocks)))
    sample_case(model, CASES[ONE_EACH[name]], steps=6)
    assert truth.holds() and calls(handle)["sparse"]
    assert REPEATED not in kept_dense(handle)
    # layers of their own in the report, the first under the number of the entry
    assert sum(len(layers) for layers in truth.layers.values()) == 2
    assert truth.layers[0] == {0} and truth.layers[1].isdisjoint({0})
    # a saved pattern could not say which of the others it means
    assert None not in truth.names[0] and truth.names[1] == {None}


@pytest.mark.parametrize("name", MODELS)
def test_one_block_that_an_entry_runs_several_times_is_dense(comfyui, truth, name):
    attribute, _ = MODELS[name]
    model, handle = sparse(build(name), search_points=(0.5,))
    diffusion = model.model.diffusion_model
    block = getattr(diffusion, attribute)[0]
    setattr(diffusion, attribute, torch.nn.ModuleList([InTurn([block, block])]))
    counted(model, truth, block)
    sample_case(model, CASES[ONE_EACH[name]], steps=2)
    leaving_out(model, truth, range(2))
    truth.met.clear()
    sample_case(model, CASES[ONE_EACH[name]], steps=6)
    # what was searched before the second call came is let go
    assert truth.holds() and kept_dense(handle)[REPEATED] and "sparse" not in calls(handle)
    assert not handle.latest().warnings


@pytest.mark.parametrize("name", MODELS)
def test_one_block_in_several_entries_is_known_by_its_published_number(comfyui, truth, name):
    attribute, _ = MODELS[name]
    model, handle = sparse(build(name), search_points=(0.5,))
    diffusion = model.model.diffusion_model
    block = getattr(diffusion, attribute)[0]
    setattr(diffusion, attribute, torch.nn.ModuleList([block] * 3))
    counted(model, truth, block)
    leaving_out(model, truth, range(3))
    sample_case(model, CASES[ONE_EACH[name]], steps=6)
    published = name == "wan"
    assert truth.holds() is published
    assert bool(calls(handle)) is published
    assert (UNKNOWN_LAYER in kept_dense(handle)) is not published


def test_a_published_number_counts_only_while_the_list_is_as_it_was(comfyui, truth):
    """Passes that leave entries out number the others anew."""
    model, handle = sparse(build("wan"), search_points=(0.5,))
    diffusion = model.model.diffusion_model
    block = diffusion.blocks[0]
    whole = diffusion.blocks = torch.nn.ModuleList([block] * 3)
    draw = random.Random(0)

    def wrapper(executor, *args, **inputs):
        diffusion.blocks = torch.nn.ModuleList([block] * draw.choice((2, 3)))
        try:
            return executor(*args, **inputs)
        finally:
            diffusion.blocks = whole

    in_every_call(model, wrapper)
    sample_case(model, CASES["wan"], steps=6)
    assert kept_dense(handle)[UNKNOWN_LAYER] and calls(handle)["search"]


@pytest.mark.parametrize("called", ["by its forward", "as a module"])
def test_a_block_that_another_block_runs_keeps_its_own_patterns(comfyui, truth, called):
    model, handle = sparse(build("wan"), search_points=(0.5,))
    first, second = model.model.diffusion_model.blocks
    for number, block in enumerate((first, second)):
        truth.watch(block.self_attn, number)
    own = first.forward

    def both(x, **inputs):
        x = own(x, **inputs)
        return second.forward(x, **inputs) if called == "by its forward" else second(x, **inputs)

    first.forward = both
    model.model.diffusion_model.blocks = torch.nn.ModuleList([first])
    leaving_out(model, truth, range(2))
    sample_case(model, CASES["wan"], steps=6)
    assert truth.holds() and calls(handle)["sparse"]


def test_calls_in_threads_are_not_known_by_a_number_that_may_have_moved(comfyui, truth):
    model, handle = sparse(build("wan"), search_points=(0.5,))
    diffusion = model.model.diffusion_model
    whole = diffusion.blocks
    for number, block in enumerate(whole):
        truth.watch(block, number)

    def wrapper(executor, *args, **inputs):
        diffusion.blocks = torch.nn.ModuleList([whole[1]])
        try:
            return executor(*args, **inputs)
        finally:
            diffusion.blocks = whole

    in_every_call(model, elsewhere)
    in_every_call(model, wrapper)
    sample_case(model, CASES["wan"], steps=3)
    assert kept_dense(handle)[UNKNOWN_LAYER] and not calls(handle)


def test_two_rows_of_one_prompt_run_dense(load):
    """As where a wrapper doubles the rows of a prompt, and with them its name."""
    model, handle = sparse(load("wan_h64"))

    def wrapper(apply_model, args):
        options = dict(args["c"]["transformer_options"])
        for name in ("uuids", "cond_or_uncond"):
            options[name] = [*options[name], *options[name]]
        inputs = {**args["c"], "transformer_options": options}
        inputs["c_crossattn"] = inputs["c_crossattn"].repeat(2, 1, 1)
        x, t = args["input"].repeat(2, 1, 1, 1, 1), args["timestep"].repeat(2)
        return apply_model(x, t, **inputs)[: len(args["input"])]

    model.set_model_unet_function_wrapper(wrapper)
    sample(model)
    assert kept_dense(handle)[UNNAMED] and not calls(handle)
