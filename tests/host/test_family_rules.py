"""The rules by themselves, on inputs that a run would not or should not produce."""

from types import SimpleNamespace

import pytest
import torch

from sparse_attn.token_layout import TokenLayout

VIDEO = (1, 16, 3, 16, 24)
WAN = SimpleNamespace(patch_size=(1, 2, 2), blocks=[None] * 2, dim=256, num_heads=2)
LTX = SimpleNamespace(transformer_blocks=[None] * 2, attention_head_dim=64)
H3 = SimpleNamespace(
    patch_size=(1, 2, 2), blocks=[SimpleNamespace(attn=SimpleNamespace(head_dim=128))]
)


@pytest.fixture
def rule(comfyui):
    """rule(class name, model, inputs, shape) -> what the family's rule says."""
    from sparse_attn.host.families import FAMILIES

    def rule(name, model, inputs=None, shape=VIDEO):
        text = torch.zeros(1, 7, 64)
        inputs = {"c_crossattn": text, "transformer_options": {}, **(inputs or {})}
        return FAMILIES[name].read(model, shape, inputs)

    return rule


def named(name):
    return type(name, (), {})()


def test_causal_wan_with_a_cache_is_declined(rule):
    assert rule("CausalWanModel", WAN) == TokenLayout(0, 3, 8, 12)
    reason = "a causal model that reads its past from a KV cache"
    assert rule("CausalWanModel", WAN, {"transformer_options": {"ar_state": {}}}) == reason


def test_animate_2_with_a_pose_branch_is_declined(rule):
    assert rule("WanAnimate2Model", WAN) == TokenLayout(0, 3, 8, 12)
    poses = {"pose_latents": torch.zeros(1, 16, 2, 16, 24)}
    assert rule("WanAnimate2Model", WAN, poses) == "every frame reads other pose keys"


def test_latents_that_are_no_whole_patches_are_padded_up(rule):
    assert rule("WanModel", WAN, shape=(1, 16, 3, 15, 23)) == TokenLayout(0, 3, 8, 12)


def test_wan_with_frames_of_subjects_behind_the_video_keeps_them(rule):
    more = {"time_dim_concat": torch.zeros(1, 16, 2, 16, 24)}
    assert rule("WanModel", WAN, more) == TokenLayout(0, 3, 8, 12, 192)


def test_scail_with_several_references_and_large_poses(rule):
    streams = {
        "reference_latent": torch.zeros(1, 20, 3, 16, 24),
        "pose_latents": torch.zeros(1, 20, 3, 16, 24),
    }
    assert rule("SCAIL2WanModel", WAN, streams) == TokenLayout(288, 3, 8, 12, 288)


@pytest.mark.parametrize(
    "guides, mask, reason",
    [
        (95, torch.ones(1, 1, 5, 8, 12), "95 guide tokens are not whole frames of 8x12"),
        (96, torch.ones(1, 1, 5, 1, 1), "a guide mask of [5, 1, 1] does not match the latent"),
        (96, -torch.ones(1, 1, 5, 8, 12), "the guide mask removes tokens of the video"),
    ],
)
def test_guides_that_do_not_add_up_are_declined(rule, guides, mask, reason):
    inputs = {"keyframe_idxs": torch.zeros(1, 3, guides, 2), "denoise_mask": mask}
    assert rule("LTXVModel", LTX, inputs, (1, 16, 5, 8, 12)) == reason


def test_cropped_guides_leave_the_video(rule):
    inputs = {"keyframe_idxs": torch.zeros(1, 3, 0, 2)}
    assert rule("LTXVModel", LTX, inputs, (1, 16, 4, 8, 12)) == TokenLayout(0, 4, 8, 12)


def minimax(*segments, text=7):
    return {"minimax_payload": {"layout": SimpleNamespace(segments=segments, signature=(text,))}}


@pytest.mark.parametrize(
    "inputs, reason",
    [
        ({}, "its token layout is not known before the model runs"),
        ({"minimax_payload": None}, "its token layout is not known before the model runs"),
        (minimax((0, 9, "text"), text=9), "its token layout is not known before the model runs"),
        (
            minimax((0, 7, "text"), (7, 295, "audio")),
            "its token layout does not end in 288 video tokens",
        ),
        (
            minimax((0, 7, "text"), (7, 294, "video")),
            "its token layout does not end in 288 video tokens",
        ),
    ],
)
def test_minimax_without_a_fitting_layout_is_declined(rule, inputs, reason):
    assert rule("MiniMaxH3Model", H3, inputs) == reason


def test_anima_makes_images(rule):
    model = SimpleNamespace(
        patch_temporal=1, patch_spatial=2, blocks=[None], model_channels=256, num_heads=2
    )
    assert rule("Anima", model, shape=(1, 16, 1, 16, 24)).frames == 1


@pytest.mark.parametrize(
    "model, reason",
    [
        (
            named("NaDiT"),
            "SeedVR2 attends in small windows, out of the reach of attention overrides",
        ),
        (named("Flux"), "Flux is not a video model that AdaSpa knows"),
    ],
)
def test_models_without_a_family_have_a_reason(comfyui, model, reason):
    from sparse_attn.host.families import family_of

    assert family_of(model) == (None, reason)


def test_image_variants_of_video_classes_have_a_reason(comfyui):
    from sparse_attn.host.families import family_of

    model = named("HunyuanVideo")
    model.patch_size = [2, 2]
    assert family_of(model)[1] == "HunyuanVideo with 2-D patches makes images, not videos"


@pytest.mark.parametrize("error", [AttributeError, IndexError, KeyError, TypeError, ValueError])
def test_a_rule_that_fails_declines(comfyui, error):
    from sparse_attn.host.families import Family
    from sparse_attn.host.install import _layout

    def broken(*args):
        raise error("renamed")

    good = Family(
        "Wan",
        lambda *args: TokenLayout(0, 3, 8, 12),
        lambda model: {"double": [torch.nn.Identity()]},
    )
    x = torch.zeros(VIDEO)
    assert _layout(good, WAN, x, {}) == (TokenLayout(0, 3, 8, 12), "")
    for part in ("layout", "blocks", "head_dim", "beside"):
        family = Family(**{**vars(good), part: broken})
        layout, reason = _layout(family, WAN, x, {})
        assert layout is None
        assert reason.startswith("the rule for Wan no longer fits this ComfyUI (")


@pytest.mark.parametrize("x", [torch.zeros(1, 16, 16, 24), [torch.zeros(VIDEO)]])
def test_latents_that_are_not_videos_decline(comfyui, x):
    from sparse_attn.host.families import FAMILIES
    from sparse_attn.host.install import _layout

    layout, reason = _layout(FAMILIES["WanModel"], WAN, x, {})
    assert layout is None
    assert reason.endswith("is not a video")


def test_packed_latents_are_read_by_their_shapes(comfyui):
    from sparse_attn.host.families import FAMILIES
    from sparse_attn.host.install import _layout

    inputs = {"latent_shapes": [[1, 16, 4, 8, 12], [1, 8, 20, 16]]}
    flat = torch.zeros(1, 1, 16 * 384 + 8 * 20 * 16)
    assert _layout(FAMILIES["LTXAVModel"], LTX, flat, inputs) == (TokenLayout(0, 4, 8, 12), "")
    single = {"latent_shapes": [[1, 8, 20, 16], [1, 16, 4, 8, 12]]}
    assert _layout(FAMILIES["LTXAVModel"], LTX, flat, single)[0] is None
