"""An error of ours in any node: the prompt goes on, and the node says what failed and why."""

import logging
import sys
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

from tests.host.host_fixtures import assert_same_video, sample
from tests.host.injections import Profiler, places_of
from tests.nodes.test_nodes import WIDGETS
from tests.tools import comfy_inprocess

pytestmark = pytest.mark.any_comfyui

ERRORS = (
    lambda: RuntimeError("broken"),
    lambda: ValueError("broken"),
    lambda: torch.OutOfMemoryError("no room"),
    lambda: UnicodeEncodeError("utf-8", "\udce4", 0, 1, "surrogates not allowed"),
    lambda: OSError(28, "no space left on device"),
)
READERS = ("parse_numbers", "checked_name")
FAILED = "An error in this node, and the workflow went on without it: "
SETTINGS = {
    **WIDGETS["AdaSpaAttention"], "preset": "Custom", "min_tokens": 64, "warmup": 0.0,
    "dense_attention": "host", "sparsity": 0.6, "verdict": "sparse",
}  # fmt: skip


@pytest.fixture
def scene(comfyui, load, tmp_path, monkeypatch):
    """What all nodes are given, and run(name) -> what a node returns."""
    import folder_paths

    # hundreds of errors on purpose
    monkeypatch.setattr(logging.getLogger("adaspa"), "disabled", True)
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    nodes = comfy_inprocess.nodes_of(comfy_inprocess.load_pack())

    def node(name):
        hidden = {"hidden_inputs": {"unique_id": "7"}}
        return nodes[name].PREPARE_CLASS_CLONE(hidden)

    model, handle = node("AdaSpaAttention").execute(model=load("wan_h64"), **SETTINGS).args
    (saver,) = node("AdaSpaSavePattern").execute(model=model, adaspa=handle, name="city").args
    samples = {"samples": sample(saver)}
    frames = torch.rand(3, 16, 16, 3)
    inputs = {
        "AdaSpaAttention": {"model": load("wan_h64"), **SETTINGS},
        "AdaSpaAttentionPair": {
            "model_high": load("wan_h64"), "model_low": load("wan_h64"), **SETTINGS
        },
        "AdaSpaReport": {"samples": samples, "adaspa": handle, "layer": 0, "head": 0},
        "AdaSpaCompare": {"dense": frames, "sparse": frames.flip(0), "on": handle},
        "AdaSpaSavePattern": {"model": model, "adaspa": handle, "name": "town"},
        "AdaSpaLoadPattern": {
            "model": model, "adaspa": handle, "file": "city.safetensors [output]"
        },
        "AdaSpaForecast": {"model": load("wan_h64"), "level": "careful"},
    }  # fmt: skip
    return SimpleNamespace(
        inputs=inputs, run=lambda name: node(name).execute(**inputs[name]), node=node, host=comfyui
    )


def shown(out) -> str:
    ui = out.ui if isinstance(out.ui, dict) else out.ui.as_dict()
    return "\n".join(ui["text"])


def all_places(scene, name) -> dict:
    """The number of a call of every kind that a node makes, by the kind."""
    # what is set up once is no part of it
    scene.run(name)
    places = places_of(lambda: scene.run(name), scene.host)
    return {place: number for number, place in reversed([*enumerate(places)])}


NODES = (
    "AdaSpaAttention", "AdaSpaAttentionPair", "AdaSpaReport", "AdaSpaCompare", "AdaSpaSavePattern",
    "AdaSpaLoadPattern", "AdaSpaForecast",
)  # fmt: skip


def test_every_node_of_the_pack_is_here(comfyui):
    assert tuple(comfy_inprocess.nodes_of(comfy_inprocess.load_pack())) == NODES


@pytest.mark.parametrize("name", NODES)
def test_an_error_at_any_call_leaves_the_prompt_running_and_is_said(scene, name):
    whole, said = scene.run(name), []
    # of calls in loops each line counts once
    for (place, number), make in zip(all_places(scene, name).items(), cycle(ERRORS), strict=False):
        error = make()
        try:
            with Profiler(scene.host, number, error) as profiler:
                out = scene.run(name)
        except ValueError as mistake:
            # what reads widgets and files says what is wrong with them
            assert type(mistake).__name__ == "UserError"
            assert name == "AdaSpaLoadPattern" or place.function in READERS, place
            continue
        assert profiler.error is None
        assert [type(x) for x in out.args] == [type(x) for x in whole.args]
        text = shown(out)
        if text != shown(whole):
            said.append(text)
    assert len(said) > 3
    assert all(FAILED in text for text in said)
    for kind in ("RuntimeError", "ValueError", "OutOfMemoryError", "UnicodeEncodeError", "OSError"):
        assert any(f"{FAILED}{kind}(" in text for text in said)


@pytest.mark.parametrize("name", NODES)
def test_an_interrupt_passes(scene, name):
    import comfy.model_management

    first = [*all_places(scene, name).values()][1]
    for error in (KeyboardInterrupt(), comfy.model_management.InterruptProcessingException()):
        with pytest.raises(type(error)), Profiler(scene.host, first, error):
            scene.run(name)


def failing(monkeypatch, name, error):
    """Let a function of a node's module fail, whatever it is called with."""
    module, _, function = name.rpartition(".")
    pack = comfy_inprocess.load_pack().__name__

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(sys.modules[f"{pack}.nodes.{module}"], function, fail)


def test_what_follows_a_node_that_failed_says_so_too_and_the_video_is_the_dense_one(
    scene, load, monkeypatch
):
    with monkeypatch.context() as context:
        failing(context, "attention.install", RuntimeError("no luck"))
        model, handle = scene.run("AdaSpaAttention").args
    said = f"{FAILED}RuntimeError('no luck')."
    for name, more in (("Save", {"name": "x"}), ("Load", {"file": "city.safetensors [output]"})):
        node = scene.node(f"AdaSpa{name}Pattern")
        out = node.execute(model=model, adaspa=handle, **more)
        assert out.args[0] is model and shown(out) == said
    video = sample(model)
    assert_same_video(video, sample(load("wan_h64")), 0)
    report = scene.node("AdaSpaReport")
    out = report.execute(samples={"samples": video}, adaspa=handle, layer=0, head=0)
    assert out.args[2] == said


def test_a_report_that_fails_passes_the_samples_on(scene, monkeypatch):
    # as a picture library says it
    failing(monkeypatch, "report.draw", ValueError("tile cannot extend outside image"))
    samples, picture, text = scene.run("AdaSpaReport").args
    assert samples is scene.inputs["AdaSpaReport"]["samples"]
    assert text == f"{FAILED}ValueError('tile cannot extend outside image')."
    assert picture.ndim == 4 and picture.shape[-1] == 3 and torch.equal(picture, picture * 0 + 1)


def test_a_comparison_keeps_its_numbers_where_its_pictures_cannot_be_written(scene, monkeypatch):
    whole = scene.run("AdaSpaCompare")
    failing(monkeypatch, "compare.preview", OSError(28, "No space left on device"))
    out = scene.run("AdaSpaCompare")
    assert out.args[2:] == whole.args[2:] and torch.equal(out.args[1], whole.args[1])
    assert "No space left" in shown(out) and "adaspa_compare" not in out.ui


def test_mistakes_of_the_user_end_the_prompt_with_their_sentence(scene):
    for name, wrong, words in (
        ("AdaSpaAttention", {"sparsity": 2.0}, "sparsity"),
        ("AdaSpaSavePattern", {"name": "../x"}, "must be a file name"),
        ("AdaSpaLoadPattern", {"file": "none"}, "There is no pattern"),
        ("AdaSpaLoadPattern", {"adaspa": None}, "wire both from the same node"),
        ("AdaSpaCompare", {"sparse": torch.rand(2, 16, 16, 3)}, "must be alike"),
    ):
        with pytest.raises(ValueError, match=words):
            scene.node(name).execute(**{**scene.inputs[name], **wrong})
