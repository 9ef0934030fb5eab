"""What must come out exactly: everything kept, padded text left out, text rows, declined calls."""

from dataclasses import replace

import pytest
import torch

from sparse_attn.run.state import RunState
from tests.host.host_fixtures import (
    CROSS_ATTENTION,
    VIDEO,
    VIDEO_15,
    assert_same_video,
    calls,
    conditioning,
    kept_dense,
    sample,
    sparse,
)
from tests.host.host_models import VISION_DIM

pytestmark = pytest.mark.any_comfyui

STEPS = 3


class ClipVision:
    """What a CLIP vision loader would hand to an image-to-video model."""

    def __init__(self, tokens, width):
        states = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(5))
        self.last_hidden_state = self.penultimate_hidden_states = states


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


def not_video(tokens, whole):
    return f"{tokens:,} tokens are not the {whole:,} of this model's video sequence"


def wan_extra(name):
    if name == "wan_i2v":
        return {
            "concat_latent_image": noise(*VIDEO), "clip_vision_output": ClipVision(257, 1280),
            "concat_mask": torch.ones(1, 1, 3, 16, 24),
        }  # fmt: skip
    if name == "wan_reference":
        return {
            "concat_latent_image": noise(1, 32, 3, 16, 24),
            "reference_latents": [noise(1, 16, 1, 16, 24)],
            "clip_vision_output": ClipVision(257, 1280),
        }  # fmt: skip
    return {}


@pytest.mark.parametrize(
    "name, tokens", [("wan_t2v", 288), ("wan_h64", 288), ("wan_i2v", 288), ("wan_reference", 384)]
)
def test_keeping_every_block_of_wan_equals_dense(load, name, tokens):
    extra = wan_extra(name)
    expected = sample(load(name), steps=STEPS, extra=extra)
    model, handle = sparse(load(name), sparsity=0.0)
    assert_same_video(sample(model, steps=STEPS, extra=extra), expected)
    # two layers, two prompts
    assert calls(handle) == {"search": 4, "sparse": 4 * (STEPS - 1)}
    # a model with image tokens reads them in a second cross-attention per block
    crossings = 2 if extra else 1
    assert kept_dense(handle) == {CROSS_ATTENTION: 4 * STEPS * crossings}
    assert handle.latest().tokens == tokens
    assert handle.latest().model == "Wan"


@pytest.mark.parametrize("reference", [False, True], ids=["t2v", "reference"])
def test_keeping_every_block_of_hunyuan_equals_dense(load, reference):
    extra = {"ref_latent": noise(1, 16, 1, 16, 24)} if reference else {}
    expected = sample(load("hunyuan"), steps=STEPS, extra=extra)
    model, handle = sparse(load("hunyuan"), sparsity=0.0)
    assert_same_video(sample(model, steps=STEPS, extra=extra), expected)
    # one double block, two single blocks, two prompts
    assert calls(handle) == {"search": 6, "sparse": 6 * (STEPS - 1)}
    # two blocks of the token refiner
    whole = 288 + 96 * reference
    refiner = {not_video(n, whole + n): 2 * STEPS for n in (7, 9)}
    assert kept_dense(handle) == refiner
    assert {layer for layer, _ in handle.latest().patterns} == {0, 1, 2}


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_keeping_every_block_of_hunyuan_15_equals_dense(load, image):
    extra = {"conditioning_byt5small": noise(1, 5, 1472)}
    if image:
        extra |= {
            "clip_vision_output": ClipVision(6, VISION_DIM),
            "concat_latent_image": noise(*VIDEO_15),
        }
    expected = sample(load("hunyuan_15"), VIDEO_15, steps=STEPS, extra=extra)
    model, handle = sparse(load("hunyuan_15"), sparsity=0.0)
    assert_same_video(sample(model, VIDEO_15, steps=STEPS, extra=extra), expected)
    assert calls(handle) == {"search": 4, "sparse": 4 * (STEPS - 1)}
    before = 5 + 6 * image
    assert kept_dense(handle) == {not_video(n, 288 + before + n): 2 * STEPS for n in (7, 9)}
    # the first prompt that came
    assert handle.latest().tokens in (288 + before + 7, 288 + before + 9)


PADDED = 4


def sample_padded(model):
    """Sample with a positive prompt whose last tokens are padding; no negative prompt."""
    import comfy.sample

    mask = torch.ones(1, 12, dtype=torch.int64)
    mask[:, -PADDED:] = 0
    latent = torch.zeros(VIDEO)
    start = comfy.sample.prepare_noise(latent, 1)
    return comfy.sample.sample(
        model, start, STEPS, 1.0, "euler", "simple", conditioning(12, 0, attention_mask=mask),
        conditioning(7, 2), latent, disable_pbar=True, seed=1,
    )  # fmt: skip


def test_keeping_every_block_of_padded_text_equals_dense(load):
    model, handle = sparse(load("hunyuan"), sparsity=0.0)
    assert_same_video(sample_padded(model), sample_padded(load("hunyuan")))
    assert calls(handle) == {"search": 3, "sparse": 3 * (STEPS - 1)}


def test_padded_text_is_never_read(load, monkeypatch):
    attend = RunState.attend
    compared = []

    def poisoned(self, call):
        out = attend(self, call)
        assert (call.key_bias[:, 12 - PADDED : 12] < -1e9).all()
        k, v = call.k.clone(), call.v.clone()
        k[..., 12 - PADDED : 12, :] = 40.0
        v[..., 12 - PADDED : 12, :] = 1e4
        # the same call again: a search has its mask now, so both kinds are seen
        again = attend(self, replace(call, k=k, v=v))
        exact = call.dense()
        for rows in (slice(0, 12), slice(12, None)):
            reference = again if call.step else exact
            error = (out - reference)[..., rows, :].abs().max().item()
            compared.append((call.step, error))
        return out

    monkeypatch.setattr(RunState, "attend", poisoned)
    model, _ = sparse(load("hunyuan"), sparsity=0.6)
    sample_padded(model)
    assert len(compared) == 2 * 3 * STEPS
    assert max(error for _, error in compared) < 1e-4


def test_text_rows_equal_dense_at_high_sparsity(load, monkeypatch):
    attend = RunState.attend
    errors = []

    def compared(self, call):
        out = attend(self, call)
        if call.step:
            text = call.layout.before
            error = (out - call.dense()).abs().amax((0, 1, 3))
            errors.append((error[:text].max().item(), error[text:].max().item()))
        return out

    monkeypatch.setattr(RunState, "attend", compared)
    model, handle = sparse(load("hunyuan"), sparsity=0.9)
    sample(model, steps=STEPS)
    assert len(errors) == calls(handle)["sparse"] == 12
    text, video = zip(*errors, strict=True)
    assert max(text) < 1e-5
    assert min(video) > 1e-2
