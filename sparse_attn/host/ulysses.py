"""One video on several GPUs: serves between the all-to-alls of an Ulysses engine.

A rank of the engine holds a slice of the tokens of all heads. An all-to-all gives it all tokens of
its share of the heads, the engine calls `ring_attn_fn` on them, and a second all-to-all gives the
slice back (DeepSpeed Ulysses, arXiv 2309.14509). In place of that function a rank sees a model of
fewer heads, which the run serves as on one GPU. Nothing in here waits for another rank, and whatever
fails in here is answered by the engine's own function: a rank that gave up would leave the others
waiting.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from math import prod

import torch
import torch.distributed
import torch.nn.functional as F

from ..sentences import Sentence
from . import status
from .host_call import HostCall
from .model_call import CONTEXT, ModelCall
from .override import serve
from .sampling import SAMPLING

# modules of the engines and their attention classes; none is imported here
ENGINES = {
    "yunchang": "LongContextAttention",
    "xfuser.core.long_ctx_attention": "xFuserLongContextAttention",
}
GUIDANCE = "xfuser.core.distributed"
RING = Sentence("why_ring")
JOINT = Sentence("why_joint")
CAUSAL = Sentence("why_causal")
FAILED = Sentence("why_one_gpu")


@dataclass(frozen=True)
class Shards:
    """How a sequence of segments lies on the ranks.

    Each segment is a grid whose middle axis is padded with zeros to a multiple of the ranks and cut;
    a rank holds its part of every segment, one behind the other. Gathered, the sequence reads text
    0, video 0, text 1, video 1 where text and video are segments of their own.

    Args:
        segments: the grid of each, see `Family.segments`.
    """

    segments: tuple[tuple[int, int, int], ...]
    ranks: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [prod(segment) for segment in self.segments]

    @property
    def parts(self) -> list[tuple[int, int, int]]:
        """The grid of each segment on one rank."""
        return [(outer, -(-cut // self.ranks), inner) for outer, cut, inner in self.segments]

    @property
    def gathered(self) -> int:
        """Tokens of the gathered sequence, padding included."""
        return sum(map(prod, self.parts)) * self.ranks

    def in_order(self, x: torch.Tensor) -> torch.Tensor:
        """The gathered sequence [B, L, H, D] in the model's order and without padding."""
        if self._in_one_piece:
            return x[:, : self.lengths[0]]
        sizes = [prod(part) for part in self.parts]
        by_rank = [rank.split(sizes, 1) for rank in x.chunk(self.ranks, 1)]
        found = []
        for segment, part, pieces in zip(
            self.segments, self.parts, zip(*by_rank, strict=True), strict=True
        ):
            grid = torch.cat([piece.unflatten(1, part) for piece in pieces], 2)
            found.append(grid[:, :, : segment[1]].flatten(1, 3))
        return torch.cat(found, 1)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The way back: the model's sequence as the ranks hold it, zeros for padding."""
        if self._in_one_piece and x.shape[1] == self.gathered:
            return x
        cut = []
        for piece, segment, part in zip(
            x.split(self.lengths, 1), self.segments, self.parts, strict=True
        ):
            missing = part[1] * self.ranks - segment[1]
            grid = F.pad(piece.unflatten(1, segment), (0, 0, 0, 0, 0, 0, 0, missing))
            cut.append([part.flatten(1, 3) for part in grid.chunk(self.ranks, 2)])
        return torch.cat([part for rank in zip(*cut, strict=True) for part in rank], 1)

    @property
    def _in_one_piece(self) -> bool:
        """Whether the gathered sequence is the model's, padding behind it."""
        return len(self.segments) == 1 and self.segments[0][0] == 1


@dataclass(frozen=True)
class _Model:
    """The model call that this thread is inside of."""

    call: ModelCall
    options: dict


class _Thread(threading.local):
    model: _Model | None = None


_thread = _Thread()


def sequence_parallel(executor, *args, **kwargs):
    """Innermost wrapper of the diffusion model: serve its attention between the all-to-alls."""
    named = [x for x in (*args, *kwargs.values()) if isinstance(x, dict) and CONTEXT in x]
    if not named:
        return executor(*args, **kwargs)
    options = _of_these_rows(named[0], args[0])
    if options is not named[0]:
        args = [options if x is named[0] else x for x in args]
        kwargs = {name: options if x is named[0] else x for name, x in kwargs.items()}
    call = options[CONTEXT]
    if not isinstance(call, ModelCall):
        return executor(*args, **kwargs)
    before, _thread.model = _thread.model, _Model(call, options)
    try:
        with _seams():
            return executor(*args, **kwargs)
    finally:
        _thread.model = before


def _of_these_rows(options: dict, x) -> dict:
    """Options whose conditionings are those of the rows at hand.

    Guidance parallelism gives each rank one part of the batch and leaves the names of all.
    """
    names = ("uuids", "cond_or_uncond")
    sampling, groups = options.get(SAMPLING), sys.modules.get(GUIDANCE)
    if sampling is None or groups is None or not options.get("uuids"):
        return options
    rows = len(x[0] if isinstance(x, list) else x)
    whole = sampling.shape[0] * len(options["uuids"])
    ranks = groups.get_classifier_free_guidance_world_size()
    if rows == whole or rows * ranks != whole or len(options["uuids"]) % ranks:
        return options
    rank, part = groups.get_classifier_free_guidance_rank(), len(options["uuids"]) // ranks
    mine = slice(rank * part, (rank + 1) * part)
    return {**options, **{name: options[name][mine] for name in names if name in options}}


@contextmanager
def _seams() -> Iterator[None]:
    """Exchange the local attention of every engine that is loaded, while a model runs."""
    with ExitStack() as stack:
        for module, name in ENGINES.items():
            engine = getattr(sys.modules.get(module), name, None)
            if isinstance(engine, type):
                stack.enter_context(_seam(engine))
        yield


@contextmanager
def _seam(engine: type) -> Iterator[None]:
    forward = engine.forward
    if hasattr(forward, "served"):
        # a model inside a model, or another thread's
        yield
        return

    @wraps(forward)
    def with_seam(self, *args, **kwargs):
        if _thread.model is None:
            return forward(self, *args, **kwargs)
        own = self.ring_attn_fn
        if isinstance(own, partial) and own.func is _attend:
            return forward(self, *args, **kwargs)
        joint = any(kwargs.get(name) is not None for name in kwargs if "joint_tensor" in name)
        self.ring_attn_fn = partial(_attend, own, self.ulysses_pg, self.ring_pg, joint)
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.ring_attn_fn = own

    vars(with_seam)["served"] = True
    engine.forward = with_seam
    try:
        yield
    finally:
        engine.forward = forward


def _attend(own: Callable, ulysses, ring, joint: bool, q, k, v, *args, **named):
    """What stands in `ring_attn_fn`: all tokens of this rank's heads, [B, L, H / P, D]."""
    model, out = _thread.model, None
    if model is not None:
        statistics = model.call.run.statistics
        try:
            local = partial(_in_heads, lambda *heads: own(*heads, *args, **named))
            out = _served(model, local, _size(ulysses), _size(ring), joint, q, k, v, named)
        except BaseException:
            # an interrupt too: on one rank alone it would leave the others waiting
            status.log.warning("AdaSpa: %s", FAILED, exc_info=True)
            statistics.warn(FAILED)
            statistics.kept_dense[FAILED] += 1
    return own(q, k, v, *args, **named) if out is None else out


def _in_heads(own: Callable, q, k, v, heads, mask=None, **_) -> torch.Tensor:
    """An engine's own attention in the form of ComfyUI's; all are [B, H, L, D]."""
    out = own(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _served(model: _Model, local: Callable, ranks, ring_ranks, joint, q, k, v, named: dict):
    """The output as the ranks hold it, or None where the call is not ours; the reason is counted."""
    call, statistics = model.call, model.call.run.statistics
    caller, _ = call.callers.calling()
    segments = ((1, call.layout.tokens, 1),)
    if caller is not None and call.family.segments is not None:
        segments = call.family.segments(caller.block.kind, call.layout, call.inputs)
    shards = Shards(segments, ranks)
    reason = ""
    if ring_ranks > 1:
        reason = RING
    elif joint:
        reason = JOINT
    elif named.get("causal"):
        reason = CAUSAL
    elif any(length % ranks for length in shards.lengths[:-1]):
        # the engine then counts its padding in the positions of what comes behind
        reason = Sentence("why_shared", count=f"{shards.lengths[0]:,}", gpus=str(ranks))
    elif caller is not None and q.shape == k.shape and q.shape[1] != shards.gathered:
        reason = f"the engine shares {q.shape[1]:,} tokens, not the video's {shards.gathered:,}"
    if reason:
        if q.shape == k.shape:
            # it came, so nobody has replaced it
            call.see(model.options)
            statistics.kept_dense[reason] += 1
        return None
    if q.shape == k.shape == v.shape:
        if q.shape[1] != shards.gathered:
            why = f"{q.shape[1]:,} tokens are not the {shards.gathered:,} of the video"
            statistics.beside[why] += 1
            return None
        q, k, v = (shards.in_order(x) for x in (q, k, v))
    more = {"transformer_options": model.options}
    if named.get("softmax_scale") is not None:
        more["scale"] = named["softmax_scale"]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    host = HostCall(local, q, k, v, q.shape[1], None, True, True, more)
    out = serve(call, host, model.options)
    return None if out is None else shards.gather(out.transpose(1, 2).contiguous())


def _size(group) -> int:
    if group is None or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size(group)
