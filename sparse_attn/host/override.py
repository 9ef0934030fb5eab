"""The hook in ComfyUI's attention: what is ours goes to the run, all else goes on as it came."""

from functools import partial

import torch

from .host_call import HostCall
from .model_call import CONTEXT, Declined, ModelCall


@torch.compiler.disable
def attention_override(
    func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
    skip_output_reshape=False, **kwargs,
):  # fmt: skip
    """Serve ComfyUI's attention call, or hand it on with every argument as it came."""
    options = kwargs.get("transformer_options") or {}
    context = options.get(CONTEXT)
    previous = None if context is None else context.previous
    host = HostCall(
        func if previous is None else partial(previous, func), q, k, v, heads, mask, skip_reshape,
        skip_output_reshape, {"attn_precision": attn_precision, **kwargs},
        foreign=previous is not None,
    )  # fmt: skip
    if context is None:
        return host.as_it_came()
    out = serve(context, host, options)
    if out is None:
        return host.as_it_came()
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def serve(context: Declined | ModelCall, host: HostCall, options: dict) -> torch.Tensor | None:
    """Serve an attention call of a model call.

    Returns:
        [B, H, L, D], or None where the call is not ours; the reason is counted.
    """
    context.run.statistics.entered.add(context.step)
    calls = context.calls_of(host, options)
    if calls is None:
        return None
    outs = [context.run.attend(call) for call in calls]
    return outs[0] if len(outs) == 1 else torch.cat(outs)
