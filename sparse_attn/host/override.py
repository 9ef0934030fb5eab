"""The hook in ComfyUI's attention: what is ours goes to the run, all else goes on as it came."""

import sys
import threading
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from typing import Any

import torch

from .backend_history import leave_receipt
from .guard import go_on_without_us
from .host_call import HostCall
from .model_call import CONTEXT, IN_GRAPH, Declined, ModelCall


class _Thread(threading.local):
    """What a thread knows: the options of the call of the model that it is in, or None."""

    options: dict | None = None


this_thread = _Thread()
# from the hook to the host's call of it, those of `torch.compiler.disable` included
FRAMES = 8
# ComfyUI's attention functions that compiled graphs hold, by number
_functions: list[Callable] = []
# what the operator below takes, besides the arguments that have names in the hook itself
_TAKEN = {
    "transformer_options", "_inside_attn_wrapper", "scale", "enable_gqa",
    "low_precision_attention",
}  # fmt: skip


def attention_override(
    func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
    skip_output_reshape=False, **kwargs,
):  # fmt: skip
    """Serve ComfyUI's attention call, or hand it on with every argument as it came.

    A module compiled as one graph holds an operator instead, which serves when the graph runs. Any
    other compiled module parts its graph here.
    """
    if torch.compiler.is_compiling() and _is_one_graph():
        wants_gradients = torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad
        )
        if wants_gradients or not _TAKEN.issuperset(kwargs):
            return func(
                q, k, v, heads, mask=mask, attn_precision=attn_precision,
                skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape, **kwargs,
            )  # fmt: skip
        options = kwargs.get("transformer_options") or {}
        return _operator(
            q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape,
            kwargs.get("scale"), kwargs.get("enable_gqa", False),
            kwargs.get("low_precision_attention", True), options.get("block_type", ""),
            options.get("block_index", -1), _number_of(func),
        )  # fmt: skip
    return _serve(
        func, q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **kwargs
    )


def _served(
    func, q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **kwargs
):
    context = out = None
    hosts, named = func, {"attn_precision": attn_precision, **kwargs}
    try:
        hosts = _preferred(func)
        context = (kwargs.get("transformer_options") or {}).get(CONTEXT)
        if context is not None:
            foreign = context.previous is not None
            attention = partial(context.previous, func) if foreign else hosts
            host = HostCall(
                attention, q, k, v, heads, mask, skip_reshape, skip_output_reshape, named, foreign
            )
            out = serve(context, host, kwargs["transformer_options"])
            if out is not None and not skip_output_reshape:
                out = out.transpose(1, 2).flatten(2)
    except Exception as error:
        go_on_without_us(error, None if context is None else context.run)
        out = None
    if out is not None:
        return out
    # without a call of ours, which could fail
    form = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    if context is None or context.previous is None:
        return hosts(q, k, v, heads, mask=mask, **form, **named)
    return context.previous(func, q, k, v, heads, mask=mask, **form, **named)


def _preferred(func: Callable) -> Callable:
    """The attention that the calling layer's weights ask for, or `func`.

    ComfyUI 0.34 and later run it in place of `func`, but keep it from overrides: what knows it is the
    frame that called ours.
    """
    frame = sys._getframe(1)
    for _ in range(FRAMES):
        if frame is None:
            break
        if frame.f_code.co_name == "wrapper" and frame.f_locals.get("func") is func:
            preferred = frame.f_locals.get("preferred_attention")
            return getattr(preferred, "function", None) or func
        frame = frame.f_back
    return func


_serve: Any = torch.compiler.disable(_served)


def serve(context: Declined | ModelCall, host: HostCall, options: dict) -> torch.Tensor | None:
    """Serve an attention call of a model call.

    Returns:
        [B, H, L, D], or None where the call is not ours; the reason is counted.
    """
    run = context.run
    run.statistics.entered.add(context.step)
    if run.given_up:
        run.statistics.kept_dense[run.given_up] += 1
        return None
    calls = context.calls_of(host, options)
    if calls is None:
        return None
    outs = [run.attend(call) for call in calls]
    leave_receipt(options)
    return outs[0] if len(outs) == 1 else torch.cat(outs)


# ---- modules that are compiled as one graph


@torch.compiler.assume_constant_result
def _is_one_graph() -> bool:
    """Whether the graph that is traced may not be parted."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        traced = InstructionTranslator.current_tx()
        return bool(traced.one_graph or traced.error_on_graph_break)
    except (ImportError, AttributeError):
        # not every torch tells; the operator serves both kinds
        return True


@torch.compiler.assume_constant_result
def _number_of(func: Callable) -> int:
    if func not in _functions:
        _functions.append(func)
    return _functions.index(func)


def _attend_in_graph(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None,
    attn_precision: torch.dtype | None, skip_reshape: bool, skip_output_reshape: bool,
    scale: float | None, enable_gqa: bool, low_precision_attention: bool, block_type: str,
    block_index: int, number: int,
) -> torch.Tensor:  # fmt: skip
    """Attention in a compiled graph; `number` is of ComfyUI's own function.

    Returns:
        [B, L, H * D], or [B, H, L, D] with `skip_output_reshape`.
    """
    options = {**(this_thread.options or {}), IN_GRAPH: True}
    named = {"transformer_options": options, "_inside_attn_wrapper": True}
    if block_index >= 0:
        options["block_index"] = block_index
    if block_type:
        options["block_type"] = block_type
    if scale is not None:
        named["scale"] = scale
    if enable_gqa:
        named["enable_gqa"] = True
    if not low_precision_attention:
        named["low_precision_attention"] = False
    form = attn_precision, skip_reshape, skip_output_reshape
    out = _serve(_functions[number], q, k, v, heads, mask, *form, **named).contiguous()
    # an operator may not return one of its inputs, as some overrides do
    given = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    return out.clone() if out.untyped_storage().data_ptr() in given else out


# a CUDA graph would repeat one step; not every torch knows the tag
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
_TAGS: dict[str, Any] = {"tags": (_UNSAFE,)} if _UNSAFE else {}
# The name is the process's, where two copies of the pack may be loaded; each has functions of its own.
# ComfyUI names a pack by its path, which may have letters that no operator may.
_NAMESPACE = f"adaspa_{sha256(__name__.encode(errors='surrogatepass')).hexdigest()[:16]}"
_operator: Any = torch.library.custom_op(
    f"{_NAMESPACE}::attention", _attend_in_graph, mutates_args=(), **_TAGS
)


@_operator.register_fake
def _(q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, *_more):
    head_dim = v.shape[-1] if skip_reshape else q.shape[-1] // heads
    if skip_output_reshape:
        return q.new_empty(q.shape[0], heads, q.shape[-2], head_dim)
    return q.new_empty(q.shape[0], q.shape[-2], heads * head_dim)
