"""Training and guidance by gradient: dense attention by the host, whose gradients are whole."""

import importlib.util

import pytest
import torch

from sparse_attn.backends import choice
from sparse_attn.host.model_call import GRADIENTS
from tests.host.family_cases import TEXT, noise
from tests.host.family_models import build
from tests.host.host_fixtures import VIDEO, calls, kept_dense, sparse


def gradients(model, block, target):
    """The gradients of a low-rank weight's stand-in on one layer, of a loss in three steps."""
    import comfy.samplers

    linear = getattr(block, target)
    delta = torch.zeros(linear.weight.shape, requires_grad=True)
    hook = linear.register_forward_hook(lambda m, args, out: out + args[0] @ delta.t())
    found = []

    class Trainer(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            for sigma in sigmas[:-1]:
                delta.grad = None
                loss = (model_wrap(noise * sigma, sigma.expand(1), **extra_args) ** 2).mean()
                loss.backward()
                found.append(delta.grad)
            return noise

    guider = comfy.samplers.CFGGuider(model)
    text = [[noise(1, TEXT, 64), {"pooled_output": noise(1, 768)}]]
    guider.set_conds(text, text)
    guider.set_cfg(1.0)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 3)
    try:
        with torch.enable_grad():
            guider.sample(
                noise(*VIDEO), torch.zeros(VIDEO), Trainer(), sigmas, disable_pbar=True, seed=1
            )
    finally:
        hook.remove()
    return found


def use_triton(monkeypatch):
    kernels = choice.triton_kernels()
    monkeypatch.setattr(choice, "choose", lambda *args: (kernels, kernels.name))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("fields", [{}, {"warmup": 0.5, "tail": "none"}, {"recall": 0.9}], ids=str)
def test_gradients_are_the_hosts(comfyui, monkeypatch, backend, fields):
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            pytest.skip("no Triton")
        use_triton(monkeypatch)
    model = build("cogvideox")
    # the first layer's calls need gradients of their own, and the last one's do not reach it
    block = model.model.diffusion_model.blocks[0]
    expected = gradients(model, block, "q")
    assert all(grad.norm() > 0 for grad in expected)
    patched, handle = sparse(model, dense_attention="auto", **fields)
    for grad, host in zip(gradients(patched, block, "q"), expected, strict=True):
        assert torch.equal(grad, host)
    assert kept_dense(handle)[GRADIENTS] == 6 and not calls(handle)
    assert GRADIENTS in handle.latest().summary()


def test_calls_that_need_no_gradient_are_served_as_ever(comfyui):
    """Grad mode alone is no reason."""
    model, handle = sparse(build("cogvideox"))
    # as who trains a LoRA freezes them; the oldest ComfyUI makes weights that ask for gradients
    model.model.requires_grad_(False)
    last = model.model.diffusion_model.blocks[-1]
    for grad in gradients(model, last.norm2, "linear"):
        assert grad.norm() > 0
    assert GRADIENTS not in kept_dense(handle)
    assert calls(handle)["sparse"]
