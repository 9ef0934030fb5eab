"""The rules by themselves, on inputs that a run would not or should not produce."""

from types import SimpleNamespace

import pytest
import torch

from sparse_attn.sentences import ENGLISH
from sparse_attn.token_layout import TokenLayout

pytestmark = pytest.mark.any_comfyui

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
    assert rule("WanAnimate2Model", WAN, poses) == ENGLISH["why_pose_keys"]


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


# ---- models that no ComfyUI here has, from their source


def kandinsky_6():
    attention = SimpleNamespace(head_dim=128)
    blocks = [SimpleNamespace(videoT=SimpleNamespace(self_attention=attention)) for _ in range(3)]
    return SimpleNamespace(patch_size=(1, 2, 2), visual_blocks=blocks)


@pytest.mark.parametrize(
    ("inputs", "layout"),
    [
        ({}, TokenLayout(0, 3, 8, 12)),
        # appended by the model, or by a node
        ({"k6_reference": torch.zeros(1, 16, 1, 16, 24)}, TokenLayout(0, 3, 8, 12, 96)),
        ({"k6_reference_tail": True}, TokenLayout(0, 2, 8, 12, 96)),
    ],
)
def test_kandinsky_6_keeps_its_first_image_beside_the_video(rule, inputs, layout):
    assert rule("Kandinsky6NativeAVDiT", kandinsky_6(), inputs) == layout


def prism():
    def blocks(count):
        return [torch.nn.Identity() for _ in range(count)]

    return SimpleNamespace(
        fusion_blocks=[SimpleNamespace(video_block=block) for block in blocks(2)],
        remaining_video_blocks=blocks(1),
        video_dit=SimpleNamespace(head_dim=128),
        video_dit_2=SimpleNamespace(blocks=blocks(3)),
    )


def test_prisms_experts_share_the_numbers_of_their_layers_and_nothing_else(rule):
    from sparse_attn.host.families import FAMILIES

    model, family = prism(), FAMILIES["Prism"]
    assert rule("Prism", model) == TokenLayout(0, 3, 8, 12)
    listed = family.listed(model)
    assert [block.number for _, block in listed] == [0, 1, 2, 0, 1, 2]
    assert len({id(module) for module, _ in listed}) == len({block for _, block in listed}) == 6
    # one expert runs in a call of the model
    assert family.num_calls(model) == family.num_layers(model) == 3
    own = {"transformer_options": {"prism_attention": "prism_sparse"}}
    assert rule("Prism", model, own) == "Prism's own sparse attention serves the video"


def test_fast_h3_is_declined_before_the_run(comfyui):
    from sparse_attn.host.families import family_of

    def h3(**attention):
        model = named("MiniMaxH3Model")
        model.blocks = [SimpleNamespace(attn=SimpleNamespace(head_dim=128, **attention))]
        return model

    reason = "FastH3's weights are trained for a sparse attention of their own"
    assert family_of(h3(to_gate_compress=torch.nn.Linear(2, 2))) == (None, reason)
    # newer hosts have the attribute in plain models too
    for plain in (h3(), h3(to_gate_compress=None)):
        assert family_of(plain)[0].name == "MiniMax-H3"


def test_keyframes_that_ltx_makes_itself_stand_behind_the_video(rule):
    """LTX-2.5 appends frames to be made, with a mask of one, as guides have one of zero."""
    shape = (1, 128, 6, 8, 12)
    inputs = {
        "keyframe_idxs": torch.zeros(1, 3, 2 * 96, 2),
        "denoise_mask": torch.ones(1, 1, 6, 8, 12),
    }
    assert rule("LTXAVModel", LTX, inputs, shape) == TokenLayout(0, 4, 8, 12, 192)
