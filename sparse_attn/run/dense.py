"""Dense calls: the fastest attention present runs them, measured once per shape.

All candidates are exact but one, our own in low precision, which is a candidate only where the user
asked for it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..backends.choice import Backends
from ..backends.cudnn import cudnn_serves, torch_cudnn
from ..call import Call
from ..head_groups import attend_in_groups
from ..sentences import Sentence
from .memory import until_out_of_memory
from .precision import Precision
from .statistics import RunStatistics
from .timer import Timer

# a later candidate must win by this factor: each rounds differently, and two that are nearly equal
# must not take turns from run to run and give one seed two videos
MARGIN = 0.9
HOST, CUDNN, OWN, OWN_INT8 = "host", "cudnn", "own", "own int8"
PROBE_HEADS = 4
FOREIGN = Sentence("why_foreign")
HOST_SERVED = Sentence("why_host_served")


class DenseChoice:
    """Measures candidates once per shape and remembers who is fastest.

    Args:
        allowed: "auto", or "host" to leave every dense step to the host.
        measures: False takes the host, and our own attention where its LSE is needed: several GPUs
            of one video must choose alike, and each would measure for itself.
    """

    def __init__(self, allowed: str, measures: bool = True):
        self.allowed = allowed
        self.measures = measures
        self.seconds: dict[tuple, dict[str, float]] = {}

    def fastest(self, call: Call, candidates: dict[str, Callable]) -> str:
        """Name the candidate that serves calls like this fastest.

        Args:
            candidates: by name, the most trusted first: candidate(q, k, v).
        """
        if not self.measures:
            return HOST if HOST in candidates else OWN
        shape = *call.q.shape, call.q.dtype, call.q.device
        seconds = self.seconds.setdefault(shape, {})
        # a few heads tell the order of the candidates at a fraction of the time
        few = [x[:, :PROBE_HEADS] for x in (call.q, call.k, call.v)]
        for name, run in candidates.items():
            if name in seconds:
                continue
            try:
                seconds[name] = _time(run, few)
            except RuntimeError:
                # a torch build without this kernel says so only when called
                if name != CUDNN:
                    raise
        return clearly_fastest({name: seconds[name] for name in candidates if name in seconds})

    def describe(self, name: str) -> str:
        """The choice `name`, and every measured shape with the milliseconds of its candidates."""
        parts = []
        for shape, seconds in self.seconds.items():
            times = ", ".join(f"{name} {s * 1e3:.1f} ms" for name, s in seconds.items())
            parts.append(
                f"{min(PROBE_HEADS, shape[1])} of {shape[1]} heads x {shape[2]:,} tokens: {times}"
            )
        said = f"{name}, not exact" if name == OWN_INT8 else name
        return said + (f" ({'; '.join(parts)})" if parts else "")


def clearly_fastest(measured: dict[str, float]) -> str:
    """The first name, unless a later one is faster by the margin, and so on."""
    names = iter(measured)
    best = next(names)
    for name in names:
        if measured[name] < MARGIN * measured[best]:
            best = name
    return best


@dataclass(frozen=True)
class Dense:
    """Decides who runs a dense call of a run, and runs it; `choice` may outlive the run."""

    choice: DenseChoice
    backends: Backends
    precision: Precision
    statistics: RunStatistics
    timer: Timer

    def serve(self, call: Call) -> torch.Tensor:
        """Serve a plainly dense call; [B, H, L, D]."""
        name, candidates, found = HOST, {}, None
        if self._may_choose(call):
            candidates = {HOST: lambda *few: call.dense(PROBE_HEADS), **self._candidates(call)}
            with until_out_of_memory():
                name = self.choice.fastest(call, candidates)
        if name != HOST:
            found = self._attempt(name, candidates, call)
        self._say(call, HOST if found is None else name)
        return self.by_host(call) if found is None else found[0]

    def serve_with_lse(self, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Serve the dense call before a search.

        Returns:
            out: [B, H, L, D]. lse: [B, H, L] float32, or None where memory had no room for it.
        """
        name, found, coarse = OWN, None, self.coarse(call)
        if coarse is not None:
            name, found = OWN_INT8, self._attempt(OWN_INT8, {OWN_INT8: coarse}, call)
        if found is None:
            with self.timer.attempt("dense", call.q):
                name, found = self._exact(call)
        # it may be the run's only dense step, else others tell more of what serves them
        if name == OWN_INT8 or not self.statistics.dense_choice:
            self._say(call, HOST if found is None else name)
        if found is None:
            self.statistics.warn(HOST_SERVED)
            return self.by_host(call), None
        return found

    def coarse(self, call: Call) -> Callable | None:
        """Our own attention in low precision, candidate(q, k, v) -> (out, lse), where it is fastest."""
        candidates, name = self._candidates(call) if self._may_choose(call) else {}, OWN
        if OWN_INT8 in candidates:
            with until_out_of_memory():
                name = self.choice.fastest(call, candidates)
        return candidates[name] if name == OWN_INT8 else None

    def of_search(self, call: Call, coarse: Callable | None = None):
        """Run the dense pass of a search, by `coarse` or exactly: out [B, H, L, D], lse [B, H, L]."""
        with self.timer.measure("search_dense", call.q):
            if coarse is None:
                return self._exact(call)[1]
            found = coarse(call.q, call.k, call.v)
        self.precision.count(True)
        return found

    def by_host(self, call: Call) -> torch.Tensor:
        """Run the host's own attention; [B, H, L, D]."""
        with self.timer.measure("dense", call.q):
            return call.dense()

    def _may_choose(self, call: Call) -> bool:
        # with a key bias only the host serves
        return self.choice.allowed != HOST and call.key_bias is None and not call.foreign

    def _candidates(self, call: Call, *, exact: bool = False) -> dict[str, Callable]:
        """Who may run a call beside the host, by name: candidate(q, k, v) -> (out, lse)."""
        backend, _ = self.backends.of(call.q, call.k, call.v)
        found = {}
        if call.key_bias is None and cudnn_serves(call.q):
            found[CUDNN] = partial(torch_cudnn, scale=call.scale)
        if backend is not None:
            found[OWN] = partial(backend.attention, scale=call.scale, key_bias=call.key_bias)
            quantised = backend.quantised_attention
            if not exact and self.precision.serves(backend, call) and quantised is not None:
                found[OWN_INT8] = partial(_in_int8, quantised, call)
        return found

    def _say(self, call: Call, name: str) -> None:
        foreign = call.foreign and name == HOST
        self.statistics.dense_choice = FOREIGN if foreign else self.choice.describe(name)

    def _exact(self, call: Call) -> tuple[str, tuple[torch.Tensor, torch.Tensor]]:
        """Who serves, and (out, lse)."""
        candidates = self._candidates(call, exact=True)
        name = self.choice.fastest(call, candidates) if len(candidates) > 1 else OWN
        return name, candidates[name](call.q, call.k, call.v)

    def _attempt(self, name: str, candidates: dict[str, Callable], call: Call):
        """(out, lse) of a candidate, or None where memory runs out."""
        found = None
        with self.timer.attempt("dense", call.q):
            found = candidates[name](call.q, call.k, call.v)
        if name == OWN_INT8:
            self.precision.count(found is not None)
        elif found is None:
            self.statistics.warn(HOST_SERVED)
        return found


def _in_int8(quantised: Callable, call: Call, q, k, v):
    """(out, lse) of `quantised` attention, whose copies of q, k and v are of a few heads at a time."""

    def attend(part, _):
        return quantised(part.q, part.k, part.v, scale=part.scale)

    return attend_in_groups(replace(call, q=q, k=k, v=v), 1.5, 0, attend)


def _time(run: Callable, args) -> float:
    run(*args)
    _wait(args[0].device)
    start = time.perf_counter()
    run(*args)
    _wait(args[0].device)
    return time.perf_counter() - start


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
