"""Weights of every kind ComfyUI stores: ours sees the same q, k and v, whatever made them."""

import json

import pytest
import torch

from tests.host.host_fixtures import assert_other_video, assert_same_video, calls, sparse
from tests.host.host_fixtures import sample as sample_more

FP8 = torch.float8_e4m3fn
# self-attentions over the video in one call of the model
LAYERS = {"wan_h64": 2, "hunyuan": 3}


def sample(model):
    return sample_more(model, steps=2, cfg=1.0)


def all_calls(name):
    return {"search": LAYERS[name], "sparse": LAYERS[name]}


def load_file(model_paths, name, **options):
    """A ModelPatcher of its own, for tests that change where or how weights lie."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(model_paths[name]), model_options=options)


def assert_served(patcher, name, tolerance=1e-4):
    """Keeping every block equals dense, and every self-attention over the video is ours."""
    expected = sample(patcher)
    model, handle = sparse(patcher, sparsity=0.0)
    assert_same_video(sample(model), expected, tolerance)
    assert calls(handle) == all_calls(name)
    # else all might have been kept by accident
    model, handle = sparse(patcher)
    assert_other_video(sample(model), expected)
    assert calls(handle) == all_calls(name)
    return expected


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


# ---- stored in eight bits, computed in more


@pytest.mark.parametrize(
    "options",
    [{"dtype": FP8}, {"dtype": torch.float8_e5m2}, {"dtype": FP8, "fp8_optimizations": True}],
    ids=["fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fn_fast"],
)
def test_weights_stored_in_fp8(model_paths, load, name, options):
    # the three choices of ComfyUI's own loader
    patcher = load_file(model_paths, name, **options)
    stored = {parameter.dtype for parameter in patcher.model.diffusion_model.parameters()}
    assert options["dtype"] in stored
    out = assert_served(patcher, name)
    assert_other_video(out, sample(load(name)), 0.01)


def quantised(model_paths, name, kind):
    """A checkpoint whose linear layers are quantised as published ones are, with a scale each."""
    from safetensors import safe_open

    with safe_open(model_paths[name], "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    layers = {}
    for key in list(weights):
        layer, weight = key.removesuffix(".weight"), weights[key]
        if layer == key or weight.ndim != 2 or "blocks." not in key or "mod" in key:
            continue
        most = 127 if kind == "int8" else torch.finfo(FP8).max
        scale = weight.abs().max() / most
        rounded = (weight / scale).round() if kind == "int8" else weight / scale
        weights[key] = rounded.to(torch.int8 if kind == "int8" else FP8)
        weights[f"{layer}.{'scale_weight' if kind == 'old fp8' else 'weight_scale'}"] = scale
        layers[layer] = {"format": "int8_tensorwise" if kind == "int8" else "float8_e4m3fn"}
    if kind == "old fp8":
        weights["scaled_fp8"] = torch.zeros(0, dtype=FP8)
    else:
        described = {"format_version": "1.0", "layers": layers}
        metadata["_quantization_metadata"] = json.dumps(described)
    return weights, metadata


@pytest.mark.parametrize("kind, tolerance", [("old fp8", 1e-4), ("fp8", 1e-4), ("int8", 0.06)])
def test_quantised_checkpoints(comfyui, model_paths, load, name, kind, tolerance):
    import comfy.quant_ops
    import comfy.sd

    if kind == "int8" and "int8_tensorwise" not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip("this ComfyUI reads no INT8 checkpoints")
    weights, metadata = quantised(model_paths, name, kind)
    patcher = comfy.sd.load_diffusion_model_state_dict(weights, metadata=metadata)
    held = [getattr(m, "weight", None) for m in patcher.model.diffusion_model.modules()]
    assert sum(isinstance(weight, comfy.quant_ops.QuantizedTensor) for weight in held) == 20
    # INT8 layers round what they are given too, which makes steps of small differences
    out = assert_served(patcher, name, tolerance)
    assert_other_video(out, sample(load(name)), 0.01)


# ---- LoRA


def lora(patcher):
    """A LoRA for the linear layers of every block, as a file would hold it."""
    generator = torch.Generator().manual_seed(8)
    weights = {}
    for key, weight in patcher.model_state_dict().items():
        name = key.removesuffix(".weight")
        if name == key or weight.ndim != 2 or "blocks." not in key or "mod." in key:
            continue
        rows, columns = weight.shape
        weights[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.05
        weights[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.05
        weights[f"{name}.alpha"] = torch.tensor(4.0)
    return weights


def with_lora(patcher):
    """As ComfyUI's LoRA nodes do."""
    import comfy.sd

    model, _ = comfy.sd.load_lora_for_models(patcher, None, lora(patcher), 1.0, 0.0)
    assert model.patches
    return model


@pytest.mark.parametrize("options", [{}, {"dtype": FP8}], ids=["fp32", "fp8"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_before_and_after_ours(model_paths, name, options, order):
    patcher = load_file(model_paths, name, **options)
    expected = sample(with_lora(patcher))
    if order == "before":
        model, handle = sparse(with_lora(patcher), sparsity=0.0)
    else:
        model, handle = sparse(patcher, sparsity=0.0)
        model = with_lora(model)
    assert_same_video(sample(model), expected)
    assert calls(handle) == all_calls(name)
    assert_other_video(expected, sample(patcher))


# ---- a model that is loaded in part only


@pytest.fixture
def little_memory(monkeypatch):
    """Have ComfyUI load models in part, as it does when a GPU is too small."""
    import comfy.model_management

    loaded = comfy.model_management.LoadedModel
    model_load = loaded.model_load

    def partly(self, lowvram_model_memory=0, force_patch_weights=False):
        more = self.model.model_size() // 2 - self.model.loaded_size()
        # none at all would mean without a limit
        return model_load(self, max(more, 0.1), force_patch_weights)

    monkeypatch.setattr(loaded, "model_load", partly)


@pytest.mark.parametrize("changed", [False, True], ids=["plain", "lora"])
def test_model_loaded_in_part(model_paths, load, little_memory, name, changed):
    def fresh():
        patcher = load_file(model_paths, name)
        return with_lora(patcher) if changed else patcher

    patcher = fresh()
    expected = assert_served(patcher, name)
    # weights that stay behind are cast, and patched, at every call of their layer
    assert patcher.model.model_lowvram
    assert 0 < patcher.loaded_size() < patcher.model_size()
    assert bool(patcher.lowvram_patch_counter()) == changed
    if not changed:
        assert_same_video(expected, sample(load(name)))


def test_model_that_is_unloaded_between_two_runs(model_paths, little_memory):
    import comfy.model_management

    patcher = load_file(model_paths, "wan_h64")
    model, handle = sparse(patcher)
    first = sample(model)
    comfy.model_management.unload_all_models()
    assert_same_video(sample(model), first)
    assert [len(run.timing.search) for run in handle.runs] == [2, 2]
