"""What no ComfyUI here has, played by stand-ins that call ours as the real ones were seen to."""

from contextlib import contextmanager

import pytest
import torch

from tests.host.family_cases import CASES, noise
from tests.host.family_models import build
from tests.host.host_fixtures import (
    assert_other_video,
    assert_same_video,
    calls,
    kept_dense,
    sample,
    sparse,
)

pytestmark = pytest.mark.any_comfyui

KEY = "optimized_attention_override"
ORDERS = ["before", "after"]


def both(load, patch, order, name="wan_h64", **fields):
    """A model with another attention node before or after ours, and our handle."""
    if order == "before":
        return sparse(patch(load(name)), **fields)
    model, handle = sparse(load(name), **fields)
    return patch(model), handle


def with_key(model, override):
    model = model.clone()
    model.model_options.setdefault("transformer_options", {})[KEY] = override
    return model


# ---- Model Attention Backend (ComfyUI 0.33 and later)


def backend_node(made):
    """Sets an override that calls one of ComfyUI's own wrapped functions, and marks it."""
    from comfy.ldm.modules import attention

    def override(func, *args, **kwargs):
        made.append(kwargs.get("_inside_attn_wrapper"))
        return attention.attention_pytorch(*args, **kwargs)

    override.container_function = lambda *args, **kwargs: pytest.fail("no containers were passed")
    return lambda model: with_key(model, override)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["wan_h64", "hunyuan"])
def test_model_attention_backend(load, order, name):
    expected = sample(load(name))
    made = []
    model, handle = both(load, backend_node(made), order, name, sparsity=0.0, warmup=0.5)
    # were the mark lost on the way, its backend would enter ours again, without end
    assert_same_video(sample(model), expected)
    assert made and all(made)
    layers = {"wan_h64": 2, "hunyuan": 3}[name]
    assert calls(handle)["search"] == 2 * layers


# ---- Sage and Flash patches of other packs


def sage_node(made):
    """Replaces the attention function whole, and takes what it is given by position or by name."""
    from comfy.ldm.modules import attention

    replacement = attention.attention_pytorch

    def attention_override_sage(func, *args, **kwargs):
        made.append(args[0].shape)
        return replacement.__wrapped__(*args, **kwargs)

    return lambda model: with_key(model, attention_override_sage)


def flash_node(made):
    """Knows the parameters it wants by name, and swallows the rest."""

    def override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                 skip_output_reshape=False, **unknown):  # fmt: skip
        made.append(q.shape)
        if not skip_reshape:
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return lambda model: with_key(model, override)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("node", [sage_node, flash_node])
@pytest.mark.parametrize("name", ["wan_h64", "hunyuan"])
def test_sage_and_flash_serve_what_is_not_ours(load, order, node, name):
    made = []
    model, handle = both(load, node(made), order, name, sparsity=0.0, warmup=0.5)
    assert_same_video(sample(model), sample(load(name)))
    assert handle.latest().schedule.describe() == "steps 1-2 dense, 3 search, 4 sparse"
    assert made
    assert len(made) >= sum(kept_dense(handle).values())


def test_a_pack_that_replaces_the_attention_of_the_module_is_named_as_the_reason(load, monkeypatch):
    from comfy.ldm.modules import attention
    from comfy.ldm.wan import model as wan

    # the raw function, without the wrapper that offers calls to overrides
    monkeypatch.setattr(wan, "optimized_attention", attention.attention_pytorch.__wrapped__)
    expected = sample(load("wan_h64"))
    model, handle = sparse(load("wan_h64"))
    assert torch.equal(sample(model), expected)
    # two layers, two prompts, four steps
    reason = (
        "not seen, another node replaced it: "
        "comfy.ldm.wan.model.optimized_attention is of comfy.ldm.modules.attention"
    )
    assert f"Every call ran dense: {reason}." in handle.latest().summary()


# ---- Model Sparse Attention (ComfyUI 0.35 and later)


class SparseNode:
    """Puts itself on top again before every call of the model; declines to what stood there."""

    def __init__(self):
        self.made, self.installed = [], set()

    def __call__(self, model):
        from comfy.patcher_extension import CallbacksMP

        model = model.clone()
        self.put_on_top(model.model_options.setdefault("transformer_options", {}))
        model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "other", self.prepare)
        return model

    def prepare(self, patcher, timestep, model_options=None):
        if model_options is not None:
            self.put_on_top(model_options["transformer_options"])

    def put_on_top(self, options):
        previous = options.get(KEY)
        if previous in self.installed:
            return

        def override(func, q, k, v, heads, **kwargs):
            self.made.append((q.shape[-2], k.shape[-2]))
            assert previous is None
            return func(q, k, v, heads, **kwargs)

        self.installed.add(override)
        options[KEY] = override


@pytest.mark.parametrize("order", ORDERS)
def test_a_node_that_puts_itself_on_top_gets_what_is_not_ours(load, order):
    other = SparseNode()
    model, handle = both(load, other, order, warmup=0.5)
    out = sample(model)
    assert calls(handle) == {"dense": 8, "search": 4, "sparse": 4}
    assert_same_video(out, sample(sparse(load("wan_h64"), warmup=0.5)[0]))
    # cross-attention of two layers, two prompts, four steps; and dense self-attention
    assert sum(k != 288 for _, k in other.made) == 16
    assert sum(k == 288 for _, k in other.made) in (4, 8)
    assert len(other.installed) == 1


# ---- dynamic VRAM (ComfyUI 0.33 and later)


def test_what_outlives_a_block_is_allocated_outside_its_recording(load, monkeypatch):
    import comfy.model_prefetch

    from sparse_attn.run.cache import Cache

    depth, kept = [0], []

    @contextmanager
    def pause_malloc_graph():
        depth[0] += 1
        yield
        depth[0] -= 1

    keep = Cache.keep

    def noted(self, tensor):
        kept.append(depth[0])
        return keep(self, tensor)

    monkeypatch.setattr(
        comfy.model_prefetch, "pause_malloc_graph", pause_malloc_graph, raising=False
    )
    monkeypatch.setattr(Cache, "keep", noted)
    model, _ = sparse(load("wan_h64"), search_points=(0.5,))
    sample(model)
    # per layer and prompt: two masks with their orders, and the LSE that the second search needs
    assert len(kept) == 20
    assert set(kept) == {1} and depth == [0]


# ---- MiniMax-H3 of ComfyUI 0.38, which names its blocks and lays out its tokens for all to see


def test_blocks_that_a_newer_core_names_are_told_apart(comfyui):
    from tests.host.test_families import sample as sample_case

    case = CASES["minimax-references"]
    patcher = build(case.model)
    expected = sample_case(patcher, case)
    keys = set()

    def named(number):
        def hook(block, args, kwargs):
            options = kwargs.get("transformer_options")
            options = args[-1] if options is None else options
            assert isinstance(options, dict)
            options["block_index"] = number
            options["minimax_h3_layout"] = object()

        return hook

    blocks = patcher.model.diffusion_model.blocks
    hooks = [
        block.register_forward_pre_hook(named(i), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    model, handle = sparse(patcher, sparsity=0.0)
    with noted_keys(keys):
        out = sample_case(model, case)
    for hook in hooks:
        hook.remove()
    assert_same_video(out, expected)
    assert calls(handle) == {"search": case.taken, "sparse": case.taken}
    # two blocks, each of which calls once in a pass
    assert {key[1].block.index for key in keys} == {0, 1} and len(keys) == 2


@contextmanager
def noted_keys(keys):
    """Collects the blocks of all calls that are ours."""
    from sparse_attn.run.state import RunState

    attend = RunState.attend

    def noted(self, call):
        if call.key is not None:
            keys.add(call.key[-1])
        return attend(self, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "attend", noted)
        yield


# ---- GGUF


def packed_operations():
    """Layers whose weights stay packed, and become numbers only within their call."""
    import comfy.ops

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            unpacked = 0

            def _load_from_state_dict(self, state, prefix, *rest):
                weight = state.pop(prefix + "weight")
                self.scale = weight.abs().amax(1, keepdim=True) / 127
                self.packed = (weight / self.scale).round().to(torch.int8)
                self.weight = None
                self.bias = torch.nn.Parameter(state.pop(prefix + "bias"), requires_grad=False)

            def forward_comfy_cast_weights(self, x):
                Operations.Linear.unpacked += 1
                weight = self.packed.to(x.dtype) * self.scale.to(x.dtype)
                return torch.nn.functional.linear(x, weight, self.bias.to(x.dtype))

            def forward(self, x, *args, **kwargs):
                return self.forward_comfy_cast_weights(x)

    return Operations


def test_weights_that_are_unpacked_at_every_call(model_paths, load):
    import comfy.sd

    operations = packed_operations()
    patcher = comfy.sd.load_diffusion_model(
        str(model_paths["wan_h64"]), model_options={"custom_operations": operations}
    )
    expected = sample(patcher)
    assert operations.Linear.unpacked
    model, handle = sparse(patcher, sparsity=0.0)
    assert_same_video(sample(model), expected)
    assert calls(handle) == {"search": 4, "sparse": 12}
    assert_other_video(expected, sample(load("wan_h64")))


# ---- a text encoder's attention, and anything else outside a model call


def test_a_call_outside_the_diffusion_model_passes_through(load):
    from sparse_attn.host.override import attention_override

    q = noise(1, 2, 8, 16)

    def backend(q, k, v, heads, **kwargs):
        return kwargs["skip_reshape"], heads

    seen = attention_override(backend, q, q, q, heads=2, skip_reshape=True, transformer_options={})
    assert seen == (True, 2)
    assert attention_override(backend, q, q, q, 2) == (False, 2)
