"""Which backend serves a call, and why the others do not."""

from types import ModuleType

from . import triton_backend
from .torch import attention as eager

# fastest first; each has `why_not`, `dense_attention`, `block_masses`, `unpack_mask`, `arrange`,
# `pooled_masses`, `sparse_attention`, `why_not_low_precision`, `ONE_PASS_SEARCH` and, where it
# may be asked, `low_precision_attention`
BACKENDS = {"Triton kernels": triton_backend, "plain torch": eager}


class Backends:
    """The backends of a run, chosen once per kind of tensor.

    Args:
        block_q, block_k: tokens per query block and per key block.
    """

    def __init__(self, block_q: int, block_k: int):
        self.blocks = block_q, block_k
        self._chosen: dict[tuple, tuple[ModuleType | None, str]] = {}

    def of(self, q, k, v) -> tuple[ModuleType | None, str]:
        """Return what `choose` says of tensors like these."""
        key = q.device, q.dtype, k.dtype, v.dtype, q.shape[-1], k.shape[-1], v.shape[-1]
        if key not in self._chosen:
            self._chosen[key] = choose(q, k, v, *self.blocks)
        return self._chosen[key]


def choose(q, k, v, block_q: int, block_k: int) -> tuple[ModuleType | None, str]:
    """Return the first backend that can serve the call, and a line that says which and why.

    When none can, the module is None and the line holds every reason.
    """
    reasons = []
    for name, backend in BACKENDS.items():
        reason = backend.why_not(q, k, v, block_q, block_k)
        if reason is None:
            return backend, f"{name} ({'; '.join(reasons)})" if reasons else name
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)
