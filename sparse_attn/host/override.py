"""ComfyUI's attention signature <-> [B, H, L, D]: which calls are ours, and the way back."""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch

from ..call import Call, LayerName
from ..run.state import RunState
from ..schedule import StepKind
from ..token_layout import TokenLayout
from .families import Family

# under this key a model call carries its context through transformer_options
CONTEXT = "adaspa"
# keeps the sum of a bias and a logit inside float32
LOWEST_BIAS = -1e30
CAPTURED = "a CUDA graph is being captured, and its replays would all repeat one step"


@dataclass
class ModelCall:
    """One call of the diffusion model: what every attention call inside it may know.

    Args:
        run: the sampler run.
        step: number of the step within the run.
        layout: tokens of the video's self-attention, or None with the `reason` there is none.
        previous: the override that stood before ours, or None.
        foretell: foretell(q, batch), told of every call that is ours, or None.
    """

    run: RunState
    step: int
    model: torch.nn.Module
    family: Family | None
    layout: TokenLayout | None
    reason: str
    previous: Callable | None
    foretell: Callable | None = None
    occurrences: Counter = field(default_factory=Counter)

    def count(self, block: Hashable) -> int:
        """Return how often a block was met before in this call, and meet it once more."""
        before = self.occurrences[block]
        self.occurrences[block] += 1
        return before

    @cached_property
    def dense_layers(self) -> frozenset[int]:
        """Numbers of the layers that the user wants dense."""
        total = self.family.num_layers(self.model)
        listed = self.run.config.dense_layers
        missing = [n for n in listed if not -total <= n < total]
        if missing:
            self.run.statistics.warn(
                f"`dense_layers` lists {missing}, and this model has layers 0 to {total - 1}"
            )
        return frozenset(n % total for n in listed if n not in missing)


class Block(NamedTuple):
    """The block that a self-attention over the video belongs to.

    Args:
        key: names the call within the model, the same in every step.
        number: of the layer, as `dense_layers` counts.
        layer: the same for people, with numbers of their own for a layer's further calls.
    """

    key: Hashable
    number: int
    layer: int


@torch.compiler.disable
def attention_override(
    func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
    skip_output_reshape=False, **kwargs,
):  # fmt: skip
    """Serve ComfyUI's attention call, or hand it on with every argument as it came."""
    options = kwargs.get("transformer_options") or {}
    context = options.get(CONTEXT)
    target = func
    if context is not None and context.previous is not None:

        def target(*args, **named):
            return context.previous(func, *args, **named)

    def original():
        return target(
            q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
            skip_output_reshape=skip_output_reshape, **kwargs,
        )  # fmt: skip

    if context is None:
        return original()
    context.run.statistics.attended.add(context.step)
    reason = not_the_video(context, q, k, v, heads, mask, skip_reshape)
    if not reason:
        block = block_of(context, options)
        bias, mask_reason = key_bias_of(mask, len(q), k.shape[-2])
        reason = decline(context, block, options, len(q)) or mask_reason
        if captured(q.device):
            reason = CAPTURED
    if reason:
        context.run.statistics.kept_dense[reason] += 1
        return original()

    q4, k4, v4 = (x if skip_reshape else to_heads(x, heads) for x in (q, k, v))

    def dense_rows(rows: slice):
        """The host's attention on some rows of the batch, in [B, H, L, D]."""

        def dense(heads=None):
            q, k, v = (x[rows, :heads] for x in (q4, k4, v4))
            part = mask if mask is None or mask.shape[0] == 1 or mask.ndim < 3 else mask[rows]
            out = target(
                q, k, v, q.shape[1], mask=part, attn_precision=attn_precision, skip_reshape=True,
                skip_output_reshape=True, **kwargs,
            )  # fmt: skip
            return out if out.ndim == 4 else to_heads(out, q.shape[1])

        return dense

    scale = kwargs.get("scale") or q4.shape[-1] ** -0.5
    low_precision = False not in (
        kwargs.get("low_precision_attention"), options.get("low_precision_attention")
    )  # fmt: skip
    run, step = context.run, context.step
    whole = Call(
        q4, k4, v4, scale, context.layout, step, dense_rows(slice(None)), bias, low_precision
    )
    if context.foretell is not None:
        context.foretell(q4, len(q4) // len(options["uuids"]))
    if run.schedule.kind(step) is StepKind.DENSE and not run.wants_lse(step, q4, k4, v4):
        out = run.dense_steps.serve(whole)
        if out is None:
            with run.timed("dense", q):
                return original()
        return from_heads(out, skip_output_reshape)

    outs = []
    for rows, key, layer, role in conditionings(context, block, options, q4):
        call = replace(
            whole, q=q4[rows], k=k4[rows], v=v4[rows], dense=dense_rows(rows),
            key_bias=None if bias is None else bias[rows],
            layer=layer, role=role, key=key, name=name_of(block, role, options),
        )  # fmt: skip
        outs.append(run.attend(call))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return from_heads(out, skip_output_reshape)


def captured(device: torch.device) -> bool:
    """Whether a CUDA graph records what is run, instead of it being run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def not_the_video(context: ModelCall, q, k, v, heads, mask, skip_reshape) -> str:
    """Say why a call is not the self-attention over the video, or return an empty string."""
    layout = context.layout
    if layout is None:
        return context.reason
    tokens = q.shape[-2]
    if tokens != layout.tokens == k.shape[-2] and mask is not None:
        return "an attention mask of guide frames, which splits the queries"
    if q.shape != k.shape or k.shape != v.shape:
        return "cross-attention or grouped heads"
    if tokens != layout.tokens:
        return f"{tokens:,} tokens are not the {layout.tokens:,} of this model's video sequence"
    expected = context.family.head_dim
    head_dim = q.shape[-1] if skip_reshape else q.shape[-1] // heads
    if expected and head_dim != expected(context.model):
        return f"heads of {head_dim}, and the video's have {expected(context.model)}"
    return ""


def decline(context: ModelCall, block: Block, options, rows: int) -> str:
    """Say why a self-attention over the video is not ours, or return an empty string."""
    config = context.run.config
    layout = context.layout
    if layout.frames == 1:
        return "one frame is an image, not a video"
    if layout.tokens < config.min_tokens:
        return f"too short: {layout.tokens:,} tokens, and `min_tokens` is {config.min_tokens:,}"
    uuids, window = options.get("uuids") or (), options.get("context_window")
    if not uuids or len(uuids) != len(options.get("cond_or_uncond") or ()) or rows % len(uuids):
        return "the host does not name its conditionings"
    if window is not None and not hasattr(window, "index_list"):
        return "a context window of an unknown kind"
    if block.number in context.dense_layers:
        return "listed in `dense_layers`"
    return ""


def block_of(context: ModelCall, options) -> Block:
    """Tell the block of a self-attention over the video, and count the call."""
    family, model = context.family, context.model
    if "block_index" in options:
        block = options.get("block_type", "double"), options["block_index"]
        number = family.layer_number(model, *block)
        occurrence = context.count(block)
        layer = number + occurrence * family.num_layers(model)
        return Block((*block, occurrence), number, layer)
    # a patch that skips blocks shifts the count, so such a pass is remembered apart
    block = "counted", frozenset(options.get("patches_replace", {}).get("dit", ()))
    number = context.count(block)
    return Block((*block, number), number, number)


def name_of(block: Block, role: str, options) -> LayerName | None:
    """Name a layer as another run would; None where two masks of a run would share the name."""
    if options.get("context_window") is not None or role.startswith("conditioning"):
        return None
    kind, index, occurrence = block.key
    if kind == "counted":
        # `index` is the set of patched blocks: a pass that skips blocks counts others
        return None if index else LayerName(role, kind, occurrence, 0)
    return LayerName(role, kind, index, occurrence)


def conditionings(context: ModelCall, block: Block, options, q):
    """Yield (rows of the batch, state key, layer, role), one per conditioning of the call.

    The host may batch conditionings in one step and split them in the next, so what a run
    remembers belongs to one conditioning.
    """
    uuids, kinds = options["uuids"], options["cond_or_uncond"]
    size = q.shape[0] // len(uuids)
    window = options.get("context_window")
    if window is not None:
        window = tuple(window.index_list)
        context.run.statistics.windows.add(window)
    if size not in context.run.foreseen:
        context.run.foreseen.add(size)
        layers = context.family.num_calls(context.model) - len(context.dense_layers)
        context.run.foresee(q, q, q, layers=layers, batch=size, layout=context.layout)
    for i, (uuid, kind) in enumerate(zip(uuids, kinds, strict=True)):
        context.run.statistics.conditionings.add(uuid)
        key = (q.device, uuid, window, context.layout, size, block.key)
        role = {0: "positive", 1: "negative"}.get(kind, f"conditioning {kind}")
        yield slice(i * size, (i + 1) * size), key, block.layer, role


def key_bias_of(mask, batch: int, tokens: int) -> tuple[torch.Tensor | None, str]:
    """Read a mask that is the same for every query and head as a bias per key.

    Args:
        mask: None, or [..., 1, L] bool (True is kept) or additive float, up to four dimensions.

    Returns:
        [B, L] float32 or None, and the reason when the mask is of another kind.
    """
    if mask is None:
        return None, ""
    shape = tuple(mask.shape)
    rows = shape[0] if mask.ndim > 2 else 1
    whole = mask.ndim in (2, 3, 4) and all(size == 1 for size in shape[1:-1])
    if mask.ndim == 2:
        whole = shape[0] == 1
    if not whole or shape[-1] != tokens or rows not in (1, batch):
        return None, f"its mask of shape {list(shape)} is not a key mask"
    bias = mask.reshape(rows, tokens)
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill(~bias, LOWEST_BIAS)
    return bias.float().clamp(min=LOWEST_BIAS).expand(batch, tokens), ""


def to_heads(x, heads: int):
    """[B, L, H * D] -> [B, H, L, D], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def from_heads(out, keep_heads: bool):
    """[B, H, L, D] -> what the caller asked for: the same, or [B, L, H * D]."""
    return out if keep_heads else out.transpose(1, 2).flatten(2)
