"""Conditionings batched and split, videos in a batch, context windows: state never mixes."""

from inspect import signature

import pytest
import torch

from sparse_attn.host.sampling import UNNAMED
from sparse_attn.run.state import RunState
from tests.host.host_fixtures import (
    VIDEO,
    assert_other_video,
    assert_same_video,
    calls,
    conditioning,
    kept_dense,
    sample,
    sparse,
)


@pytest.fixture
def batches_seen(monkeypatch):
    """The conditionings of every call of the model."""
    import comfy.model_base

    seen = []
    apply_model = comfy.model_base.BaseModel.apply_model

    def noted(self, x, t, *args, **kwargs):
        seen.append(tuple(kwargs["transformer_options"]["cond_or_uncond"]))
        return apply_model(self, x, t, *args, **kwargs)

    monkeypatch.setattr(comfy.model_base.BaseModel, "apply_model", noted)
    return seen


@pytest.fixture
def split(monkeypatch):
    """split(when): split conditionings whenever `when(number of the decision)` says so."""
    import comfy.samplers

    def split(when):
        made = []

        def can_concat_cond(a, b):
            if a is b:
                return True
            made.append(None)
            return not when(len(made) - 1)

        monkeypatch.setattr(comfy.samplers, "can_concat_cond", can_concat_cond)

    return split


def test_prompts_of_equal_length_share_a_call(load, batches_seen):
    expected = sample(load("hunyuan"), texts=(7, 7))
    assert set(batches_seen) == {(1, 0)}
    model, handle = sparse(load("hunyuan"), sparsity=0.0)
    assert_same_video(sample(model, texts=(7, 7)), expected)
    assert calls(handle) == {"search": 6, "sparse": 18}


def test_prompts_of_different_length_are_split(load, batches_seen):
    model, handle = sparse(load("hunyuan"))
    sample(model, texts=(7, 9))
    assert set(batches_seen) == {(0,), (1,)}
    assert calls(handle) == {"search": 6, "sparse": 18}


@pytest.mark.parametrize("name", ["wan_h64", "hunyuan"])
@pytest.mark.parametrize(
    "when", [lambda n: True, lambda n: n % 2 == 0, lambda n: n % 2 == 1, lambda n: n >= 2],
    ids=["always", "even", "odd", "later"],
)  # fmt: skip
def test_splitting_does_not_change_the_video(load, split, batches_seen, name, when):
    model, _ = sparse(load(name))
    batched = sample(model, texts=(7, 7))
    assert set(batches_seen) == {(1, 0)}
    batches_seen.clear()

    split(when)
    model, handle = sparse(load(name))
    assert_same_video(sample(model, texts=(7, 7)), batched)
    assert any(len(batch) == 1 for batch in batches_seen)
    layers = 2 if name == "wan_h64" else 3
    # what was found for a prompt serves it in both forms: no search twice
    assert calls(handle) == {"search": 2 * layers, "sparse": 6 * layers}
    # without this the masks could be shared unnoticed
    assert_other_video(batched, sample(load(name), texts=(7, 7)))


def test_two_videos_in_a_batch_are_two_videos(load):
    import comfy.sample

    noise = comfy.sample.prepare_noise(torch.zeros(2, *VIDEO[1:]), 3)

    def run(noise):
        model, handle = sparse(load("wan_h64"))
        out = comfy.sample.sample(
            model, noise, 4, 5.0, "euler", "simple", conditioning(7, 0), conditioning(7, 1),
            torch.zeros_like(noise), disable_pbar=True, seed=3,
        )  # fmt: skip
        return out, handle

    both, handle = run(noise)
    assert_same_video(both, torch.cat([run(noise[:1])[0], run(noise[1:])[0]]))
    # per conditioning and video: two layers, two prompts, two videos
    assert calls(handle) == {"search": 8, "sparse": 24}
    assert_other_video(both[:1], both[1:])


def test_prompts_combined_into_one_each_have_a_mask(load):
    import comfy.sample

    model, handle = sparse(load("hunyuan"))
    noise = comfy.sample.prepare_noise(torch.zeros(VIDEO), 1)
    both = conditioning(7, 0) + conditioning(7, 5)
    comfy.sample.sample(
        model, noise, 4, 5.0, "euler", "simple", both, conditioning(9, 1), torch.zeros(VIDEO),
        disable_pbar=True, seed=1,
    )  # fmt: skip
    # three layers, three prompts
    assert calls(handle) == {"search": 9, "sparse": 27}
    assert len(handle.latest().memory.conditionings) == 3


def test_extra_pass_at_the_same_sigma_is_not_a_new_step(load):
    import comfy.samplers

    # as perturbed attention and skip-layer guidance do
    def guide(args):
        comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
        )
        return args["denoised"]

    def guided(model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(guide)
        return model

    plain, _ = sparse(load("wan_h64"), warmup=0.25)
    model, handle = sparse(load("wan_h64"), warmup=0.25)
    assert_same_video(sample(guided(model)), sample(plain))
    # the extra pass of the search step already has a mask
    assert calls(handle) == {"dense": 6, "search": 4, "sparse": 14}


@pytest.mark.parametrize(
    "videos, frames", [(1, 3), (2, 2)], ids=["one video of two", "two frames of three"]
)
def test_calls_for_a_part_have_masks_of_their_own_or_none(load, videos, frames):
    """As nodes make that call the model once more, with fewer videos or a piece of them.

    Which video of a batch a call is about, nobody says: it runs dense.
    """

    def also_a_part(apply, args):
        x, sigma, inputs = args["input"], args["timestep"], args["c"]
        part = {**inputs, "c_crossattn": inputs["c_crossattn"][:videos]}
        apply(x[:videos, :, :frames], sigma[:videos], **part)
        return apply(x, sigma, **inputs)

    def run(wrapped):
        model, handle = sparse(load("wan_h64"))
        if wrapped:
            model = model.clone()
            model.set_model_unet_function_wrapper(also_a_part)
        return sample(model, (2, *VIDEO[1:]), cfg=1.0), handle

    expected, _ = run(False)
    out, handle = run(True)
    assert_same_video(out, expected)
    # two layers of two videos, and once more for the piece
    searches = 2 * (2 + (videos if frames < 3 else 0))
    found = calls(handle)
    assert {kind: found[kind] for kind in ("search", "sparse")} == {
        "search": searches, "sparse": 3 * searches,
    }  # fmt: skip
    # two layers in four steps
    assert kept_dense(handle).get(UNNAMED, 0) == (8 if videos < 2 else 0)


# ---- context windows

LONG = (1, 16, 9, 16, 24)


def windowed(model, schedule="standard_static", length=5, overlap=1, **options):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    settings = {
        "context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "dim": 2,
        "freenoise": False, "cond_retain_index_list": "", "latent_retain_index_list": "",
        "causal_window_fix": False,
    }  # fmt: skip
    settings.update(options)
    # a later version of the node has more inputs
    taken = signature(ContextWindowsManualNode.execute).parameters
    settings = {name: value for name, value in settings.items() if name in taken}
    assert settings.keys() >= options.keys()
    return ContextWindowsManualNode.execute(model, length, overlap, schedule, **settings).args[0]


@pytest.fixture
def largest_state(monkeypatch):
    """The most layer states a run held at once."""
    largest = [0]
    attend = RunState.attend

    def noted(self, *args):
        out = attend(self, *args)
        largest[0] = max(largest[0], len(self.layers))
        return out

    monkeypatch.setattr(RunState, "attend", noted)
    return largest


def test_each_context_window_has_its_own_mask(load, largest_state):
    model, handle = sparse(windowed(load("wan_h64")))
    sample(model, LONG, cfg=1.0)
    # two windows, two layers
    assert calls(handle) == {"search": 4, "sparse": 12}
    assert largest_state == [4]


def test_memory_is_told_for_each_context_window(load):
    model, handle = sparse(windowed(load("wan_h64")))
    sample(model, LONG)
    statistics = handle.latest()
    assert statistics.expected.endswith("for each prompt and each context window.")
    # two prompts in two windows
    assert statistics.memory.held_bytes == 4 * statistics.memory.predicted_bytes
    (line,) = [line for line in statistics.lines() if line.startswith("Memory held")]
    assert "for 2 conditioning(s) in 2 context windows, predicted" in line


@pytest.mark.parametrize("fix", [False, True], ids=["even", "causal_fix"])
def test_context_windows_equal_dense_when_all_is_kept(load, fix):
    # with the fix the later windows have one frame more, and the keys tell them apart
    expected = sample(windowed(load("wan_h64"), causal_window_fix=fix), LONG)
    model, handle = sparse(windowed(load("wan_h64"), causal_window_fix=fix), sparsity=0.0)
    assert_same_video(sample(model, LONG), expected)
    assert calls(handle) == {"search": 8, "sparse": 24}


def test_windows_that_move_every_step_do_not_pile_up(load, largest_state):
    def run(steps):
        largest_state[0] = 0
        model = windowed(load("wan_h64"), "looped_uniform", 4, 1, closed_loop=True)
        model, handle = sparse(model)
        out = sample(model, LONG, steps=steps, cfg=1.0)
        assert torch.isfinite(out).all()
        return largest_state[0], handle.latest().memory.held_bytes

    few, many = run(4), run(16)
    assert many[0] <= 2 * few[0]
    assert many[1] <= 2 * few[1]
