"""A real ComfyUI for tests: in this process, and as one server for the whole session."""

import gc
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from sparse_attn.config import AdaSpaConfig
from tests.host.host_models import TEXT_DIM, write_models
from tests.tools import comfy_inprocess
from tests.tools.comfy_server import ComfyServer

HERE = Path(__file__).resolve().parent
# 3 x 8 x 12 = 288 video tokens, four and a half blocks, in patches of two and of one
VIDEO = (1, 16, 3, 16, 24)
VIDEO_15 = (1, 32, 3, 8, 12)
CROSS_ATTENTION = "cross-attention or grouped heads"


frozen = 0


def freeze_imports() -> None:
    """Let searches for garbage leave out what has been imported.

    ComfyUI searches before it loads a model whose earlier clone has gone, as in nearly every test;
    with all of torch and ComfyUI that took 0.33 s, and takes 0.06 s (Python 3.11, AMD EPYC).
    """
    global frozen
    if len(sys.modules) > frozen + 50:
        gc.collect()
        gc.freeze()
        frozen = len(sys.modules)


@pytest.fixture(autouse=True, scope="module")
def imports_frozen():
    freeze_imports()


@pytest.fixture(scope="session")
def comfyui():
    """ComfyUI importable in this process; its path."""
    if "COMFYUI_PATH" not in os.environ:
        pytest.skip("COMFYUI_PATH is not set; `python run.py test` finds or sets up a ComfyUI")
    found = comfy_inprocess.start()
    import comfy.sample
    import comfy.sd  # noqa: F401

    freeze_imports()
    return found


@pytest.fixture(scope="session")
def model_paths(comfyui, tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def loaded_models():
    return {}


@pytest.fixture
def pace(comfyui, monkeypatch):
    """What a process that has just started knows of speed: no test tells another what it measured."""
    from sparse_attn.host import timing
    from sparse_attn.run.pace import Pace

    fresh = Pace()
    monkeypatch.setattr(timing, "PACE", fresh)
    return fresh


@pytest.fixture
def load(loaded_models, model_paths, pace):
    """load(name) -> a fresh clone of a tiny model's ModelPatcher; the weights are shared."""
    import comfy.sd

    def load(name):
        if name not in loaded_models:
            loaded_models[name] = comfy.sd.load_diffusion_model(str(model_paths[name]))
        return loaded_models[name].clone()

    return load


@pytest.fixture(scope="session")
def comfy_server(comfyui, model_paths, tmp_path_factory):
    """One server with our pack, the tiny models and the test nodes."""
    server = ComfyServer(
        comfyui,
        # letters that people's folders have
        tmp_path_factory.mktemp("M\u00fcller \u89c6\u9891"),
        extra_custom_nodes=[("adaspa_host_tests", HERE / "host_nodes")],
        model_files=list(model_paths.values()),
        env={"OMP_NUM_THREADS": "1"},
    )
    with server:
        server.url = server.address
        yield server


def conditioning(tokens, seed, **more):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, tokens, TEXT_DIM, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, 768, generator=generator), **more}]]


def sample(
    model, shape=VIDEO, *, steps=4, cfg=5.0, sampler="euler", scheduler="simple", seed=1,
    texts=(7, 9), extra=None, **options,
):  # fmt: skip
    """Run ComfyUI's KSampler.

    Args:
        texts: tokens of the positive and the negative prompt; equal lengths are batched.
        extra: more entries for both conditionings.
    """
    import comfy.sample

    latent = torch.zeros(shape)
    noise = comfy.sample.prepare_noise(latent, seed)
    positive, negative = (conditioning(n, i, **extra or {}) for i, n in enumerate(texts))
    # ComfyUI runs its nodes without gradients, and parts of 0.24 cannot run with them
    with torch.no_grad():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, negative, latent,
            disable_pbar=True, seed=seed, **options,
        )  # fmt: skip


def sparse(model, **fields):
    """Install AdaSpa with settings that suit 288 tokens; returns the clone and its handle."""
    from sparse_attn.host.install import install

    settings = {"min_tokens": 64, "sparsity": 0.6, "warmup": 0.0, "dense_attention": "host"}
    return install(model, AdaSpaConfig(**{**settings, **fields}))


def calls(handle) -> dict[str, int]:
    """Attention calls of the latest run by kind, one per conditioning, and none of zero."""
    timing = handle.latest().timing
    kinds = ("dense", "search", "search_again", "sparse")
    return {kind: len(getattr(timing, kind)) for kind in kinds if getattr(timing, kind)}


def kept_dense(handle) -> Counter:
    """Why calls of the latest run were left to the host, the video's and others."""
    return handle.latest().kept_dense + handle.latest().beside


def assert_same_video(out, expected, tolerance=1e-4):
    """Fail unless two latents agree to `tolerance` of the largest value."""
    assert torch.isfinite(out).all()
    error = ((out - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"


def assert_other_video(out, expected, least=1e-3):
    """Fail unless two latents clearly differ."""
    assert torch.isfinite(out).all()
    error = ((out - expected).abs().max() / expected.abs().max()).item()
    assert error >= least, f"relative difference {error:.2e}, expected at least {least:.0e}"
