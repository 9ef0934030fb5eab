"""Guidance of other kinds: more passes at one sigma, more prompts, another model for one of them."""

import pytest
import torch

from tests.host.host_fixtures import (
    VIDEO,
    assert_other_video,
    assert_same_video,
    calls,
    conditioning,
    sample,
    sparse,
)

LAYERS = {"wan_h64": 2, "hunyuan": 3}
STEPS = 4


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


# ---- a further pass at the same sigma


def skipping(model):
    """Skip-layer guidance: a third pass without the first block, in the middle of the schedule."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    layers = {"double_layers": "0", "single_layers": ""}
    return SkipLayerGuidanceDiT.execute(model, 2.0, 0.2, 0.8, **layers).args[0]


def skipping_in_place(model):
    """The simple kind: the negative prompt's own pass leaves the first block out."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple

    layers = {"double_layers": "0", "single_layers": ""}
    return SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, **layers).args[0]


def perturbing(model):
    """Perturbed attention: a third pass; no video model heeds what it wants of its attention."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, 2.0).args[0]


def normalising(model):
    """Normalised attention guidance: reads the output of every self-attention."""
    from comfy_extras.nodes_nag import NAGuidance

    return NAGuidance.execute(model, 5.0, 0.5, 1.5).args[0]


# blocks of further passes in a run, less the blocks that are left out
FURTHER = {
    skipping: lambda layers, inside: inside * (layers - 1),
    skipping_in_place: lambda layers, inside: -STEPS,
    perturbing: lambda layers, inside: STEPS * layers,
    normalising: lambda layers, inside: 0,
}


@pytest.mark.parametrize("guide", FURTHER)
@pytest.mark.parametrize("order", ["before", "after"])
def test_further_passes_are_no_further_steps(load, name, guide, order):
    # both prompts in one call, which is what normalised guidance looks for
    texts = {"texts": (7, 7)}
    expected = sample(guide(load(name)), **texts)
    if order == "before":
        model, handle = sparse(guide(load(name)), sparsity=0.0, warmup=0.25)
    else:
        model, handle = sparse(load(name), sparsity=0.0, warmup=0.25)
        model = guide(model)
    assert_same_video(sample(model, **texts), expected)
    run = handle.latest()
    assert run.schedule.describe() == "steps 1 dense, 2 search, 3-4 sparse"
    sampling = model.get_model_object("model_sampling")
    first, last = (sampling.percent_to_sigma(percent) for percent in (0.2, 0.8))
    inside = sum(last <= sigma <= first for sigma in run.schedule.sigmas)
    made, layers = calls(handle), LAYERS[name]
    more = FURTHER[guide](layers, inside)
    assert sum(made.values()) == 2 * layers * STEPS + more
    # the simple kind leaves one block of one prompt out for good; no pass searches twice
    assert made["search"] == 2 * layers - (guide is skipping_in_place)
    # Wan has no place for a patch of the output
    if guide not in (perturbing, normalising) or (guide, name) == (normalising, "hunyuan"):
        assert_other_video(expected, sample(load(name), **texts))


def test_further_passes_in_sparse_steps(load, name):
    model, handle = sparse(skipping(load(name)))
    assert_other_video(sample(model), sample(skipping(load(name))))
    assert calls(handle)["search"] == 2 * LAYERS[name]


# ---- more than two prompts, or another guider


def guided(guider, steps=STEPS):
    """Run a guider as SamplerCustomAdvanced does."""
    import comfy.sample
    import comfy.samplers

    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    latent = torch.zeros(VIDEO)
    noise = comfy.sample.prepare_noise(latent, 1)
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=1)


def three_prompts(model):
    from comfy_extras.nodes_perpneg import PerpNegGuider

    prompts = conditioning(7, 0), conditioning(9, 1), conditioning(5, 2)
    return PerpNegGuider.execute(model, *prompts, 5.0, 1.0).args[0]


def two_positives(model):
    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    prompts = conditioning(7, 0), conditioning(9, 1), conditioning(5, 2)
    return DualCFGGuider.execute(model, *prompts, 5.0, 3.0, "nested").args[0]


def one_prompt(model):
    from comfy_extras.nodes_custom_sampler import BasicGuider

    return BasicGuider.execute(model, conditioning(7, 0)).args[0]


@pytest.mark.parametrize(
    "guider, prompts", [(three_prompts, 3), (two_positives, 3), (one_prompt, 1)]
)
def test_other_guiders(load, name, guider, prompts):
    expected = guided(guider(load(name)))
    model, handle = sparse(load(name), sparsity=0.0)
    assert_same_video(guided(guider(model)), expected)
    n = prompts * LAYERS[name]
    assert calls(handle) == {"search": n, "sparse": n * (STEPS - 1)}
    assert len(handle.latest().memory.conditionings) == prompts
    # each prompt is reported by itself
    assert len(handle.latest().patterns) == n


def test_a_model_of_its_own_for_the_negative_prompt(load):
    """ComfyUI runs it with the first model's options, so ours serves both and mixes up neither."""
    sampler_nodes = pytest.importorskip("comfy_extras.nodes_custom_sampler")
    if not hasattr(sampler_nodes, "DualModelGuider"):
        pytest.skip("this ComfyUI has no DualModelGuider")

    def guider(model):
        prompts = conditioning(7, 0), 5.0, load("wan_t2v"), conditioning(9, 1)
        return sampler_nodes.DualModelGuider.execute(model, *prompts).args[0]

    expected = guided(guider(load("wan_h64")))
    model, handle = sparse(load("wan_h64"), sparsity=0.0)
    assert_same_video(guided(guider(model)), expected)
    assert calls(handle) == {"search": 4, "sparse": 12}
    assert_other_video(guided(guider(sparse(load("wan_h64"))[0])), expected)
