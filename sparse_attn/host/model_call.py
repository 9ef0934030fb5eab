"""One call of the diffusion model: which of its attention calls are ours, and whose they are."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ..call import Call, LayerName
from ..run.estimate import Estimate, Workload, why_not_worth
from ..run.state import RunState
from ..sentences import Sentence
from ..token_layout import TokenLayout
from .calling_block import Caller, Callers
from .families.family import Block, Family
from .host_call import HostCall, key_bias_of
from .replaced import replaced_by
from .sampling import UNKNOWN_WINDOW, UNNAMED
from .travelling import Uncopied

# under this key a model call travels through transformer_options
CONTEXT = "adaspa"
# in the options of a call from a compiled graph
IN_GRAPH = "adaspa_graph"
UNKNOWN_LAYER = Sentence("why_unknown_layer")
REPEATED = Sentence("why_repeated")
ONE_GRAPH = Sentence("why_one_graph")
GRADIENTS = Sentence("why_gradients")
GUIDES = Sentence("why_guides")
CAPTURED = Sentence("why_captured")


@dataclass(frozen=True)
class Declined(Uncopied):
    """A model call whose attention all runs dense, for one reason.

    Args:
        step: number of the step within the run.
        previous: the override that stood before ours, or None.
    """

    run: RunState
    step: int
    previous: Callable | None
    reason: str

    def calls_of(self, host: HostCall, options: dict) -> None:
        """Count an attention call that is not ours."""
        self.run.statistics.kept_dense[self.reason] += 1

    def count_unseen(self, entered: dict) -> None:
        """Which calls there should have been is not known."""


class Layer(NamedTuple):
    """The layer that makes a self-attention over the video.

    Args:
        key: names it within the run, the same in every step.
        block: the block it is in.
        occurrence: tells apart the layers of a block's number, for people.
        named: whether saved patterns have a name for it.
    """

    key: tuple
    block: Block
    occurrence: int
    named: bool = True


@dataclass
class ModelCall(Uncopied):
    """A model call whose self-attention over the video may be ours.

    Args:
        step: number of the step within the run.
        previous: the override that stood before ours, or None.
        layout: tokens of the video's self-attention.
        callers: what the sampling knows of the model's blocks.
        place: the part of the video that the call is about, or None for all of it; `unplaced` says
            why it is not known.
        announce: announce(lines), told at every call what to expect of the run, or None.
        inputs: what the family's rules read beside the model.
        override: ours.
    """

    run: RunState
    step: int
    previous: Callable | None
    model: torch.nn.Module
    family: Family
    layout: TokenLayout
    callers: Callers
    place: tuple | None = None
    unplaced: str = ""
    announce: Callable[[list[str]], None] | None = None
    inputs: Mapping = field(default_factory=dict)
    override: Callable | None = None
    # calls of each layer so far, and the blocks whose self-attention came in whatever form
    met: Counter = field(default_factory=Counter)
    seen: set[Block] = field(default_factory=set)
    # calls of blocks that nobody knows
    nameless: int = 0

    def calls_of(self, host: HostCall, options: dict) -> list[Call] | None:
        """What the run has to serve for an attention call.

        Returns:
            One call of each conditioning, or one of all in a plainly dense step; or None where the
            call is not ours, for a reason that is counted.
        """
        if reason := self._why_not_the_video(host):
            self.run.statistics.beside[reason] += 1
            return None
        if host.q.shape[-2] != self.layout.tokens:
            self.see(options)
            self.run.statistics.kept_dense[GUIDES] += 1
            return None
        q, k, v = host.in_heads()
        layer = self.see(options)
        layer = None if layer is None else self._counted(layer)
        bias, not_a_bias = key_bias_of(host.mask, len(q), k.shape[-2])
        reason = self._why_not_ours(layer, options, len(q)) or not_a_bias
        if captured(q.device):
            reason = CAPTURED
        elif host.wants_gradients():
            reason = GRADIENTS
        if reason or layer is None:
            if self.announce is not None and reason in (UNKNOWN_LAYER, ONE_GRAPH, GRADIENTS):
                self.announce([Sentence("unknown_model", why=reason)])
            self.run.statistics.kept_dense[reason] += 1
            return None
        scale = host.named.get("scale") or q.shape[-1] ** -0.5
        low_precision = False not in (
            host.named.get("low_precision_attention"),
            options.get("low_precision_attention"),
        )
        call = Call(
            q, k, v, scale, self.layout, self.step, host.dense, bias, low_precision, host.foreign
        )
        estimate = self._estimate(call, options)
        if self.announce is not None:
            self.announce([*self.run.expected(), *estimate.said()])
        if self.run.is_plainly_dense(call):
            return [call]
        return self._by_conditioning(call, host, layer, options)

    def see(self, options: dict) -> Layer | None:
        """Tell the layer that makes a self-attention over the video, and note that it came.

        Returns:
            The layer, or None where nobody knows.
        """
        caller, way = self.callers.calling()
        if caller is not None and not caller.shared:
            layer = self._inside(caller, way)
        elif "block_index" in options and self.callers.in_order(
            self.model, self.family.listed(self.model)
        ):
            kind = options.get("block_type", "double")
            block = self.family.published(self.model, kind, options["block_index"])
            layer = Layer((id(self.model), block, ()), block, 0)
        else:
            self.nameless += 1
            return None
        self.seen.add(layer.block)
        return layer

    def _inside(self, caller: Caller, way: tuple[int, ...]) -> Layer:
        block, named = caller.block, caller.first.issuperset(way)
        occurrence = block.follows
        if not named:
            if way not in caller.others:
                caller.others.append(way)
            # behind those that have names
            occurrence = 10 + caller.others.index(way)
        return Layer((id(self.model), caller, way), block, occurrence, named)

    def count_unseen(self, entered: dict) -> None:
        """Count the blocks whose self-attention did not come, each with what took its place.

        Args:
            entered: `transformer_options` as the model got them.
        """
        for layer, times in self.met.items():
            if times < self._times(layer):
                self._give_up(layer.key)
        blocks = [(x, self.callers.of(x)) for x, _ in self.family.listed(self.model)]
        seen = self.seen
        if self.family.by_turns:
            numbers = {block.number for block in seen}
            seen = {block for _, block in blocks if block.number in numbers}
        unseen = [(module, block) for module, block in blocks if block not in seen]
        for module, block in unseen[self.nameless :]:
            why = replaced_by(module, block, entered, self.override)
            self.run.statistics.unseen[why] += 1

    @property
    def dense_layers(self) -> frozenset[int]:
        """Numbers of the layers that the user wants dense."""
        return self.run.dense_layers(self.family.num_layers(self.model))

    def _why_not_the_video(self, host: HostCall) -> str:
        """Say why a call is not the self-attention over the video, or return an empty string."""
        q, k, v, layout = host.q, host.k, host.v, self.layout
        tokens = q.shape[-2]
        if tokens != layout.tokens == k.shape[-2] and host.mask is not None:
            return ""
        if q.shape != k.shape or k.shape != v.shape:
            return Sentence("why_cross")
        if tokens != layout.tokens:
            return Sentence("why_tokens", here=f"{tokens:,}", there=f"{layout.tokens:,}")
        expected = self.family.head_dim
        head_dim = q.shape[-1] if host.skip_reshape else q.shape[-1] // host.heads
        if expected and head_dim != expected(self.model):
            return Sentence("why_heads", here=str(head_dim), there=str(expected(self.model)))
        return ""

    def _why_not_ours(self, layer: Layer | None, options: dict, rows: int) -> str:
        """Say why a self-attention over the video is not ours, or return an empty string."""
        if reason := why_not_worth(self.layout, self.run.config):
            return reason
        if self.unplaced:
            return self.unplaced
        if layer is None:
            return ONE_GRAPH if options.get(IN_GRAPH) else UNKNOWN_LAYER
        if layer.key in self.callers.repeated:
            return REPEATED
        # a wrapper inside the model may have changed what its call was placed by
        uuids, window = options.get("uuids") or (), options.get("context_window")
        kinds = options.get("cond_or_uncond") or ()
        if not uuids or len(uuids) != len(kinds) or rows % len(uuids):
            return UNNAMED
        if len(set(zip(uuids, kinds, strict=True))) < len(uuids):
            return UNNAMED
        if window is not None and not hasattr(window, "index_list"):
            return UNKNOWN_WINDOW
        if layer.block.number in self.dense_layers:
            return Sentence("why_dense_layers")
        return ""

    def _counted(self, layer: Layer) -> Layer:
        """Count a call of a layer, and tell it from its other calls.

        A layer that comes more often than its family runs it, or less, does not tell which of its
        calls were left out: it is noted as repeated, and what is remembered of it is let go.
        """
        before = self.met[layer]
        self.met[layer] += 1
        if before >= self._times(layer):
            self._give_up(layer.key)
        if not before or layer.key in self.callers.repeated:
            return layer
        return layer._replace(key=(*layer.key, before), occurrence=layer.occurrence + before)

    def _times(self, layer: Layer) -> int:
        """How often a call of the model runs a layer."""
        family = self.family
        if family.beside is None or family.beside_times is None:
            return 1
        beside = family.beside_times(self.inputs)
        if isinstance(layer.key[1], Block):
            # what runs beside a block has its published number
            return 1 + beside * (layer.block.number in family.beside(self.model))
        return beside if layer.block.follows else 1

    def _give_up(self, key: tuple) -> None:
        if key not in self.callers.repeated:
            self.callers.repeated.add(key)
            self.run.layers.forget(lambda found: found[-1][: len(key)] == key)

    def _estimate(self, call: Call, options: dict) -> Estimate:
        """What the run will do, worked out at its first call of so many videos."""
        batch = len(call.q) // len(options["uuids"])
        known = self.run.estimates.get(batch)
        if known is not None:
            return known
        calls = self.family.num_calls(self.model)
        sparse_calls = calls - len(self.dense_layers)
        heads, windows = call.q.shape[1], self.place is not None
        work = Workload(self.layout, calls, sparse_calls, batch, heads, windows)
        return self.run.estimate(call, work)

    def _by_conditioning(
        self, call: Call, host: HostCall, layer: Layer, options: dict
    ) -> list[Call]:
        """Part a call by conditioning.

        The host may batch conditionings in one step and split them in the next, so what a run
        remembers belongs to one conditioning.
        """
        uuids, kinds = options["uuids"], options["cond_or_uncond"]
        memory = self.run.statistics.memory
        # ComfyUI gives a negative prompt for an area the name of the positive one
        memory.conditionings.update(zip(uuids, kinds, strict=True))
        if self.place is not None:
            memory.parts.add(self.place)
        size, calls = len(call.q) // len(uuids), []
        number = layer.block.number + layer.occurrence * self.family.num_layers(self.model)
        for i, (uuid, kind) in enumerate(zip(uuids, kinds, strict=True)):
            rows = slice(i * size, (i + 1) * size)
            role = {0: "positive", 1: "negative"}.get(kind, f"conditioning {kind}")
            key = call.q.device, uuid, kind, self.place, self.layout, size, layer.key
            name = name_of(layer, role, self.place)
            part = replace(call, layer=number, role=role, key=key, name=name)
            if len(uuids) > 1:
                bias = None if call.key_bias is None else call.key_bias[rows]
                q, k, v = (x[rows] for x in (call.q, call.k, call.v))
                dense = host.of_conditioning(i, rows).dense
                part = replace(part, q=q, k=k, v=v, key_bias=bias, dense=dense)
            calls.append(part)
        return calls


def captured(device: torch.device) -> bool:
    """Whether a CUDA graph records what is run, instead of it being run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def name_of(layer: Layer, role: str, place: Hashable) -> LayerName | None:
    """Name a layer as another run would; None where two masks of a run would share the name."""
    if place is not None or role.startswith("conditioning") or not layer.named:
        return None
    return LayerName(role, layer.block.kind, layer.block.index, layer.occurrence)
