"""No mask ever meets another layer's q, whatever a pass does with the model's blocks."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparse_attn.host.model_call import UNKNOWN_LAYER
from tests.host.family_cases import CASES
from tests.host.family_models import build
from tests.host.host_fixtures import assert_same_video, calls, kept_dense, sparse
from tests.host.identity.truth import ONE_EACH, in_every_call, lists_of
from tests.host.test_families import sample as sample_case


def answered_elsewhere(override, left_out, truth):
    """An override that answers the video's self-attention of some blocks without asking ours."""

    def answer(func, q, k, v, heads, *args, **kwargs):
        if q.shape != k.shape or truth.inside() not in left_out:
            return override(func, q, k, v, heads, *args, **kwargs)
        if kwargs.get("skip_output_reshape") or not kwargs.get("skip_reshape"):
            return v
        return v.transpose(1, 2).flatten(2)

    return answer


def disturb(patcher, truth, seed):
    """Let every call of the model skip, repeat, move and leave out blocks at random."""
    draw = random.Random(seed)
    model = patcher.model.diffusion_model
    numbers, count = {}, 0
    for name, blocks in lists_of(model).items():
        for block in blocks:
            numbers[block] = name, count
            truth.watch(block, numbers[block])
            count += 1

    def twice(block):
        forward = block.forward

        def repeated(*args, **kwargs):
            forward(*args, **kwargs)
            return forward(*args, **kwargs)

        return repeated

    def wrapper(executor, x, t, c_concat, c_crossattn, control, options, **inputs):
        left_out = {number for number in numbers.values() if draw.random() < 0.2}
        options = {**options}
        key = "optimized_attention_override"
        options[key] = answered_elsewhere(options[key], left_out, truth)
        repeated = [block for block in numbers if draw.random() < 0.2]
        for block in repeated:
            block.forward = twice(block)
        moved = {}
        for name in lists_of(model):
            blocks = getattr(model, name)
            # what else reads these lists would not bear it
            movable = name in ("transformer_blocks", "blocks") and not hasattr(blocks, "values")
            if movable and not hasattr(model, "vace_blocks") and draw.random() < 0.5:
                moved[name] = blocks
                some = draw.sample(list(blocks), draw.randint(1, len(blocks)))
                setattr(model, name, torch.nn.ModuleList(some))
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **inputs)
        finally:
            for name, blocks in moved.items():
                setattr(model, name, blocks)
            for block in repeated:
                del block.forward

    in_every_call(patcher, wrapper)
    return numbers


@pytest.mark.parametrize("name", ONE_EACH)
def test_whatever_a_pass_does_no_state_meets_another_blocks_call(comfyui, truth, name):
    case = CASES[ONE_EACH[name]]
    for seed in range(3):
        # a model of its own: hooks and lists are changed
        model, handle = sparse(build(name), search_points=(0.5,))
        numbers = disturb(model, truth, seed)
        out = sample_case(model, case, steps=6)
        assert torch.isfinite(out).all()
    assert truth.holds()
    # without several blocks in sight nothing would be proved
    assert len({where for places in truth.met.values() for where, *_ in places}) > 1
    assert None not in {where for places in truth.met.values() for where, *_ in places}
    own = {number: set(layers) for number, layers in truth.layers.items()}
    assert all(own.values()) and len(own) <= len(numbers)
    assert UNKNOWN_LAYER not in kept_dense(handle)


def elsewhere(executor, x, t, c_concat, c_crossattn, control, options, **inputs):
    """A wrapper that runs every attention call in a thread of its own."""
    ours, key = options["optimized_attention_override"], "optimized_attention_override"

    def threaded(*args, **kwargs):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(ours, *args, **kwargs).result()

    return executor(x, t, c_concat, c_crossattn, control, {**options, key: threaded}, **inputs)


def test_a_call_from_nowhere_runs_dense_and_says_so(comfyui):
    case = CASES["ltx"]
    expected = sample_case(build("ltxv"), case)
    model, handle = sparse(build("ltxv"), sparsity=0.9)
    in_every_call(model, elsewhere)
    assert_same_video(sample_case(model, case), expected, 1e-6)
    assert calls(handle) == {}
    assert kept_dense(handle)[UNKNOWN_LAYER] == 2 * 2
