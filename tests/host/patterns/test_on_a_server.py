"""Patterns from prompt to prompt."""

import os

import pytest
import torch
from safetensors.torch import save_file

from tests.host.test_server import graph, node, text_of
from tests.tools.comfy_server import PromptFailed


def test_a_pattern_of_one_prompt_serves_the_next(comfy_server):
    first = graph(warmup=0.0, seed=61)
    first["keep"] = node(
        "AdaSpaSavePattern", model=["adaspa", 0], adaspa=["adaspa", 1], name="tower"
    )
    first["sampler"]["inputs"]["model"] = ["keep", 0]
    entry = comfy_server.post(first)
    assert "Pattern saved: tower.safetensors, " in text_of(entry, "report")

    second = graph(warmup=0.0, seed=61, min_tokens=65)
    second["carried"] = node(
        "AdaSpaLoadPattern", model=["adaspa", 0], adaspa=["adaspa", 1],
        file="tower.safetensors [output]",
    )  # fmt: skip
    second["sampler"]["inputs"]["model"] = ["carried", 0]
    second["report"]["inputs"]["adaspa"] = ["carried", 1]
    entry = comfy_server.post(second)
    assert text_of(entry, "carried").startswith("Wan, 288 tokens (3x8x12 video), density 0.4")
    assert "Pattern of tower.safetensors: 4 masks used without a search" in text_of(entry, "report")
    second["carried"]["inputs"]["file"] = "../tower.safetensors"
    with pytest.raises(PromptFailed, match="not in list"):
        comfy_server.post(second)


def test_no_pattern_file_ends_the_thread_that_runs_prompts(comfy_server):
    """Whatever is chosen, the prompt fails with a sentence and the next one runs."""
    folder = comfy_server.base_directory / "output/adaspa"
    folder.mkdir(exist_ok=True)
    (folder / os.fsdecode(b"caf\xe9.safetensors")).write_bytes(b"no pattern")
    (folder / "broken.safetensors").write_bytes(b"no pattern")
    nested = {"format": "adaspa pattern", "version": "3", "crc32": "0", "layers": 9999 * "["}
    save_file({"mask.00000": torch.zeros(1)}, folder / "nested.safetensors", metadata=nested)
    options = comfy_server.object_info()["AdaSpaLoadPattern"]["input"]["required"]["file"]
    assert "broken.safetensors [output]" in str(options) and "caf" not in str(options)
    prompt = graph(warmup=0.0, seed=62)
    prompt["carried"] = node(
        "AdaSpaLoadPattern", model=["adaspa", 0], adaspa=["adaspa", 1], file=""
    )
    prompt["sampler"]["inputs"]["model"] = ["carried", 0]
    for file, words in [
        ("caf\udce9.safetensors", "not in list"),
        ("broken.safetensors", "'broken.safetensors' cannot be read"),
        ("nested.safetensors", "it is not what was written"),
    ]:
        prompt["carried"]["inputs"]["file"] = f"{file} [output]"
        with pytest.raises(PromptFailed, match=words):
            comfy_server.post(prompt)
    assert comfy_server.post(graph(warmup=0.0, seed=63))["status"]["status_str"] == "success"


def test_five_samplers_of_a_prompt_write_one_pattern(comfy_server):
    prompt = graph(warmup=0.0, seed=64)
    prompt["keep"] = node(
        "AdaSpaSavePattern", model=["adaspa", 0], adaspa=["adaspa", 1], name="five"
    )
    prompt["sampler"]["inputs"]["model"] = ["keep", 0]
    for number in range(4):
        inputs = {**prompt["sampler"]["inputs"], "seed": 65 + number}
        prompt[f"sampler {number}"] = node("KSampler", **inputs)
        prompt[f"file {number}"] = node(
            "SaveLatent", samples=[f"sampler {number}", 0], filename_prefix=f"latent{number}"
        )
    comfy_server.post(prompt)
    folder = comfy_server.base_directory / "output/adaspa"
    assert [path.name for path in folder.glob("five*")] == ["five.safetensors"]
    # another prompt with the node's result from ComfyUI's cache
    prompt["sampler 0"]["inputs"]["seed"] = 70
    comfy_server.post(prompt)
    assert len(list(folder.glob("five*"))) == 2


def test_both_experts_on_a_server(comfy_server):
    prompt = graph()
    loader, settings = prompt["loader"], dict(prompt["adaspa"]["inputs"])
    del settings["model"]
    settings["warmup"] = 0.0
    prompt["adaspa"] = node(
        "AdaSpaAttentionPair", model_high=["loader", 0], model_low=["low", 0], **settings
    )
    prompt["low"] = {**loader}
    first = prompt.pop("sampler")["inputs"]
    del first["seed"], first["denoise"]
    steps = {"noise_seed": 71, "add_noise": "enable", "start_at_step": 0, "end_at_step": 2}
    prompt["high"] = node(
        "KSamplerAdvanced", **{**first, **steps, "return_with_leftover_noise": "enable"}
    )
    steps = {"noise_seed": 71, "add_noise": "disable", "start_at_step": 2, "end_at_step": 4}
    more = {"latent_image": ["high", 0], "model": ["adaspa", 1]}
    prompt["sampler"] = node(
        "KSamplerAdvanced", **{**first, **steps, **more, "return_with_leftover_noise": "disable"}
    )
    prompt["report"]["inputs"]["adaspa"] = ["adaspa", 2]
    entry = comfy_server.post(prompt)
    lines = text_of(entry, "report").split("\n")
    assert lines[1].startswith("288 tokens, steps 1 search, 2 sparse")
    assert any(line.startswith("Pattern of the high noise expert: ") for line in lines)
    assert len(entry["outputs"]["report"]["adaspa"]) == 2
