"""Other packs use the same hook: theirs still serves what is not ours, before or after ours."""

from types import SimpleNamespace

import pytest
import torch

from sparse_attn.host.guard import BESIDE
from sparse_attn.host.model_call import HostCall
from sparse_attn.host.override import attention_override
from tests.host.host_fixtures import VIDEO, assert_same_video, calls, kept_dense, sample, sparse

KEY = "optimized_attention_override"


class Override:
    """Another pack's attention: counts calls, and can answer in its own shape."""

    def __init__(self, reshape_output=False):
        self.calls = []
        self.reshape_output = reshape_output

    def __call__(self, func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                 skip_output_reshape=False, **kwargs):  # fmt: skip
        self.calls.append((tuple(q.shape), tuple(k.shape), dict(kwargs)))
        if self.reshape_output:
            # as a pack does that does not know `skip_output_reshape`
            skip_output_reshape = False
        return func(
            q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
            skip_output_reshape=skip_output_reshape, **kwargs,
        )  # fmt: skip

    def count(self, q_tokens, k_tokens):
        return sum(q[-2] == q_tokens and k[-2] == k_tokens for q, k, _ in self.calls)


def with_override(model, override):
    model = model.clone()
    model.model_options.setdefault("transformer_options", {})[KEY] = override
    return model


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("reshape", [False, True], ids=["modern", "old"])
def test_other_override_serves_dense_and_declined_calls(load, order, reshape):
    other = Override(reshape)
    if order == "before":
        model, handle = sparse(with_override(load("wan_h64"), other), warmup=0.5)
    else:
        model, handle = sparse(load("wan_h64"), warmup=0.5)
        model = with_override(model, other)
    out = sample(model, texts=(7, 9))
    # steps 1-2 dense, 3 search, 4 sparse; the dense step before a search keeps its LSE only where
    # the search can use it
    assert handle.latest().schedule.describe() == "steps 1-2 dense, 3 search, 4 sparse"
    assert calls(handle) == {"dense": 8, "search": 4, "sparse": 4}
    assert other.count(288, 7) == other.count(288, 9) == 8
    assert other.count(288, 288) == 8
    assert "Dense steps by: another node's attention" in handle.latest().lines()
    assert sum(kept_dense(handle).values()) == 16
    plain, _ = sparse(load("wan_h64"), warmup=0.5)
    assert_same_video(out, sample(plain, texts=(7, 9)))


@pytest.mark.parametrize("order", ["before", "after"])
def test_other_override_serves_layers_that_stay_dense(load, order):
    other = Override(reshape_output=True)
    fields = {"dense_layers": (0,), "sparsity": 0.5}
    if order == "before":
        model, handle = sparse(with_override(load("wan_h64"), other), **fields)
    else:
        model, handle = sparse(load("wan_h64"), **fields)
        model = with_override(model, other)
    sample(model, cfg=1.0)
    assert other.count(288, 288) == 4
    assert kept_dense(handle)["listed in `dense_layers`"] == 4
    assert calls(handle) == {"search": 1, "sparse": 3}


class WholeCalls(Override):
    """As guidance by attention does: parts the rows by conditioning, and has a value per head."""

    def __call__(self, func, q, k, v, heads, *args, **kwargs):
        options = kwargs["transformer_options"]
        named = len(options["uuids"]), len(options["cond_or_uncond"])
        self.named = {*getattr(self, "named", ()), (len(q), *named)}
        assert heads == 4, f"{heads} of this model's four heads"
        assert len(set(options["uuids"])) == len(options["uuids"])
        halves = [x.chunk(len(options["cond_or_uncond"])) for x in (q, k, v)]
        serve = super().__call__
        return torch.cat(
            [serve(func, *half, heads, *args, **kwargs) for half in zip(*halves, strict=True)]
        )


@pytest.mark.parametrize("fails", ["nothing", "search", "sparse"])
@pytest.mark.parametrize("videos", [1, 2])
def test_another_override_gets_whole_calls_and_the_names_of_their_rows(
    load, monkeypatch, fails, videos
):
    from sparse_attn.run import serving

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("sparse_attn.run.dense.PROBE_HEADS", 1)
    if fails != "nothing":
        name = {"search": "fused_online_search", "sparse": "sparse_step"}[fails]
        monkeypatch.setattr(serving, name, out_of_memory)
    other = WholeCalls()
    model, _ = sparse(with_override(load("wan_h64"), other), warmup=0.5, dense_attention="auto")
    shape = (videos, *VIDEO[1:])
    out = sample(model, shape, texts=(7, 7))
    whole, parts = (2 * videos, 2, 2), (videos, 1, 1)
    assert other.named == ({whole} if fails == "nothing" else {whole, parts})
    if fails == "search":
        assert_same_video(out, sample(load("wan_h64"), shape, texts=(7, 7)))


def test_other_override_serves_hunyuan_without_knowing_output_shapes(load):
    other = Override(reshape_output=True)
    # the dense steps go through the hook in its own layout, [B, H, L, D]
    model, handle = sparse(with_override(load("hunyuan"), other), warmup=0.5, sparsity=0.0)
    out = sample(model)
    assert handle.latest().schedule.describe() == "steps 1-2 dense, 3 search, 4 sparse"
    assert_same_video(out, sample(load("hunyuan")))


def test_fallback_of_a_sparse_layer_reaches_the_other_override_in_its_own_shape(load, monkeypatch):
    from sparse_attn.backends.torch import block_masses

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(block_masses, "block_masses", out_of_memory)
    for name in ("wan_h64", "hunyuan"):
        other = Override(reshape_output=True)
        model, _ = sparse(with_override(load(name), other))
        assert_same_video(sample(model), sample(load(name)))
        tokens = {q[-2] for q, k, _ in other.calls if q[-2] == k[-2] and q[-2] > 200}
        assert tokens, "the fallback did not reach the other override"


def test_override_placed_after_by_newer_cores_does_not_switch_ours_off(load):
    # a later node replaces the key outright; ours comes back on top at each call of the model
    other = Override()
    model, handle = sparse(load("wan_h64"))
    replaced = with_override(with_override(model, Override()), other)
    sample(replaced)
    assert calls(handle) == {"search": 4, "sparse": 12}


def test_ours_is_never_its_own_predecessor(load):
    model, handle = sparse(with_override(load("wan_h64"), attention_override), sparsity=0.0)
    assert_same_video(sample(model), sample(load("wan_h64")))
    assert calls(handle) == {"search": 4, "sparse": 12}


# ---- the contract of the hook, as recorded from ComfyUI 0.33 to 0.38


def newer_core(override, backend, q, k, v, heads, containers=False, preferred=None, **kwargs):
    """How ComfyUI 0.33 and later call an override; containers are single-owner boxes."""
    kwargs["_inside_attn_wrapper"] = True
    kwargs.pop("preferred_attention", None)
    if containers:
        boxes = [[x] for x in (q, k, v)]
        if hasattr(override, "container_function"):
            return override.container_function(*boxes, heads, **kwargs)
        q, k, v = (box.pop() for box in boxes)
    return override(backend, q, k, v, heads, **kwargs)


def test_newer_core_hands_our_override_plain_tensors():
    seen = {}

    def backend(q, k, v, heads, mask=None, **kwargs):
        seen.update(kwargs, tensors=all(isinstance(x, torch.Tensor) for x in (q, k, v)))
        return q

    q = torch.randn(1, 8, 16)
    out = newer_core(
        attention_override, backend, q, q, q, 2, containers=True, preferred_attention=object(),
        transformer_options={}, low_precision_attention=False, scale=0.5, enable_gqa=True,
    )  # fmt: skip
    assert out is q
    assert seen.pop("tensors")
    # everything is handed on as it came
    assert seen == {
        "attn_precision": None, "skip_reshape": False, "skip_output_reshape": False,
        "transformer_options": {}, "low_precision_attention": False, "scale": 0.5,
        "enable_gqa": True, "_inside_attn_wrapper": True,
    }  # fmt: skip
    # its mere presence would make the core pass containers and no function
    assert not hasattr(attention_override, "container_function")


def preferring(preferred, func):
    """As newer cores call an override for a layer whose weights ask for an attention."""

    def wrapper(*args, **kwargs):
        preferred_attention = kwargs.pop("preferred_attention", None)
        kwargs["_inside_attn_wrapper"] = True
        options = kwargs.get("transformer_options") or {}
        if KEY in options:
            return options[KEY](func, *args, **kwargs)
        return (getattr(preferred_attention, "function", None) or func)(*args, **kwargs)

    return lambda *args, **kwargs: wrapper(*args, preferred_attention=preferred, **kwargs)


@pytest.mark.parametrize("other", [None, Override()], ids=["alone", "after another override"])
def test_a_layer_that_asks_for_an_attention_gets_it_for_what_is_not_ours(load, monkeypatch, other):
    from comfy.ldm.modules import attention
    from comfy.ldm.wan import model as wan

    usual, asked = [], []
    plain = attention.attention_pytorch.__wrapped__

    def noting(calls):
        def function(*args, **kwargs):
            calls.append(args[0].shape[-2])
            return plain(*args, **kwargs)

        return function

    model = load("wan_h64")
    if other is not None:
        model = with_override(model, other)
    layer = SimpleNamespace(function=noting(asked))
    monkeypatch.setattr(wan, "optimized_attention", preferring(layer, noting(usual)))
    patched, handle = sparse(model, warmup=0.5)
    sample(patched)
    # two dense steps, two prompts, two layers; cross-attention comes in all four steps
    assert calls(handle) == {"dense": 8, "search": 4, "sparse": 4}
    # an override stands before the layer's wish, as without us
    served, left = (asked, usual) if other is None else (usual, asked)
    assert len(served) == 8 + 16 and not left
    layer.function = None
    asked.clear()
    usual.clear()
    sample(patched)
    assert len(usual) == 8 + 16 and not asked


def test_predecessor_with_a_container_function_gets_plain_calls(load):
    other = Override()
    other.container_function = lambda *args, **kwargs: pytest.fail("called without `func`")
    model, _ = sparse(with_override(load("wan_h64"), other), warmup=0.5)
    sample(model)
    assert other.count(288, 9) == 8


def test_mask_may_come_by_position():
    def backend(q, k, v, heads, mask=None, **kwargs):
        return mask

    q, mask = torch.randn(1, 8, 16), torch.ones(1, 8)
    assert attention_override(backend, q, q, q, 2, mask) is mask


def test_declined_calls_keep_every_argument(load):
    other = Override()
    model, _ = sparse(with_override(load("hunyuan"), other))
    sample(model, steps=2)
    assert other.calls
    for _, _, kwargs in other.calls:
        # without it a decorated backend would enter the override again, without end
        assert kwargs["_inside_attn_wrapper"] is True
        assert "transformer_options" in kwargs


# ---- torch.compile


@pytest.mark.parametrize("order", ["compile_after", "compile_before"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_model_gives_the_same_video_and_step_kinds(load, order):
    import torch._dynamo
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(model):
        torch._dynamo.reset()
        model = model.clone(disable_dynamic=True)
        # the filter of ComfyUI's own compile node
        guards = {"guard_filter_fn": lambda gs: ["transformer_options" not in g.name for g in gs]}
        set_torch_compile_wrapper(model, backend="eager", options=guards)
        return model

    plain, plain_handle = sparse(load("wan_h64"), warmup=0.25)
    expected = sample(plain, cfg=1.0)
    if order == "compile_after":
        model, handle = sparse(load("wan_h64"), warmup=0.25)
        model = compiled(model)
    else:
        model, handle = sparse(compiled(load("wan_h64")), warmup=0.25)
    out = sample(model, cfg=1.0)
    torch._dynamo.reset()
    assert calls(handle) == calls(plain_handle) == {"dense": 2, "search": 2, "sparse": 4}
    assert_same_video(out, expected)
    assert set(handle.latest().patterns) == {(0, "positive"), (1, "positive")}


@pytest.mark.parametrize("shape", [None, (1, 1, 8), (2, 1, 8), (1, 2, 8, 8), (2, 2, 8, 8), (8, 8)])
def test_one_conditionings_part_of_a_call_has_the_mask_and_the_names_of_its_rows(shape):
    """A mask of one row is for all of them."""
    seen = {}

    def attention(q, k, v, heads, *, mask, transformer_options, **named):
        seen.update(mask=mask, options=transformer_options)
        return q

    q, mask = torch.randn(2, 8, 16), None if shape is None else torch.randn(shape)
    options = {"uuids": ["a", "b"], "cond_or_uncond": [1, 0], "sigmas": torch.ones(1)}
    host = HostCall(attention, q, q, q, 2, mask, False, False, {"transformer_options": options})
    part = host.of_conditioning(1, slice(1, 2))
    assert torch.equal(part.dense(), host.in_heads()[0][1:])
    assert seen["options"] == {**options, "uuids": ["b"], "cond_or_uncond": [0]}
    assert options["uuids"] == ["a", "b"]
    if shape is None:
        assert seen["mask"] is None
    else:
        own = mask[1:] if len(shape) > 2 and shape[0] == 2 else mask
        assert seen["mask"].shape == own.shape and torch.equal(seen["mask"], own)


@pytest.mark.parametrize("heads", [None, 1])
def test_an_error_of_the_hosts_attention_is_known_as_its_own(heads):
    """Of a call as it came, and of the few heads that tell which dense attention is fastest."""

    def attention(*args, **named):
        raise RuntimeError("no kernel image")

    q = torch.randn(1, 8, 16)
    with pytest.raises(RuntimeError) as error:
        HostCall(attention, q, q, q, 2, None, False, False, {}).dense(heads)
    assert hasattr(error.value, BESIDE)
