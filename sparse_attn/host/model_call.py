"""One call of the diffusion model: which of its attention calls are ours, and whose they are."""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch

from ..call import Call, LayerName
from ..run.estimate import Estimate, Workload, why_not_worth
from ..run.state import RunState
from ..token_layout import TokenLayout
from .families import Family

# under this key a model call travels through transformer_options
CONTEXT = "adaspa"
# keeps the sum of a bias and a logit inside float32
LOWEST_BIAS = -1e30
CAPTURED = "a CUDA graph is being captured, and its replays would all repeat one step"


@dataclass(frozen=True, eq=False)
class HostCall:
    """One attention call as ComfyUI made it, and how ComfyUI would serve it.

    Args:
        attention: the host's, or the override that stood before ours.
        q, k, v: [B, L, H * D], or [B, H, L, D] with `skip_reshape`.
        named: the other arguments.
    """

    attention: Callable
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    heads: int
    mask: torch.Tensor | None
    skip_reshape: bool
    skip_output_reshape: bool
    named: dict

    def as_it_came(self):
        """What the host would return."""
        return self.attention(
            self.q, self.k, self.v, self.heads, mask=self.mask, skip_reshape=self.skip_reshape,
            skip_output_reshape=self.skip_output_reshape, **self.named,
        )  # fmt: skip

    def in_heads(self) -> list[torch.Tensor]:
        """q, k and v as [B, H, L, D]."""
        return [
            x if self.skip_reshape else to_heads(x, self.heads) for x in (self.q, self.k, self.v)
        ]

    def dense(self, heads: int | None = None, rows: slice | None = None) -> torch.Tensor:
        """The host's attention of the first `heads` and of some rows of the batch, or of all.

        Returns:
            [B, H, L, D].
        """
        if heads is None and rows is None:
            out = self.as_it_came()
            return out if out.ndim == 4 else to_heads(out, self.heads)
        rows, mask = rows or slice(None), self.mask
        if mask is not None and mask.ndim > 2 and mask.shape[0] > 1:
            mask = mask[rows]
        q, k, v = (x[rows, :heads] for x in self.in_heads())
        out = self.attention(
            q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True,
            **self.named,
        )  # fmt: skip
        return out if out.ndim == 4 else to_heads(out, q.shape[1])


@dataclass(frozen=True)
class Declined:
    """A model call whose attention all runs dense, for one reason.

    Args:
        step: number of the step within the run.
        previous: the override that stood before ours, or None.
    """

    run: RunState
    step: int
    previous: Callable | None
    reason: str

    def calls_of(self, host: HostCall, options: dict) -> str:
        """The reason why an attention call is not ours."""
        return self.reason


class Block(NamedTuple):
    """The block that a self-attention over the video belongs to.

    Args:
        key: names the call within the model, the same in every step.
        number: of the layer, as `dense_layers` counts.
        layer: the same for people, with numbers of their own for a layer's further calls.
    """

    key: tuple
    number: int
    layer: int


@dataclass
class ModelCall:
    """A model call whose self-attention over the video may be ours.

    Args:
        step: number of the step within the run.
        previous: the override that stood before ours, or None.
        layout: tokens of the video's self-attention.
        announce: announce(estimate), told of every call that is ours, or None.
    """

    run: RunState
    step: int
    previous: Callable | None
    model: torch.nn.Module
    family: Family
    layout: TokenLayout
    announce: Callable[[Estimate], None] | None = None
    occurrences: Counter = field(default_factory=Counter)

    def calls_of(self, host: HostCall, options: dict) -> list[Call] | str:
        """What the run has to serve for an attention call, or why it is not ours.

        Returns:
            One call of each conditioning, or one of all in a plainly dense step; or the reason.
        """
        if reason := self._why_not_the_video(host):
            return reason
        q, k, v = host.in_heads()
        block = self.block_of(options)
        bias, not_a_bias = key_bias_of(host.mask, len(q), k.shape[-2])
        reason = self._why_not_ours(block, options, len(q)) or not_a_bias
        if captured(q.device):
            reason = CAPTURED
        if reason:
            return reason
        scale = host.named.get("scale") or q.shape[-1] ** -0.5
        low_precision = False not in (
            host.named.get("low_precision_attention"), options.get("low_precision_attention")
        )  # fmt: skip
        call = Call(q, k, v, scale, self.layout, self.step, host.dense, bias, low_precision)
        estimate = self._estimate(call, options)
        if self.announce is not None:
            self.announce(estimate)
        if self.run.is_plainly_dense(call):
            return [call]
        return self._by_conditioning(call, host, block, options)

    def block_of(self, options: dict) -> Block:
        """Tell the block of a self-attention over the video, and count the call."""
        family, model = self.family, self.model
        if "block_index" in options:
            block = options.get("block_type", "double"), options["block_index"]
            number = family.layer_number(model, *block)
            occurrence = self._count(block)
            layer = number + occurrence * family.num_layers(model)
            return Block((*block, occurrence), number, layer)
        # a patch that skips blocks shifts the count, so such a pass is remembered apart
        block = "counted", frozenset(options.get("patches_replace", {}).get("dit", ()))
        number = self._count(block)
        return Block((*block, number), number, number)

    def place_of(self, options: dict) -> Hashable:
        """Which part of the video a call is about: its context window, or None for all of it."""
        window = options.get("context_window")
        return None if window is None else tuple(window.index_list)

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

    def _count(self, block: Hashable) -> int:
        """Return how often a block was met before in this call, and meet it once more."""
        before = self.occurrences[block]
        self.occurrences[block] += 1
        return before

    def _why_not_the_video(self, host: HostCall) -> str:
        """Say why a call is not the self-attention over the video, or return an empty string."""
        q, k, v, layout = host.q, host.k, host.v, self.layout
        tokens = q.shape[-2]
        if tokens != layout.tokens == k.shape[-2] and host.mask is not None:
            return "an attention mask of guide frames, which splits the queries"
        if q.shape != k.shape or k.shape != v.shape:
            return "cross-attention or grouped heads"
        if tokens != layout.tokens:
            return f"{tokens:,} tokens are not the {layout.tokens:,} of this model's video sequence"
        expected = self.family.head_dim
        head_dim = q.shape[-1] if host.skip_reshape else q.shape[-1] // host.heads
        if expected and head_dim != expected(self.model):
            return f"heads of {head_dim}, and the video's have {expected(self.model)}"
        return ""

    def _why_not_ours(self, block: Block, options: dict, rows: int) -> str:
        """Say why a self-attention over the video is not ours, or return an empty string."""
        if reason := why_not_worth(self.layout, self.run.config):
            return reason
        uuids, window = options.get("uuids") or (), options.get("context_window")
        if not uuids or len(uuids) != len(options.get("cond_or_uncond") or ()) or rows % len(uuids):
            return "the host does not name its conditionings"
        if window is not None and not hasattr(window, "index_list"):
            return "a context window of an unknown kind"
        if block.number in self.dense_layers:
            return "listed in `dense_layers`"
        return ""

    def _estimate(self, call: Call, options: dict) -> Estimate:
        """What the run will do, worked out at its first call of so many videos."""
        batch = len(call.q) // len(options["uuids"])
        known = self.run.estimates.get(batch)
        if known is not None:
            return known
        calls = self.family.num_calls(self.model)
        sparse_calls = calls - len(self.dense_layers)
        work = Workload(self.layout, calls, sparse_calls, batch, call.q.shape[1])
        return self.run.estimate(call, work, windows=self.place_of(options) is not None)

    def _by_conditioning(
        self, call: Call, host: HostCall, block: Block, options: dict
    ) -> list[Call]:
        """Part a call by conditioning.

        The host may batch conditionings in one step and split them in the next, so what a run
        remembers belongs to one conditioning.
        """
        uuids, kinds = options["uuids"], options["cond_or_uncond"]
        memory = self.run.statistics.memory
        memory.conditionings.update(uuids)
        if (place := self.place_of(options)) is not None:
            memory.windows.add(place)
        size, calls = len(call.q) // len(uuids), []
        for i, (uuid, kind) in enumerate(zip(uuids, kinds, strict=True)):
            rows = slice(i * size, (i + 1) * size)
            role = {0: "positive", 1: "negative"}.get(kind, f"conditioning {kind}")
            part = replace(
                call,
                layer=block.layer,
                role=role,
                key=(call.q.device, uuid, place, self.layout, size, block.key),
                name=name_of(block, role, place),
            )
            if len(uuids) > 1:
                bias = None if call.key_bias is None else call.key_bias[rows]
                part = replace(
                    part, q=call.q[rows], k=call.k[rows], v=call.v[rows], key_bias=bias,
                    dense=partial(host.dense, rows=rows),
                )  # fmt: skip
            calls.append(part)
        return calls


def captured(device: torch.device) -> bool:
    """Whether a CUDA graph records what is run, instead of it being run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def name_of(block: Block, role: str, place: Hashable) -> LayerName | None:
    """Name a layer as another run would; None where two masks of a run would share the name."""
    if place is not None or role.startswith("conditioning"):
        return None
    kind, index, occurrence = block.key
    if kind == "counted":
        # `index` is the set of patched blocks: a pass that skips blocks counts others
        return None if index else LayerName(role, kind, occurrence, 0)
    return LayerName(role, kind, index, occurrence)


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


def to_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, H * D] -> [B, H, L, D], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
