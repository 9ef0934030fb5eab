"""The nodes as ComfyUI sees them: their schema, what they refuse, what they show."""

import re
from itertools import pairwise

import pytest
import torch

from tests.host.host_fixtures import VIDEO, assert_same_video, conditioning, sample
from tests.tools import comfy_inprocess

SOCKETS = {
    "AdaSpaAttention": ["model"],
    "AdaSpaReport": ["samples", "adaspa"],
    "AdaSpaForecast": ["model"],
}
# order and defaults are what saved workflows rely on: new widgets go last
WIDGETS = {
    "AdaSpaAttention": {
        "preset": "Balanced",
        "sparsity": 0.8,
        "block_size": "64",
        "warmup": 0.12,
        "search_points": "0.45",
        "head_adaptive": False,
        "dense_layers": "",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "min_tokens": 8192,
        "cache": "auto",
        "dense_attention": "auto",
        "enabled": True,
        "precision": "auto",
        "recall": 0.0,
        "tail": "pooled",
        "token_order": "similarity",
        "verdict": "auto",
    },
    "AdaSpaReport": {"layer": 0, "head": 0},
    "AdaSpaForecast": {"level": "off"},
}
OPTIONS = {
    "preset": ["Balanced", "Quality", "Fast", "Paper", "Custom"],
    "block_size": ["64", "128", "128x64"],
    "cache": ["auto", "gpu", "cpu"],
    "dense_attention": ["auto", "host"],
    "precision": ["auto", "bf16", "int8", "fp8"],
    "tail": ["pooled", "none"],
    "token_order": ["similarity", "position"],
    "verdict": ["auto", "sparse", "dense"],
    "level": ["off", "careful", "fast"],
}
# what the interface shows without unfolding
FACE = ["preset", "enabled"]
# those that workflows of the first version lack
LATER = [
    "head_adaptive", "dense_layers", "start_percent", "end_percent", "min_tokens", "cache",
    "dense_attention", "enabled", "precision", "token_order", "recall", "tail", "verdict",
]  # fmt: skip


@pytest.fixture
def nodes(comfyui, tmp_path):
    import folder_paths

    before = folder_paths.get_temp_directory()
    folder_paths.set_temp_directory(str(tmp_path))
    yield comfy_inprocess.nodes_of(comfy_inprocess.load_pack())
    folder_paths.set_temp_directory(before)


@pytest.fixture
def attention(nodes):
    """attention(model, **widgets) -> what the node returns, the other widgets at a default."""

    def run(model, **widgets):
        node = nodes["AdaSpaAttention"].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        return node.execute(model, **{**WIDGETS["AdaSpaAttention"], **widgets})

    return run


@pytest.fixture
def report(nodes):
    def run(samples, handle, layer=0, head=0):
        node = nodes["AdaSpaReport"].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        return node.execute(samples=samples, adaspa=handle, layer=layer, head=head)

    return run


def test_pack_offers_its_nodes(nodes):
    assert list(nodes) == [
        "AdaSpaAttention", "AdaSpaAttentionPair", "AdaSpaReport", "AdaSpaCompare",
        "AdaSpaSavePattern", "AdaSpaLoadPattern", "AdaSpaForecast",
    ]  # fmt: skip


YOUNGEST = ("precision", "recall", "tail", "token_order", "verdict")


@pytest.mark.parametrize("name", list(WIDGETS))
def test_inputs_keep_their_order_and_defaults(nodes, name):
    schema = nodes[name].GET_SCHEMA()
    assert [put.id for put in schema.inputs] == [*SOCKETS[name], *WIDGETS[name]]
    defaults = {put.id: put.default for put in schema.inputs if put.id in WIDGETS[name]}
    assert defaults == WIDGETS[name]
    assert schema.category == "model/patch"
    for put in schema.inputs:
        assert put.tooltip and len(put.tooltip) > 20, put.id
        if put.id in OPTIONS:
            assert put.options == OPTIONS[put.id]
        if put.id in WIDGETS[name]:
            folded = name == "AdaSpaAttention" and put.id not in FACE
            assert bool(put.advanced) == folded, put.id
            # a prompt saved before a widget came lacks it; an optional one in front of a required
            # one would move saved values
            assert bool(put.optional) == (put.id in YOUNGEST), put.id


def test_outputs_and_names_of_the_attention_node(nodes):
    schema = nodes["AdaSpaAttention"].GET_SCHEMA()
    assert schema.display_name == "AdaSpa"
    assert [put.io_type for put in schema.outputs] == ["MODEL", "ADASPA"]
    assert "sparse attention" in schema.search_aliases
    assert not schema.is_output_node


def test_outputs_and_names_of_the_report_node(nodes):
    schema = nodes["AdaSpaReport"].GET_SCHEMA()
    assert schema.display_name == "AdaSpa Report"
    assert [put.io_type for put in schema.outputs] == ["LATENT", "IMAGE", "STRING"]
    assert schema.is_output_node


def test_workflows_of_the_first_version_lack_younger_widgets(load, nodes):
    run = nodes["AdaSpaAttention"].PREPARE_CLASS_CLONE({"hidden_inputs": {}}).execute
    every = {**WIDGETS["AdaSpaAttention"], "preset": "Custom"}
    first = {name: value for name, value in every.items() if name not in LATER}
    assert run(load("wan_h64"), **first).args[1].config == (
        run(load("wan_h64"), **every).args[1].config
    )


def shown_text(output):
    return output.ui["text"][0]


def test_attention_node_tells_the_interface_which_settings_its_line_is_of(load, attention):
    output = attention(load("wan_h64"), preset="Fast", sparsity=0.3)
    (settings,) = output.ui["settings"]
    assert settings == {**WIDGETS["AdaSpaAttention"], "preset": "Fast", "sparsity": 0.3}


def test_attention_node_says_that_it_is_ready(load, attention):
    model, handle = attention(load("wan_h64")).args
    assert handle.config.sparsity == 0.8 and handle.config.warmup == 0.12
    text = shown_text(attention(load("wan_h64"), preset="Fast"))
    assert text == "Ready: Fast, sparsity 0.90."
    assert model is not load("wan_h64")


def test_attention_node_repeats_what_was_asked_for(load, attention):
    output = attention(load("wan_h64"), preset="Quality", recall=0.95, precision="int8")
    assert shown_text(output) == "Ready: Quality, recall 0.95.\nSparse steps in int8."
    config = output.args[1].config
    assert (config.recall, config.precision, config.sparsity) == (0.95, "int8", 0.7)


def test_attention_node_says_that_large_blocks_have_no_tail(load, attention):
    words = "blocks of 128 have no tail, that needs blocks of 64 keys"
    shown = {
        (block, tail): words in shown_text(
            attention(load("wan_h64"), preset="Custom", block_size=block, tail=tail)
        )
        for block in ("64", "128", "128x64")
        for tail in ("pooled", "none")
    }  # fmt: skip
    assert [key for key, said in shown.items() if said] == [("128", "pooled")]


def test_preset_decides_its_fields_and_leaves_the_others(load, attention):
    fields = {"sparsity": 0.3, "search_points": "0.5", "min_tokens": 100, "cache": "cpu"}
    config = attention(load("wan_h64"), preset="Paper", **fields).args[1].config
    assert (config.sparsity, config.search_points, config.head_adaptive) == (0.8, (0.6,), True)
    assert (config.min_tokens, config.cache) == (100, "cpu")
    config = attention(load("wan_h64"), preset="Custom", **fields).args[1].config
    assert (config.sparsity, config.search_points) == (0.3, (0.5,))


def test_attention_node_says_that_it_is_off(load, attention):
    output = attention(load("wan_h64"), enabled=False)
    assert shown_text(output) == "AdaSpa is off."
    assert_same_video(sample(output.args[0], steps=2), sample(load("wan_h64"), steps=2), 1e-6)


def test_attention_node_says_before_sampling_that_a_model_will_run_dense(load, attention):
    model = load("wan_h64")
    # any module that is no video model
    model.add_object_patch("diffusion_model", torch.nn.Linear(2, 2))
    text = shown_text(attention(model))
    assert text == "Everything will run dense: Linear is not a video model that AdaSpa knows."


@pytest.mark.parametrize(
    "widgets, words",
    [
        ({"sparsity": 1.0}, "`sparsity` must be from 0 to 0.98"),
        ({"search_points": "0.6, 0.3"}, "`search_points` must ascend"),
        ({"search_points": "0.05"}, "`search_points` must lie from the warm-up"),
        ({"search_points": "half"}, "`search_points` must be numbers"),
        ({"dense_layers": "first"}, "`dense_layers` must be numbers"),
        ({"block_size": "96"}, "`block_size` must be one of 64, 128, 128x64"),
        ({"head_adaptive": True, "sparsity": 0.1}, "`head_adaptive` needs"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "`start_percent` must be"),
        ({"precision": "int4"}, "`precision` must be one of"),
        ({"tail": "weighted"}, "`tail` must be one of"),
        ({"token_order": "raster"}, "`token_order` must be one of"),
        ({"verdict": "yes"}, "`verdict` must be one of auto, sparse, dense"),
        ({"recall": 0.05}, "`recall` must be 0 or from 0.1 to 0.999, got 0.05"),
        ({"recall": 0.9, "head_adaptive": True}, "`recall` gives every head the blocks"),
    ],
)
def test_bad_value_is_refused_before_sampling(load, attention, widgets, words):
    with pytest.raises(ValueError) as refused:
        attention(load("wan_h64"), preset="Custom", **widgets)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


# ---- the report


def assert_picture(output):
    _, image, text = output.args
    assert image.ndim == 4 and image.shape[0] == 1 and image.shape[3] == 3
    assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    assert output.ui["text"] == (text,) or output.ui["text"] == [text]
    (file,) = output.ui["images"]
    assert str(file["filename"]).endswith(".png")
    return image, text


@pytest.mark.parametrize("node", ["before_a_run", "bypassed"])
def test_report_without_a_run_says_so(load, attention, report, node):
    handle = attention(load("wan_h64")).args[1] if node == "before_a_run" else None
    latent = {"samples": torch.zeros(VIDEO)}
    output = report(latent, handle)
    assert output.args[0] is latent
    image, text = assert_picture(output)
    assert text == "AdaSpa has not run yet."
    # a line of text, no panels
    assert image.shape[1] < 200


def test_report_of_a_run_shows_text_and_patterns(load, attention, report):
    model, handle = attention(
        load("hunyuan"), preset="Custom", sparsity=0.6, warmup=0.0, min_tokens=64,
        search_points="", verdict="sparse",
    ).args  # fmt: skip
    latent = {"samples": sample(model)}
    output = report(latent, handle)
    image, text = assert_picture(output)
    # every line has other languages, those of the run's figures as well
    (said,) = output.ui["said"]
    assert [line["text"] for line in said if "code" not in line] == []
    assert "Steps: 1 search, 2-4 sparse" in [line["text"] for line in said]
    assert text == "\n".join(handle.latest().lines())
    assert "295 tokens, steps 1 search, 2-4 sparse" in text or "297 tokens" in text
    assert "Not the video's self-attention: 8 calls" in text
    assert image.shape[1] > 400 and image.shape[2] == 1120
    # other heads have other patterns; numbers past the last are the last
    other, _ = assert_picture(report(latent, handle, layer=2, head=1))
    past, _ = assert_picture(report(latent, handle, layer=99, head=99))
    assert not torch.equal(other, image)
    assert torch.equal(other, past)


def test_report_draws_tall_blocks(load, attention, report):
    settings = {"preset": "Custom", "sparsity": 0.6, "warmup": 0.0, "min_tokens": 64}
    model, handle = attention(load("wan_h64"), block_size="128x64", **settings).args
    latent = {"samples": sample(model)}
    pattern = handle.latest().patterns[0, "positive"]
    # 288 tokens
    assert pattern.block_map.shape[1:] == (3, 5)
    image, _ = assert_picture(report(latent, handle))
    assert image.shape[1] > 400


def test_report_of_a_dense_run_gives_the_reason(load, attention, report):
    model, handle = attention(load("wan_h64")).args
    image, text = assert_picture(report({"samples": sample(model)}, handle))
    assert re.match(r"Sampling took \S+ s\. Every call ran dense: ", text)
    assert "too short: 288 tokens, and `min_tokens` is 8,192" in text
    assert image.shape[1] < 400


def test_report_says_when_the_samples_are_not_the_run_s(load, attention, report):
    patched, handle = attention(load("wan_h64"), min_tokens=0).args
    out = sample(patched)
    assert "not the result" not in report({"samples": out}, handle).args[2]
    text = report({"samples": out + 1}, handle).args[2]
    assert text.startswith("These samples are not the result of the run below.")


def two_runs(load, attention):
    """One patched model in two samplers of other steps: their samples, and the handle."""
    settings = {
        "preset": "Custom", "sparsity": 0.6, "warmup": 0.0, "min_tokens": 64, "verdict": "sparse"
    }  # fmt: skip
    model, handle = attention(load("wan_h64"), **settings).args
    return [{"samples": sample(model, steps=steps)} for steps in (3, 5)], handle


def test_each_of_two_samplers_of_one_model_has_its_own_report(load, attention, report):
    latents, handle = two_runs(load, attention)
    pictures = []
    for latent, run in zip(latents, handle.runs, strict=True):
        for layer in (0, 1):
            image, text = assert_picture(report(latent, handle, layer=layer))
            assert text == "\n".join(run.lines())
            pictures.append(image)
    assert not any(torch.equal(a, b) for a, b in pairwise(pictures))
    # samples that went through half precision are still the run's
    half = {"samples": latents[0]["samples"].half().float()}
    assert report(half, handle).args[2] == "\n".join(handle.runs[0].lines())
    # of one that is kept no more nothing is claimed
    handle.runs.popleft()
    assert report(latents[0], handle).args[2].startswith("These samples are not the result of")


@pytest.mark.parametrize("last", [2, 10000], ids=["noise is left", "to the end"])
def test_the_denoised_output_has_the_report_of_its_run(load, attention, report, last):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import (
        BasicGuider,
        KSamplerSelect,
        RandomNoise,
        SamplerCustomAdvanced,
    )

    settings = {"preset": "Custom", "sparsity": 0.6, "warmup": 0.0, "min_tokens": 64}
    model, handle = attention(load("wan_h64"), **settings).args
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    with torch.no_grad():
        both = SamplerCustomAdvanced.execute(
            RandomNoise.execute(1).args[0],
            BasicGuider.execute(model, conditioning(7, 0)).args[0],
            KSamplerSelect.execute("euler").args[0],
            sigmas[: last + 1],
            {"samples": torch.zeros(VIDEO)},
        ).args
    sample(model, seed=2)
    for latent in both:
        assert report(latent, handle).args[2] == "\n".join(handle.runs[0].lines())


def test_a_latent_of_several_parts_is_told_from_another(load, attention, report):
    from comfy.nested_tensor import NestedTensor

    latents, handle = two_runs(load, attention)
    for latent, run in zip(latents, handle.runs, strict=True):
        parts = NestedTensor(list(latent["samples"].chunk(2, dim=1)))
        assert report({"samples": parts}, handle).args[2] == "\n".join(run.lines())


def test_report_says_that_adaspa_is_off(load, attention, report):
    handle = attention(load("wan_h64"), enabled=False).args[1]
    assert report({"samples": torch.zeros(VIDEO)}, handle).args[2] == "AdaSpa is off."
