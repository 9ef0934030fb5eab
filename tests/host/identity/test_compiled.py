"""A compiled model tells its layers, or runs dense and says so."""

import importlib

import pytest
import torch

from sparse_attn.host.model_call import ONE_GRAPH, UNKNOWN_LAYER
from sparse_attn.host.override import attention_override
from sparse_attn.run.state import RunState
from tests.host.family_cases import CASES
from tests.host.family_models import build
from tests.host.host_fixtures import assert_same_video, calls, kept_dense, sparse
from tests.host.identity.truth import ONE_EACH, lists_of
from tests.host.test_families import sample as sample_case

pytestmark = pytest.mark.any_comfyui


def compile_model(model, part, **options):
    """Compile a model with ComfyUI's own helper, whole or block by block."""
    helpers = pytest.importorskip("comfy_api.torch_helpers")
    torch.compiler.reset()
    if part == "blocks":
        diffusion = model.model.diffusion_model
        options["keys"] = [
            f"diffusion_model.{list_name}.{key}"
            for list_name in lists_of(diffusion)
            for key in dict(getattr(diffusion, list_name).named_children())
        ]
    helpers.set_torch_compile_wrapper(model=model, backend="eager", **options)


# those that publish their blocks' numbers run sparse in one graph too
COMPILED = {
    "whole": ("wan", "ltxv", "cosmos", "mochi", "minimax", "vace", "hunyuan"),
    "whole as one graph": ("wan", "vace"),
    "blocks": ("wan", "ltxv", "cosmos", "mochi", "minimax", "vace", "hunyuan"),
    "blocks as one graph each": ("ltxv", "hunyuan"),
}


# their layers are told as in others of these families, and compiling them takes longest
SLOW = {("cosmos", "whole"), ("mochi", "whole"), ("vace", "whole"), ("cosmos", "blocks")}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param(name, part, marks=[pytest.mark.long] if (name, part) in SLOW else [])
        for part, names in COMPILED.items()
        for name in names
    ],
)
def test_a_compiled_model_tells_its_layers(comfyui, monkeypatch, name, part):
    case = CASES[ONE_EACH[name]]
    seen = []
    attend = RunState.attend

    def noted(run, call):
        seen.append(call.layer)
        return attend(run, call)

    monkeypatch.setattr(RunState, "attend", noted)
    model, _ = sparse(build(name), sparsity=0.0)
    expected = sample_case(model, case)
    layers = list(seen)
    seen.clear()
    model, handle = sparse(build(name), sparsity=0.0)
    compile_model(model, part.split()[0], fullgraph="one graph" in part)
    assert_same_video(sample_case(model, case), expected)
    torch.compiler.reset()
    assert seen == layers and len(set(seen)) > 1
    assert UNKNOWN_LAYER not in kept_dense(handle)


def test_a_graph_that_does_not_tell_its_layers_runs_dense_and_says_so_at_once(comfyui, monkeypatch):
    from sparse_attn.host import status

    said = []
    monkeypatch.setattr(status, "send", lambda node, run, text, step, done: said.append(text))
    case = CASES[ONE_EACH["ltxv"]]
    expected = sample_case(build("ltxv"), case)
    model, handle = sparse(build("ltxv"))
    compile_model(model, "whole", fullgraph=True)
    assert_same_video(sample_case(model, case), expected, 1e-6)
    torch.compiler.reset()
    assert kept_dense(handle)[ONE_GRAPH] == 4 and not calls(handle)
    assert said[0][-1] == f"Everything will run dense: {ONE_GRAPH}."


def test_two_copies_of_the_pack_have_operators_of_their_own(comfyui):
    """ComfyUI names a pack by its path, whatever letters that has, and a folder may lie there twice."""
    from tests.tools import comfy_inprocess

    names = set()
    for folder in ("M\u00fcller/\u89c6\u9891 1", "M\u00fcller/\u97f3\u9891 1"):
        pack = comfy_inprocess.load_pack(name=f"{folder}/custom_nodes/adaspa")
        override = importlib.import_module(f"{pack.__name__}.sparse_attn.host.override")
        names.add(override._operator._qualname)
    assert len(names) == 2


def test_a_compiled_graph_without_a_run_calls_the_hosts_attention():
    """Its operator outlives the run that it was traced in."""
    torch.compiler.reset()

    def attention(q, k, v, heads, mask=None, scale=None, skip_output_reshape=False, **kwargs):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale
        )  # fmt: skip
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def block(q, k, v, mask, **kwargs):
        return attention_override(attention, q * 2, k, v, 2, mask, **kwargs) + 1

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    q, k, v = torch.randn(3, 2, 8, 16).unbind(0)
    mask = torch.randn(2, 1, 1, 8)
    for more in ({}, {"scale": 0.5}, {"skip_output_reshape": True}):
        assert_same_video(compiled(q, k, v, mask, **more), block(q, k, v, mask, **more), 1e-5)
    # the operator has no gradients, and the host's attention has
    leaf = v.clone().requires_grad_()
    compiled(q, k, leaf, mask).sum().backward()
    assert leaf.grad is not None and leaf.grad.norm() > 0
    torch.compiler.reset()


def test_an_operator_returns_none_of_its_inputs():
    """As an override that skips the attention of a block does."""
    torch.compiler.reset()

    def skipped(q, k, v, heads, **kwargs):
        return v

    compiled = torch.compile(
        lambda v: attention_override(skipped, v, v, v, 2), backend="aot_eager", fullgraph=True
    )
    v = torch.randn(1, 8, 16)
    out = compiled(v)
    torch.compiler.reset()
    assert torch.equal(out, v) and out.data_ptr() != v.data_ptr()
