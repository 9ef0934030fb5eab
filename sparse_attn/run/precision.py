"""Which calls and searches of a run are served in low precision, and why the others are not."""

from ..call import Call
from ..sentences import Sentence
from .statistics import LowPrecisionCalls

NOT_ALLOWED = Sentence("why_precision")
OUT_OF_MEMORY = Sentence("why_quantising_memory")


class Precision:
    """The user's request for low precision, in one run.

    Args:
        wanted: whether the user asked for it. calls: where calls are counted.
    """

    def __init__(self, wanted: bool, calls: LowPrecisionCalls):
        self.wanted = wanted
        self.calls = calls
        self._reasons: dict[tuple, str | None] = {}

    def serves(self, backend, call: Call, block_q: int = 64, block_k: int = 64) -> bool:
        """Whether a call shall run in low precision; where the request is not met, why is counted."""
        if not self.wanted:
            return False
        reason = self._reason(backend, call, block_q, block_k)
        if reason is not None:
            self.calls.declined[reason] += 1
        return reason is None

    def searches(self, backend, call: Call, block_q: int, block_k: int) -> bool:
        """Whether a search shall measure with INT8 q and k."""
        return self.wanted and self._reason(backend, call, block_q, block_k) is None

    def count(self, ran: bool) -> None:
        """Note a call that `serves` accepted: it ran, or memory had no room for quantised copies."""
        if ran:
            self.calls.calls += 1
        else:
            self.calls.declined[OUT_OF_MEMORY] += 1

    def count_search(self, ran: bool) -> None:
        """Note a search that `searches` accepted, likewise."""
        if ran:
            self.calls.searches += 1
        else:
            self.calls.declined[OUT_OF_MEMORY] += 1

    def _reason(self, backend, call, block_q, block_k):
        if not call.low_precision:
            return NOT_ALLOWED
        q, k, v = call.q, call.k, call.v
        key = backend, q.device, q.dtype, k.dtype, v.dtype, q.shape, block_q, block_k
        if key not in self._reasons:
            self._reasons[key] = backend.why_not_quantised(q, k, v, block_q, block_k)
        return self._reasons[key]
