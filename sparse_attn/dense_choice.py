"""Which exact attention runs the dense steps: the fastest present, measured once per shape."""

import math
import time
from collections.abc import Callable
from types import ModuleType

import torch

# a choice other than the host's must win by this factor to be worth a different rounding
MARGIN = 0.97
PROBE_HEADS = 4


def torch_cudnn(q, k, v, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's attention through torch; q, k, v [B, H, L, D] bf16 or fp16 on a CUDA device.

    Returns:
        out: [B, H, L, D]. lse: [B, H, L] float32, natural log.
    """
    # the public function picks a backend by itself and does not return the LSE
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, False, False, scale=scale
    )
    return out, lse.view(q.shape[:-1])


def cudnn_serves(q) -> bool:
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(q.device) >= (
        8,
        0,
    )


class DenseChoice:
    """Measures the exact candidates once per shape and remembers the fastest.

    Args:
        allowed: "auto", or "host" to leave every dense step to the host.
    """

    def __init__(self, allowed: str):
        self.allowed = allowed
        self.seconds: dict[tuple, dict[str, float]] = {}

    def choose(
        self, backend: ModuleType | None, q, k, v, *, scale: float, host: Callable, key_bias=None
    ) -> str:
        """Name the fastest of "host", "cudnn" and "own" for tensors of this shape.

        Args:
            host: host(q, k, v) -> [B, H, L, D], the attention that would have run.
            key_bias: with one only the host serves.
        """
        if self.allowed == "host" or key_bias is not None:
            return "host"
        measured = self._measure(q, k, v, {"host": host, **self._candidates(backend, scale)})
        best = min(measured, key=measured.get)
        return best if measured[best] < MARGIN * measured["host"] else "host"

    def with_lse(self, backend: ModuleType, q, k, v, *, scale: float, key_bias=None):
        """Run the fastest candidate that yields an LSE: out [B, H, L, D], lse [B, H, L]."""
        candidates = self._candidates(backend, scale)
        if key_bias is None and cudnn_serves(q):
            measured = self._measure(q, k, v, candidates)
            if measured.get("cudnn", math.inf) < measured["own"]:
                return torch_cudnn(q, k, v, scale)
        return backend.dense_attention(q, k, v, scale=scale, key_bias=key_bias)[:2]

    def run(self, name: str, backend: ModuleType, q, k, v, *, scale: float) -> torch.Tensor:
        """Run the candidate `name`, other than "host"."""
        return self._candidates(backend, scale)[name](q, k, v)

    def describe(self) -> str:
        """Every measured shape with the milliseconds of its candidates."""
        parts = []
        for shape, seconds in self.seconds.items():
            times = ", ".join(f"{name} {s * 1e3:.1f} ms" for name, s in seconds.items())
            parts.append(
                f"{min(PROBE_HEADS, shape[1])} of {shape[1]} heads x {shape[2]:,} tokens: {times}"
            )
        return "; ".join(parts)

    @staticmethod
    def _shape(q):
        return (q.shape[0], q.shape[1], q.shape[2], q.shape[3], q.dtype, q.device)

    @staticmethod
    def _candidates(backend, scale):
        found = {"cudnn": lambda q, k, v: torch_cudnn(q, k, v, scale)[0]}
        if backend is not None:
            found["own"] = lambda q, k, v: backend.dense_attention(q, k, v, scale=scale)[0]
        return found

    def _measure(self, q, k, v, candidates: dict[str, Callable]) -> dict[str, float]:
        """Seconds of each candidate that serves; those not measured before are measured now."""
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
        return seconds


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
