"""What other nodes change in the middle of a run: weights, samplings, errors of their own."""

import pytest
import torch

from tests.host.host_fixtures import (
    VIDEO,
    assert_other_video,
    assert_same_video,
    calls,
    conditioning,
    sample,
    sparse,
)
from tests.host.identity.test_parts import tiled
from tests.host.identity.truth import WIDE, Truth
from tests.host.test_guidance import skipping
from tests.host.test_overrides import Override, with_override
from tests.host.test_weights import lora


@pytest.fixture
def truth(monkeypatch):
    return Truth(monkeypatch)


def hooked(model, weights):
    """Sample with a LoRA on the positive prompt that a hook switches on in mid-run."""
    import comfy.hooks
    import comfy.sample

    hooks = comfy.hooks.create_hook_lora(weights, 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.5))
    hooks.set_keyframes_on_hooks(frames)
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning(7, 0), hooks)
    noise = comfy.sample.prepare_noise(torch.zeros(VIDEO), 1)
    with torch.no_grad():
        return comfy.sample.sample(
            model, noise, 4, 5.0, "euler", "simple", positive, conditioning(7, 1),
            torch.zeros(VIDEO), disable_pbar=True, seed=1,
        )  # fmt: skip


def test_a_hook_that_switches_weights_in_mid_run_keeps_the_patterns(load):
    weights = lora(load("wan_h64"))
    expected = hooked(load("wan_h64"), weights)
    assert_other_video(expected, sample(load("wan_h64"), texts=(7, 7)))
    model, handle = sparse(load("wan_h64"), sparsity=0.0)
    assert_same_video(hooked(model, weights), expected)
    # two layers and prompts; the prompt with other weights is the same prompt
    assert calls(handle) == {"search": 4, "sparse": 12}
    assert not handle.latest().warnings


def test_tiles_and_a_pass_that_skips_blocks_in_two_samplings_of_one_model(load, truth):
    def run(model):
        model = tiled(skipping(model), truth, lambda tile: tile)
        return torch.cat([sample(model, WIDE), sample(model, WIDE, seed=2)])

    expected = run(load("wan_h64"))
    model, handle = sparse(load("wan_h64"), sparsity=0.0)
    assert_same_video(run(model), expected)
    assert truth.holds() and len(handle.runs) == 2
    # four tiles, two layers, two prompts
    assert calls(handle)["search"] == 16


def test_an_error_of_another_override_is_the_users_as_it_came(load):
    """And leaves nothing behind in the model, whichever of its calls fails."""

    class Failing(Override):
        def __call__(self, *args, **kwargs):
            if self.left == 0:
                raise ValueError("theirs")
            self.left -= 1
            return super().__call__(*args, **kwargs)

    expected = sample(load("wan_h64"))
    for left in (0, 3, 6):
        other = Failing()
        model, handle = sparse(with_override(load("wan_h64"), other), sparsity=0.0, warmup=0.5)
        other.left = left
        with pytest.raises(ValueError, match=r"^theirs$"):
            sample(model)
        run = handle.latest()
        said = "an error in the attention that runs without AdaSpa, ValueError('theirs')"
        assert not run.finished and all(line.startswith(said) for line in run.warnings)
        other.left = -1
        assert_same_video(sample(model), expected)
        assert handle.latest().finished and not handle.latest().warnings


def test_weights_that_leave_and_come_back_in_mid_run(load, monkeypatch):
    import comfy.model_management

    gone = []

    def unloading(model):
        def wrapper(apply_model, args):
            if not gone or gone[-1] != args["timestep"][0].item():
                gone.append(args["timestep"][0].item())
                comfy.model_management.unload_all_models()
                comfy.model_management.load_models_gpu([model])
            return apply_model(args["input"], args["timestep"], **args["c"])

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return model

    expected = sample(load("wan_h64"))
    model, handle = sparse(load("wan_h64"), sparsity=0.0)
    assert_same_video(sample(unloading(model)), expected)
    assert len(gone) == 4
    assert calls(handle) == {"search": 4, "sparse": 12}
