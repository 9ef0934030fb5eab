"""Which attention runs the dense steps: the fastest present, measured once per shape.

All candidates are exact but one, our own in low precision, which stands for election only where
the user asked for it.
"""

import time
from collections.abc import Callable

import torch

from ..backends.choice import Backend
from ..backends.cudnn import cudnn_serves, torch_cudnn

# a later candidate must win by this factor: each rounds differently, and two that are nearly equal
# must not take turns from run to run and give one seed two videos
MARGIN = 0.9
EXACT = ("host", "cudnn", "own")
PROBE_HEADS = 4


class DenseChoice:
    """Measures the exact candidates once per shape and remembers the fastest.

    Args:
        allowed: "auto", or "host" to leave every dense step to the host.
    """

    def __init__(self, allowed: str):
        self.allowed = allowed
        self.seconds: dict[tuple, dict[str, float]] = {}

    def has_candidates(self, backend: Backend | None, key_bias) -> bool:
        """Whether a dense step may run on our own kernels."""
        return self.allowed != "host" and key_bias is None and backend is not None

    def choose(
        self, backend: Backend | None, q, k, v, *, scale: float, host: Callable, key_bias=None,
        precision: str | None = None,
    ) -> str:  # fmt: skip
        """Name the fastest of "host", "cudnn" and "own" for tensors of this shape.

        Args:
            host: host(q, k, v) -> [B, H, L, D], the attention that would have run.
            key_bias: with one only the host serves.
            precision: "int8" adds "own int8".
        """
        if self.allowed == "host" or key_bias is not None:
            return "host"
        candidates = {"host": host, **self._candidates(backend, scale, precision)}
        measured = self._measure(q, k, v, candidates)
        return clearly_fastest(measured)

    def choose_with_lse(
        self, backend: Backend, q, k, v, *, scale: float, precision: str | None = None
    ) -> str:
        """Name the fastest candidate that yields an LSE, which the host does not."""
        return clearly_fastest(self._measure(q, k, v, self._candidates(backend, scale, precision)))

    def with_lse(self, backend: Backend, q, k, v, *, scale: float, key_bias=None):
        """Run the fastest exact one of them: out [B, H, L, D], lse [B, H, L]."""
        competes = key_bias is None and cudnn_serves(q)
        if competes and self.choose_with_lse(backend, q, k, v, scale=scale) == "cudnn":
            return torch_cudnn(q, k, v, scale)
        return backend.attention(q, k, v, scale=scale, key_bias=key_bias)

    def run(self, name: str, backend: Backend, q, k, v, *, scale: float) -> torch.Tensor:
        """Run the exact candidate `name`, other than "host"."""
        return self._candidates(backend, scale)[name](q, k, v)

    def describe(self, name: str) -> str:
        """The choice `name`, and every measured shape with the milliseconds of its candidates."""
        parts = []
        for shape, seconds in self.seconds.items():
            times = ", ".join(f"{name} {s * 1e3:.1f} ms" for name, s in seconds.items())
            parts.append(
                f"{min(PROBE_HEADS, shape[1])} of {shape[1]} heads x {shape[2]:,} tokens: {times}"
            )
        said = name if name in EXACT else f"{name}, not exact"
        return said + (f" ({'; '.join(parts)})" if parts else "")

    @staticmethod
    def _shape(q):
        return (q.shape[0], q.shape[1], q.shape[2], q.shape[3], q.dtype, q.device)

    @staticmethod
    def _candidates(backend, scale, precision=None):
        found = {"cudnn": lambda q, k, v: torch_cudnn(q, k, v, scale)[0]}
        if backend is not None:
            found["own"] = lambda q, k, v: backend.attention(q, k, v, scale=scale)[0]
        if precision is not None:
            found[f"own {precision}"] = lambda q, k, v: backend.quantised_attention(
                q, k, v, scale=scale
            )[0]
        return found

    def _measure(self, q, k, v, candidates: dict[str, Callable]) -> dict[str, float]:
        """Seconds of each of the candidates that serve; what is not known is measured now."""
        seconds = self.seconds.setdefault(self._shape(q), {})
        # a few heads tell the order of the candidates at a fraction of the time
        few = [x[:, :PROBE_HEADS] for x in (q, k, v)]
        for name, run in candidates.items():
            if name in seconds or (name == "cudnn" and not cudnn_serves(q)):
                continue
            try:
                seconds[name] = _time(run, few)
            except RuntimeError:
                # a torch build without this kernel says so only when called
                if name != "cudnn":
                    raise
        return {name: seconds[name] for name in candidates if name in seconds}


def clearly_fastest(measured: dict[str, float]) -> str:
    """The first name, unless a later one is faster by the margin, and so on."""
    names = iter(measured)
    best = next(names)
    for name in names:
        if measured[name] < MARGIN * measured[best]:
            best = name
    return best


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
