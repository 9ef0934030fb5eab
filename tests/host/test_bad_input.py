"""Bad input gets a clear answer: refused before sampling in one sentence, or dense and said so."""

from dataclasses import replace

import pytest
import torch

from sparse_attn.config import AdaSpaConfig, from_preset, parse_numbers
from sparse_attn.host.host_call import LOWEST_BIAS, key_bias_of
from tests.host.host_fixtures import VIDEO, assert_same_video, calls, kept_dense, sample, sparse


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"sparsity": -0.1}, "`sparsity` must be from 0 to 0.98"),
        ({"sparsity": 0.99}, "Try 0.8"),
        ({"sparsity": float("nan")}, "`sparsity` must be"),
        ({"block_size": "96"}, "`block_size` must be one of 64, 128, 128x64"),
        ({"warmup": 1.0}, "`warmup` must be a share"),
        ({"warmup": -0.1}, "`warmup` must be a share"),
        ({"search_points": (0.6, 0.3)}, "`search_points` must ascend"),
        ({"search_points": (0.6, 0.6)}, "`search_points` must ascend"),
        ({"search_points": (0.1,), "warmup": 0.2}, "must lie from the warm-up"),
        ({"search_points": (1.0,)}, "to below 1"),
        ({"head_adaptive": True, "sparsity": 0.2}, "Raise the sparsity"),
        ({"start_percent": 0.6, "end_percent": 0.4}, "below `end_percent`"),
        ({"end_percent": 1.5}, "at most 1"),
        ({"min_tokens": -1}, "`min_tokens` must be 0 or more"),
        ({"cache": "disk"}, "`cache` must be one of"),
        ({"dense_attention": "sage"}, "`dense_attention` must be one of"),
    ],
)
def test_values_out_of_range_are_refused(fields, words):
    with pytest.raises(ValueError) as refused:
        AdaSpaConfig(**fields)
    message = str(refused.value)
    assert words in message
    assert len(message) < 200 and "\n" not in message


def test_text_that_is_no_list_of_numbers_is_refused():
    with pytest.raises(ValueError, match=r"`search_points` must be numbers .* got '0\.3 0\.6'"):
        parse_numbers("0.3 0.6", float, "search_points")
    with pytest.raises(ValueError, match=r"Example: 0, 1, -1"):
        parse_numbers("first", int, "dense_layers")
    assert parse_numbers(" 0.3, 0.6 ,", float, "search_points") == (0.3, 0.6)
    assert parse_numbers("", int, "dense_layers") == ()


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="`preset` must be one of"):
        from_preset("Turbo")


def assert_dense(model, handle, expected, reason, **options):
    out = sample(model, **options)
    assert_same_video(out, expected, 1e-6)
    assert not handle.latest().patterns
    assert any(reason in found for found in kept_dense(handle)), dict(kept_dense(handle))
    summary = handle.latest().summary()
    assert "Every call ran dense: " in summary
    assert any(reason in line for line in handle.latest().lines())


@pytest.mark.parametrize("name", ["wan_h64", "hunyuan"])
def test_one_frame_runs_dense(load, name):
    image = (1, 16, 1, 32, 32)
    expected = sample(load(name), image)
    model, handle = sparse(load(name))
    assert_dense(model, handle, expected, "one frame is an image", shape=image)


def test_fewer_tokens_than_the_minimum_run_dense(load):
    expected = sample(load("wan_h64"))
    model, handle = sparse(load("wan_h64"), min_tokens=289)
    reason = "too short: 288 tokens, and `min_tokens` is 289"
    assert_dense(model, handle, expected, reason)
    model, handle = sparse(load("wan_h64"), min_tokens=288)
    sample(model)
    assert calls(handle) == {"search": 4, "sparse": 12}


@pytest.mark.parametrize("frames, fields", [(2, {}), (3, {"sparsity": 0.98})])
def test_few_blocks_still_sample(load, frames, fields):
    # 2 x 4 x 4 = 32 tokens are half a block; 0.98 of five blocks leaves less than one
    shape = (1, 16, frames, 8, 8) if frames == 2 else VIDEO
    model, handle = sparse(load("wan_h64"), min_tokens=0, **fields)
    out = sample(model, shape)
    assert torch.isfinite(out).all()
    assert calls(handle) == {"search": 4, "sparse": 12}
    if frames == 2:
        assert_same_video(out, sample(load("wan_h64"), shape))


# ---- models


def test_image_model_runs_dense_and_says_so(load):
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    from sparse_attn.host.install import why_not

    config = comfy.supported_models.SD15(
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
            "num_res_blocks": [1, 1], "transformer_depth": [1, 1], "channel_mult": [1, 2],
            "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
            "num_heads": 4, "context_dim": 64, "use_spatial_transformer": True,
            "use_linear_in_transformer": False, "adm_in_channels": None, "legacy": False,
            "use_temporal_attention": False,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    base = comfy.model_base.BaseModel(config)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    cpu = torch.device("cpu")
    unet = comfy.model_patcher.ModelPatcher(base, cpu, cpu)
    reason = "UNetModel is not a video model that AdaSpa knows"
    assert why_not(unet) == reason
    shape = (1, 4, 16, 16)
    expected = sample(unet, shape, steps=2)
    model, handle = sparse(unet)
    assert_dense(model, handle, expected, reason, shape=shape, steps=2)


def test_video_model_of_another_kind_runs_dense_and_says_so(load, monkeypatch):
    from sparse_attn.host.families import FAMILIES
    from sparse_attn.host.install import why_not

    expected = sample(load("wan_h64"))
    monkeypatch.delitem(FAMILIES, "WanModel")
    model, handle = sparse(load("wan_h64"))
    reason = "WanModel is not a video model that AdaSpa knows"
    assert why_not(model) == reason
    assert_dense(model, handle, expected, reason)


@pytest.mark.parametrize("part", ["layout", "blocks"])
def test_changed_model_runs_dense_and_says_so(load, monkeypatch, part):
    # a newer ComfyUI may rename what a rule reads
    from sparse_attn.host import families, install

    def broken(model, *args):
        return model.an_attribute_of_another_version

    wan = families.FAMILIES["WanModel"]
    family = replace(wan, **{part: broken})
    expected = sample(load("wan_h64"))
    monkeypatch.setattr(install, "family_of", lambda model: (family, ""))
    model, handle = sparse(load("wan_h64"))
    assert_dense(model, handle, expected, "the rule for Wan no longer fits this ComfyUI")


def test_tokens_nobody_foresaw_run_dense_and_say_so(load, monkeypatch):
    from sparse_attn.host import families, install
    from sparse_attn.token_layout import TokenLayout

    family = families.Family(
        "Wan", lambda *args: TokenLayout(0, 3, 8, 13), lambda model: {"double": model.blocks}
    )
    expected = sample(load("wan_h64"))
    monkeypatch.setattr(install, "family_of", lambda model: (family, ""))
    model, handle = sparse(load("wan_h64"))
    reason = "288 tokens are not the 312 of this model's video sequence"
    assert_dense(model, handle, expected, reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_floating_dtype_of_weights_is_served_on_a_cpu(load, model_paths, dtype):
    import comfy.sd

    patcher = comfy.sd.load_diffusion_model(
        str(model_paths["wan_h64"]), model_options={"dtype": dtype}
    )
    assert patcher.model.get_dtype() == dtype
    model, handle = sparse(patcher, sparsity=0.0)
    expected = sample(patcher, steps=2, cfg=1.0)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert_same_video(sample(model, steps=2, cfg=1.0), expected, tolerance)
    assert calls(handle) == {"search": 2, "sparse": 2}


def test_kernels_for_the_gpu_say_why_they_cannot_serve(load):
    model, handle = sparse(load("wan_h64"))
    sample(model)
    served = handle.latest().backend
    if torch.cuda.is_available():
        assert served
    else:
        assert served == "plain torch (Triton kernels: needs a CUDA tensor, got cpu)"


# ---- masks


@pytest.mark.parametrize(
    "shape", [(8, 8), (1, 8, 8), (1, 4, 8, 8), (1, 4, 1, 8), (1, 7), (3, 1, 8), (8,), (1,) * 5]
)
def test_unknown_mask_shape_has_a_reason(shape):
    bias, reason = key_bias_of(torch.zeros(shape), 2, 8)
    assert bias is None
    assert reason == f"its mask of shape {list(shape)} is not a key mask"


@pytest.mark.parametrize("shape", [(1, 8), (1, 1, 8), (2, 1, 8), (1, 1, 1, 8), (2, 1, 1, 8)])
def test_key_masks_become_a_bias(shape):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    bias, reason = key_bias_of(keep, 2, 8)
    assert reason == ""
    expected = torch.where(keep, 0.0, LOWEST_BIAS).reshape(-1, 8).expand(2, 8)
    assert torch.equal(bias, expected)
    lowest = torch.zeros(shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    assert torch.equal(key_bias_of(lowest, 2, 8)[0], expected)


def test_unknown_mask_runs_dense_and_says_so(load, monkeypatch):
    from sparse_attn.host import model_call

    original = model_call.key_bias_of
    square = torch.zeros(288, 288)

    def with_mask(mask, batch, tokens):
        return original(square, batch, tokens)

    expected = sample(load("wan_h64"))
    monkeypatch.setattr(model_call, "key_bias_of", with_mask)
    model, handle = sparse(load("wan_h64"))
    assert_dense(model, handle, expected, "its mask of shape [288, 288] is not a key mask")


# ---- settings that keep parts dense


@pytest.mark.parametrize(
    "listed, taken", [((0,), {1, 2}), ((-1,), {0, 1}), ((0, -1), {1}), ((7, -9), {0, 1, 2})]
)
def test_dense_layers_count_from_both_ends(load, listed, taken):
    model, handle = sparse(load("hunyuan"), dense_layers=listed)
    sample(model)
    assert {layer for layer, _ in handle.latest().patterns} == taken
    n = 2 * len(taken)
    assert calls(handle) == {"search": n, "sparse": 3 * n}
    assert kept_dense(handle)["listed in `dense_layers`"] == (3 - len(taken)) * 8


def test_all_layers_dense_equals_dense(load):
    expected = sample(load("wan_h64"))
    model, handle = sparse(load("wan_h64"), dense_layers=(0, 1))
    assert_dense(model, handle, expected, "listed in `dense_layers`")


def test_cache_on_the_cpu_gives_the_same_video(load):
    on_gpu, _ = sparse(load("wan_h64"), search_points=(0.5,), cache="gpu")
    on_cpu, handle = sparse(load("wan_h64"), search_points=(0.5,), cache="cpu")
    assert torch.equal(sample(on_cpu), sample(on_gpu))
    assert handle.latest().memory.place == "cpu"


def test_dense_layers_that_the_model_lacks_are_said(load):
    model, handle = sparse(load("wan_h64"), dense_layers=(0, 99))
    sample(model)
    (warning,) = handle.latest().warnings
    assert warning.startswith("`dense_layers` lists [99], and this model has layers 0 to ")


# ---- a host, or another pack, that tells less than ComfyUI does


def with_options(model, change):
    """Change what every attention call is told, from inside the model."""
    import comfy.patcher_extension

    def wrapper(executor, *args, **kwargs):
        options = [a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "uuids" in a]
        for known in options:
            change(known)
        assert options
        return executor(*args, **kwargs)

    model = model.clone()
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    model.add_wrapper_with_key(kind, "test", wrapper)
    return model


UNNAMED = "the host does not name its conditionings"


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda options: options.pop("uuids"), UNNAMED),
        (lambda options: options.pop("cond_or_uncond"), UNNAMED),
        (lambda options: options.update(uuids=[]), UNNAMED),
        (lambda options: options.update(cond_or_uncond=[0, 1]), UNNAMED),
        # a batch that two conditionings cannot share evenly
        (lambda options: options.update(uuids=[1, 2], cond_or_uncond=[0, 1]), UNNAMED),
        (lambda options: options.update(context_window={}), "a context window of an unknown kind"),
    ],
    ids=["no_uuids", "no_roles", "empty", "more_roles", "odd_batch", "window"],
)
def test_calls_that_are_not_named_run_dense_and_say_so(load, change, reason):
    expected = sample(load("wan_h64"))
    model, handle = sparse(load("wan_h64"))
    assert_dense(with_options(model, change), handle, expected, reason)


def test_a_masked_key_has_no_weight_whatever_its_logit():
    """As large as float16 has them, and added in float32 without becoming infinite."""
    bias, _ = key_bias_of(torch.tensor([[False, True]]), 1, 2)
    largest = torch.finfo(torch.float16).max
    for logits in ([largest, 0.0], [largest, -largest], [0.0, largest]):
        biased = torch.tensor([logits]) + bias
        assert biased.isfinite().all() and biased.softmax(-1).tolist() == [[0.0, 1.0]]
