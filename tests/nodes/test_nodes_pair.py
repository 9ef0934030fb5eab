"""Two experts: shared settings, one report, and the first's pattern in the second."""

import inspect
import re

import pytest
import torch

from tests.host.host_fixtures import calls, conditioning, sample
from tests.nodes.test_nodes import LATER, WIDGETS
from tests.tools import comfy_inprocess

pytestmark = pytest.mark.any_comfyui

SETTINGS = {
    **WIDGETS["AdaSpaAttention"], "preset": "Custom", "sparsity": 0.6, "warmup": 0.0,
    "min_tokens": 64, "dense_attention": "host", "search_points": "", "verdict": "sparse",
}  # fmt: skip


@pytest.fixture
def nodes(comfyui):
    return comfy_inprocess.nodes_of(comfy_inprocess.load_pack())


@pytest.fixture
def pair(nodes):
    def run(high, low, **settings):
        node = nodes["AdaSpaAttentionPair"].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        return node.execute(model_high=high, model_low=low, **{**SETTINGS, **settings})

    return run


def halves(high, low, steps=4, middle=2, seed=1, cfg=5.0):
    """Sample as two KSamplerAdvanced do, the noisy steps with `high`."""
    import comfy.sample

    first = sample(
        high, steps=steps, cfg=cfg, start_step=0, last_step=middle, force_full_denoise=False,
        seed=seed,
    )  # fmt: skip
    return comfy.sample.sample(
        low, torch.zeros_like(first), steps, cfg, "euler", "simple", conditioning(7, 0),
        conditioning(9, 1), first, start_step=middle, last_step=steps, force_full_denoise=True,
        disable_noise=True, disable_pbar=True, seed=seed,
    )  # fmt: skip


def test_settings_are_those_of_the_single_node(nodes):
    single = nodes["AdaSpaAttention"].GET_SCHEMA().inputs
    schema = nodes["AdaSpaAttentionPair"].GET_SCHEMA()
    assert [put.id for put in schema.inputs[:2]] == ["model_high", "model_low"]
    assert [put.as_dict() for put in schema.inputs[2:]] == [put.as_dict() for put in single[1:]]
    assert [put.id for put in schema.inputs[2:]] == list(WIDGETS["AdaSpaAttention"])
    assert [put.io_type for put in schema.outputs] == ["MODEL", "MODEL", "ADASPA"]
    assert [put.id for put in schema.outputs] == ["model_high", "model_low", "adaspa"]
    assert schema.not_idempotent and schema.category == "model/patch"


def test_a_workflow_of_an_earlier_version_may_lack_later_widgets(nodes, load):
    node = nodes["AdaSpaAttentionPair"].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    early = {name: value for name, value in SETTINGS.items() if name not in LATER}
    handle = node.execute(load("wan_h64"), load("wan_h64"), **early).args[2]
    assert handle.config.min_tokens == 8192
    assert "settings" in inspect.signature(node.execute).parameters


def test_the_node_names_the_settings_and_the_model_that_will_run_dense(pair, load):
    ready = pair(load("wan_h64"), load("wan_h64"), preset="Fast").ui["text"][0]
    assert ready == "Ready: Fast, sparsity 0.90."
    low = load("wan_h64")
    low.add_object_patch("diffusion_model", torch.nn.Linear(2, 2))
    text = pair(load("wan_h64"), low).ui["text"][0]
    assert text == "Everything will run dense: Linear is not a video model that AdaSpa knows."
    with pytest.raises(ValueError, match="`search_points` must ascend"):
        pair(load("wan_h64"), load("wan_h64"), search_points="0.6, 0.3")


def test_the_second_expert_begins_with_the_pattern_of_the_first(pair, load):
    # one set of weights twice; in a sample of this video's tokens the pattern still holds its recall
    high, low, handle = pair(load("wan_h64"), load("wan_h64")).args
    halves(high, low, seed=2)
    first, second = handle.runs
    assert [run.part for run in handle.runs] == ["high noise", "low noise"]
    assert handle.latest() is second
    assert first.schedule.describe() == "steps 1 search, 2 sparse"
    assert second.schedule.describe() == "steps 3 search, 4 sparse"
    assert len(first.timing.search) == 4 and first.reuse.masks == 0
    # a second search only where the recall fell; every layer is accounted for
    assert second.reuse.masks >= 2
    assert second.reuse.masks + sum(second.reuse.refused.values()) == 4
    assert len(second.timing.search) == 4 - second.reuse.masks
    text = "\n".join(second.lines())
    assert "\n288 tokens, steps 3 search, 4 sparse, density 0.4" in text
    line = f"Pattern of the high noise expert: {second.reuse.masks} masks used without a search"
    assert line in text
    (line,) = first.reuse.kept
    assert line.startswith("Pattern kept for the next expert: 4 masks, ")
    # masks and orders of 4 heads in 4 layers
    assert handle.pattern.nbytes() == 4 * 4 * (5 * 1 + 288 * 4)


def test_the_report_of_either_run_is_on_one_socket(pair, load, nodes):
    high, low, handle = pair(load("wan_h64"), load("wan_h64")).args
    out = halves(high, low)
    node = nodes["AdaSpaReport"].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    text = node.execute({"samples": out}, 0, 0, handle).args[2]
    high_noise, low_noise = (run.lines() for run in handle.runs)
    assert text.split("\n") == high_noise + low_noise
    # on so small a video it may have been slower
    assert re.match(r"High noise: (Slower: s|S)ampling took ", text)
    assert (
        "\n288 tokens, steps 1 search, 2 sparse" in text and "\n288 tokens, steps 3 search" in text
    )
    # a further run of the second alone takes the place of its earlier one
    text = node.execute({"samples": sample(low)}, 0, 0, handle).args[2]
    assert text.count("High noise: ") == text.count("Low noise: ") == 1
    assert "\n288 tokens, steps 1 search, 2-4 sparse" in text


def test_a_pattern_that_does_not_hold_is_searched_anew(pair, load):
    high, low = load("wan_h64"), load("wan_h64")
    # another expert: other weights of the queries, so other blocks matter
    name = "diffusion_model.blocks.1.self_attn.q.weight"
    shape = low.model.diffusion_model.blocks[1].self_attn.q.weight.shape
    low.add_patches({name: ("diff", (torch.randn(shape, generator=seed(3)) * 0.2,))}, 1.0)
    high, low, handle = pair(high, low, sparsity=0.8).args
    halves(high, low)
    second = handle.latest()
    (reason,) = second.reuse.refused
    assert reason.startswith("recall more than 0.05 below")
    assert len(second.timing.search) == second.reuse.refused[reason] > 0
    assert f"Searched after all: {second.reuse.refused[reason]} masks, recall" in "\n".join(
        second.lines()
    )


def seed(number):
    return torch.Generator().manual_seed(number)


def test_the_second_expert_alone_searches_for_itself(pair, load):
    _, low, handle = pair(load("wan_h64"), load("wan_h64")).args
    sample(low)
    assert calls(handle) == {"search": 4, "sparse": 12}
    assert not handle.latest().reuse.source


def test_a_new_seed_does_not_begin_with_the_old_pattern(pair, load):
    high, low, handle = pair(load("wan_h64"), load("wan_h64")).args
    out = halves(high, low, seed=1)
    halves(high, low, seed=2)
    assert torch.equal(halves(high, low, seed=1), out)
    first = handle.runs[-2]
    assert first.part == "high noise" and len(first.timing.search) == 4


def test_a_stopped_run_leaves_no_pattern_of_an_earlier_one(pair, load):
    high, low, handle = pair(load("wan_h64"), load("wan_h64")).args
    halves(high, low)
    assert handle.pattern is not None

    def stop(*args):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(high, callback=stop)
    assert handle.pattern is None


def test_runs_of_the_two_experts_do_not_share_state(pair, load):
    """A sampler that holds both may call one while the other's run is open."""
    high, low, handle = pair(load("wan_h64"), load("wan_t2v")).args
    seen = []

    def inside(*args):
        if not seen:
            seen.append(sample(low, steps=2, cfg=1.0, seed=5))

    out = sample(high, seed=1, callback=inside)
    alone, _, _ = pair(load("wan_h64"), load("wan_t2v")).args
    assert torch.equal(out, sample(alone, seed=1))
    assert sorted(run.part for run in handle.runs) == ["high noise", "low noise"]


def test_the_second_expert_keeps_nothing(pair, load):
    high, low, handle = pair(load("wan_h64"), load("wan_h64")).args
    halves(high, low)
    assert not handle.latest().reuse.kept
    assert low.get_attachment("adaspa").pattern is None


def test_off_leaves_both_models_as_they_are(pair, load):
    high, low, handle = pair(load("wan_h64"), load("wan_h64"), enabled=False).args
    assert torch.equal(halves(high, low), halves(load("wan_h64"), load("wan_h64")))
    # both are timed
    assert [run.part for run in handle.runs] == ["high noise", "low noise"]
    assert all(run.took > 0 and not run.patterns for run in handle.runs)
