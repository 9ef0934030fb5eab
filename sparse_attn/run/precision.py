"""Which calls and later searches of a run are served in low precision, and why the others are not."""

import torch

from ..backends.choice import Backend
from .statistics import RunStatistics

NOT_ALLOWED = "the model asks for full precision there (`low_precision_attention`)"
OUT_OF_MEMORY = "out of memory while quantising"


class LowPrecision:
    """The user's wish for low precision, in one run.

    Args:
        precision: "int8", or None where the user did not ask.
        statistics: where calls are counted.
    """

    def __init__(self, precision: str | None, statistics: RunStatistics):
        self.precision = precision
        self.statistics = statistics
        statistics.low_precision = precision or ""
        self._reasons: dict[tuple, str | None] = {}

    def serves(
        self, backend: Backend, q, k, v, block_q=64, block_k=64, allowed=True
    ) -> bool:  # fmt: skip
        """Whether a call shall run in low precision; where the wish is not met, the reason counts.

        Args:
            q, k, v: [B, H, L, D]. allowed: False where the host forbids it for this call.
        """
        if self.precision is None:
            return False
        reason = None if allowed else NOT_ALLOWED
        reason = reason or self._reason(backend, q, k, v, block_q, block_k)
        if reason is not None:
            self.statistics.not_low_precision[reason] += 1
        return reason is None

    def searches(self, backend: Backend, q, k, v, block_q, block_k, allowed=True) -> bool:
        """Whether a later search shall measure with INT8 q and k; the arguments as of `serves`."""
        return (
            self.precision is not None
            and allowed
            and self._reason(backend, q, k, v, block_q, block_k) is None
        )

    def _reason(self, backend, q, k, v, block_q, block_k):
        key = backend, q.device, q.dtype, k.dtype, v.dtype, q.shape, block_q, block_k
        if key not in self._reasons:
            self._reasons[key] = backend.why_not_quantised(q, k, v, block_q, block_k)
        return self._reasons[key]

    def attend(self, backend: Backend, q, k, v, **options):
        """Run a call that `serves` accepted.

        Returns:
            (out, lse), or None where memory runs out.
        """
        try:
            found = backend.quantised_attention(q, k, v, **options)
        except torch.OutOfMemoryError:
            self.statistics.not_low_precision[OUT_OF_MEMORY] += 1
            return None
        self.statistics.low_precision_calls += 1
        return found
