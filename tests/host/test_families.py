"""Every video model of ComfyUI: which calls are taken, what stays exact, and that order holds."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from sparse_attn.run.state import RunState
from sparse_attn.sentences import ENGLISH
from tests.host.family_cases import (
    CASES,
    TEXT,
    TEXT_MASK,
    VIDEO,
    Case,
    ClipVision,
    guided,
    ltx,
    ltx_2,
    noise,
    not_video,
)
from tests.host.family_models import build
from tests.host.host_fixtures import (
    CROSS_ATTENTION,
    assert_other_video,
    assert_same_video,
    calls,
    kept_dense,
    sparse,
)
from tests.host.host_models import TEXT_DIM

STEPS = 2
GUIDE_MASK = "an attention mask of guide frames, which splits the queries"
# cases to run with one frame, one for each rule
IMAGES = ("wan", "cogvideox", "ltx", "mochi", "cosmos", "predict2", "kandinsky-lite", "ltx-2")


@pytest.fixture(scope="module")
def patchers():
    return {}


@pytest.fixture
def patcher(comfyui, patchers):
    """patcher(name) -> a fresh clone of a tiny model; the weights are shared."""

    def patcher(name):
        if name not in patchers:
            patchers[name] = build(name)
        return patchers[name].clone()

    return patcher


def packed(tensors):
    from comfy.nested_tensor import NestedTensor

    return tensors[0] if len(tensors) == 1 else NestedTensor(list(tensors))


def flat(latent):
    return torch.cat([part.flatten() for part in latent.unbind()]) if latent.is_nested else latent


def sample(model, case, *, start=None, steps=STEPS, sampler="euler"):
    """Run ComfyUI's sampler with a positive prompt alone; returns one tensor."""
    import comfy.sample

    text = [[noise(1, TEXT, TEXT_DIM), {"pooled_output": noise(1, 768), **case.extra}]]
    start = start or [noise(*shape, seed=i) for i, shape in enumerate(case.shapes)]
    latent = [torch.zeros(shape) for shape in case.shapes]
    out = comfy.sample.sample(
        model, packed(start), steps, 1.0, sampler, "simple", text, text, packed(latent),
        disable_pbar=True, seed=1, noise_mask=case.mask,
    )  # fmt: skip
    return flat(out)


def per_run(per_call: dict) -> Counter:
    return Counter({reason: STEPS * count for reason, count in per_call.items()})


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_keeping_every_block_equals_dense(patcher, case, monkeypatch):
    layouts = set()
    attend = RunState.attend

    def noted(self, call):
        layouts.add(call.layout)
        return attend(self, call)

    monkeypatch.setattr(RunState, "attend", noted)
    expected = sample(patcher(case.model), case)
    model, handle = sparse(patcher(case.model), sparsity=0.0)
    assert_same_video(sample(model, case), expected)
    assert layouts == {case.layout}
    assert calls(handle) == {"search": case.taken, "sparse": case.taken * (STEPS - 1)}
    assert kept_dense(handle) == per_run(case.declined)
    assert not handle.latest().unseen


@pytest.mark.any_comfyui
@pytest.mark.parametrize("tail", ["pooled", "none"])
def test_extra_tokens_stay_exact_at_high_sparsity(patcher, case, tail, monkeypatch):
    attend = RunState.attend
    extra, video = [], []

    def compared(self, call):
        out = attend(self, call)
        if call.step:
            dense = call.dense()
            error = (out - dense).abs().amax((0, 1, 3)) / dense.abs().max()
            first, last = call.layout.before, call.layout.before + call.layout.video
            video.append(error[first:last].max().item())
            extra.append(torch.cat([error[:first], error[last:]]))
            assert extra[-1].numel() == case.layout.before + case.layout.after
        return out

    monkeypatch.setattr(RunState, "attend", compared)
    model, _ = sparse(patcher(case.model), sparsity=0.9, tail=tail)
    sample(model, case)
    assert len(video) == case.taken
    # else nothing was left out, and the next line would prove nothing; averages may come close
    assert min(video) > (1e-5 if tail == "pooled" else 1e-4)
    assert (torch.cat(extra) < 1e-5).all()


def test_video_tokens_lie_where_the_rule_says(patcher, case, monkeypatch):
    """Other noise in one patch moves one row of the first block's queries, and in all, its rows."""
    attend = RunState.attend
    queries = []

    def noted(self, call):
        if call.layer == 0:
            queries.append(call.q.clone())
        return attend(self, call)

    monkeypatch.setattr(RunState, "attend", noted)

    def run(change):
        queries.clear()
        start = [noise(*shape, seed=i) for i, shape in enumerate(case.shapes)]
        change(start[0])
        model, _ = sparse(patcher(case.model))
        sample(model, case, start=start)
        return queries[0]

    layout = case.layout
    made = layout.frames, layout.height, layout.width
    # guide frames are no part of the grid, and padding completes the last patch
    frames = case.shapes[0][2] - (0 if case.mask is None else case.mask.shape[2] - layout.frames)
    sizes = (frames, *case.shapes[0][3:])
    patch = [-(-size // count) for size, count in zip(sizes, made, strict=True)]
    t, h, w = (at * size for at, size in zip((1, 2, 5), patch, strict=True))

    def one(latent):
        latent[..., t, h, w] += 1.0

    def every(latent):
        latent[:, :, :frames] += noise(*latent[:, :, :frames].shape, seed=9)

    before = run(lambda latent: None)
    for change, rows in (
        (one, [layout.before + (1 * layout.height + 2) * layout.width + 5]),
        (every, list(range(layout.before, layout.before + layout.video))),
    ):
        moved = (run(change) - before).abs().amax((0, 1, 3)) > 1e-6
        assert moved.nonzero().flatten().tolist() == rows


@pytest.mark.parametrize("name", IMAGES)
def test_one_frame_is_an_image(patcher, name):
    case = CASES[name]
    shapes = ((*case.shapes[0][:2], 1, *case.shapes[0][3:]), *case.shapes[1:])
    image = Case(case.model, shapes, case.layout, 0, extra=case.extra)
    expected = sample(patcher(image.model), image)
    model, handle = sparse(patcher(image.model), sparsity=0.9, min_tokens=64)
    assert torch.equal(sample(model, image), expected)
    assert calls(handle) == {}
    assert kept_dense(handle)["one frame is an image, not a video"] == STEPS * case.taken


def test_attention_masks_of_guides_run_dense_and_say_so(patcher):
    case = ltx(1, 96, **guided(1, strength=0.5))
    expected = sample(patcher("ltxv"), case)
    model, handle = sparse(patcher("ltxv"), sparsity=0.9)
    assert torch.equal(sample(model, case), expected)
    assert calls(handle) == {}
    # two layers, whose queries come in two parts: video, and guides
    assert kept_dense(handle) == per_run({CROSS_ATTENTION: 2, GUIDE_MASK: 4})


def test_guides_of_an_audio_video_model(patcher):
    frames = guided(1)
    case = ltx_2(20, {not_video(20, 480): 2})
    shapes = ((1, 16, 5, 8, 12), case.shapes[1])
    mask = packed([frames["mask"].expand(shapes[0]), torch.ones(shapes[1])])
    # its text passes through a stage that fills it up, so it needs no mask
    extra = {key: value for key, value in frames["extra"].items() if key not in TEXT_MASK}
    case = Case("ltxav", shapes, case.layout, 2, case.declined, extra, mask)
    expected = sample(patcher("ltxav"), case)
    model, handle = sparse(patcher("ltxav"), sparsity=0.0)
    assert_same_video(sample(model, case), expected)
    assert calls(handle) == {"search": 2, "sparse": 2}
    assert kept_dense(handle) == per_run(case.declined)
    assert handle.latest().tokens == 480


def test_speech_patches_of_multitalk_run_beside_ours(patcher):
    """Their attention to sound comes without options, so it never asks for an override."""
    import comfy.ops

    multitalk = pytest.importorskip("comfy.ldm.wan.model_multitalk")
    torch.manual_seed(3)
    reads = multitalk.SingleStreamMultiAttention(
        256, 32, num_heads=2, qkv_bias=True, device="cpu", dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    for parameter in reads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    block = SimpleNamespace(norm_x=torch.nn.LayerNorm(256), audio_cross_attn=reads)
    patch = multitalk.MultiTalkCrossAttnPatch(
        SimpleNamespace(model=SimpleNamespace(blocks=[block, block]))
    )

    def talking(model):
        model = model.clone()
        model.set_model_attn2_patch(lambda inputs: patch(inputs))
        # four tokens of sound for each latent frame
        model.model_options["transformer_options"]["audio_embeds"] = noise(3, 4, 32)
        return model

    case = CASES["wan"]
    expected = sample(talking(patcher("wan")), case)
    model, handle = sparse(talking(patcher("wan")), sparsity=0.0)
    assert_same_video(sample(model, case), expected)
    assert calls(handle) == {"search": 2, "sparse": 2}
    assert kept_dense(handle) == per_run(case.declined)
    assert_other_video(expected, sample(patcher("wan"), case))


# ---- which block a call belongs to


@pytest.mark.parametrize(
    "name, listed, taken, dense",
    [
        ("ltx", (0,), {1}, 1), ("ltx", (-1,), {0}, 1), ("mochi", (1,), {0}, 1),
        # a VACE block shares the number of the block it follows
        ("vace", (0,), {1}, 2), ("vace", (-1,), {0, 2}, 1),
    ],
)  # fmt: skip
def test_dense_layers_of_counted_and_of_repeated_blocks(patcher, name, listed, taken, dense):
    case = CASES[name]
    model, handle = sparse(patcher(case.model), dense_layers=listed)
    sample(model, case)
    assert {layer for layer, _ in handle.latest().patterns} == taken
    assert calls(handle) == {"search": len(taken), "sparse": len(taken)}
    assert kept_dense(handle)["listed in `dense_layers`"] == STEPS * dense


@pytest.mark.parametrize("name", ["ltx", "cogvideox", "minimax"])
def test_counted_blocks_keep_their_state_when_a_step_calls_the_model_twice(patcher, name):
    case = CASES[name]
    expected = sample(patcher(case.model), case, steps=3, sampler="heun")
    model, handle = sparse(patcher(case.model), sparsity=0.0)
    assert_same_video(sample(model, case, steps=3, sampler="heun"), expected)
    # two calls in each step but the last
    assert calls(handle) == {"search": 2, "sparse": 8}


def test_a_pass_that_skips_blocks_keeps_to_the_layers_that_it_calls(patcher, monkeypatch):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    keys = []
    attend = RunState.attend

    def noted(self, call):
        keys.append(call.key)
        return attend(self, call)

    def skipping(model):
        settings = {"double_layers": "0", "single_layers": ""}
        out = SkipLayerGuidanceDiT.execute(model, 2.0, 0.0, 1.0, **settings)
        return out.args[0]

    case = CASES["ltx"]
    expected = sample(skipping(patcher("ltxv")), case)
    model, handle = sparse(skipping(patcher("ltxv")), sparsity=0.0)
    monkeypatch.setattr(RunState, "attend", noted)
    assert_same_video(sample(model, case), expected)
    # two layers, and the one that the second pass leaves
    assert calls(handle) == {"search": 2, "sparse": 4}
    assert len(set(keys)) == 2


# ---- models that do not run as they look


def test_causal_model_frame_by_frame_runs_dense(patcher):
    import comfy.sample
    import comfy.samplers

    def run(model):
        sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 3})
        text = [[noise(1, TEXT, TEXT_DIM), {}]]
        return comfy.sample.sample_custom(
            model, noise(*VIDEO[0]), 1.0, sampler, torch.tensor([1.0, 0.6, 0.0]), text, text,
            torch.zeros(VIDEO[0]), disable_pbar=True, seed=1,
        )  # fmt: skip

    expected = run(patcher("causal"))
    model, handle = sparse(patcher("causal"), sparsity=0.9)
    assert torch.equal(run(model), expected)
    assert handle.latest().finished
    # its blocks do not even offer their attention to overrides
    assert calls(handle) == {}
    assert kept_dense(handle) == {}


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_animate_2_is_sparse_once_the_motion_lets_go(patcher, sparsity):
    """In context windows and with the cache of its pose branch, as the graph for it is."""
    import comfy.sample

    pytest.importorskip("comfy.ldm.wan.model_animate2")
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
    from comfy_extras.nodes_wan import WanAnimate2Cache

    shape, steps, steered = (1, 16, 5, 16, 24), 8, 4
    plain = {"pooled_output": noise(1, 768), "clip_vision_output": ClipVision()}
    steering = {**plain, "pose_video_latent": noise(1, 16, 4, 16, 24), "end_percent": 0.45}
    text = noise(1, TEXT, TEXT_DIM)
    prompts = [[text, steering], [text, {**plain, "start_percent": 0.45}]]

    def run(model):
        model = WanAnimate2Cache.execute(model, "cpu").args[0]
        windows = WanContextWindowsManualNode.execute(
            model, 9, 4, "standard_static", 1, False, "pyramid", False, True
        ).args[0]
        return comfy.sample.sample(
            windows, noise(*shape), steps, 1.0, "euler", "simple", prompts, prompts,
            torch.zeros(shape), disable_pbar=True, seed=1,
        )  # fmt: skip

    expected = run(patcher("animate_2"))
    model, handle = sparse(patcher("animate_2"), sparsity=sparsity, start_percent=0.5)
    (assert_other_video if sparsity else assert_same_video)(run(model), expected)
    # two layers in two windows
    assert calls(handle) == {"search": 4, "sparse": 4 * (steps - steered - 1)}
    assert {ENGLISH["why_pose_keys"], CROSS_ATTENTION} == set(kept_dense(handle))
    kinds = [kind.value for kind in handle.latest().schedule.kinds]
    assert kinds == ["dense"] * steered + ["search"] + ["sparse"] * (steps - steered - 1)


def test_seedvr_still_keeps_its_attention_to_itself(comfyui):
    """Were this to change, it could be served."""
    import inspect

    attention = pytest.importorskip("comfy.ldm.seedvr.attention")
    assert "transformer_options" not in inspect.getsource(attention)


MODULES = (
    "wan.model", "wan.model_animate", "wan.model_animate2", "wan.model_wandancer", "wan.ar_model",
    "hunyuan_video.model", "cogvideo.model", "lightricks.model", "lightricks.av_model",
    "genmo.joint_model.asymm_models_joint", "cosmos.model", "cosmos.predict2", "anima.model",
    "kandinsky5.model", "kandinsky6.model", "prism.model", "minimax.model", "seedvr.model",
)  # fmt: skip


def test_every_row_names_a_class_of_comfyui(comfyui):
    import importlib

    from sparse_attn.host.families import FAMILIES, NOT_SERVED

    known, missing = set(), set()
    for module in MODULES:
        try:
            known |= set(vars(importlib.import_module(f"comfy.ldm.{module}")))
        except ModuleNotFoundError:
            missing.add(module)
    absent = {*FAMILIES, *NOT_SERVED} - known
    young = {
        "wan.model_animate2": "WanAnimate2Model", "minimax.model": "MiniMaxH3Model",
        "seedvr.model": "NaDiT", "kandinsky6.model": "Kandinsky6NativeAVDiT",
        "prism.model": "Prism",
    }  # fmt: skip
    assert absent == {young[module] for module in missing}
