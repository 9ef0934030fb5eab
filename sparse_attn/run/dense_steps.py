"""The dense steps of a run: who serves a call, in which precision, and how long it took."""

from collections.abc import Callable

import torch

from ..backends.choice import Backend, Backends
from ..call import Call
from .dense import EXACT, DenseChoice
from .precision import LowPrecision
from .statistics import RunStatistics


class DenseSteps:
    """Serves dense calls of one run with what its `DenseChoice` finds to be fastest.

    Args:
        timed: timed(kind, q) -> context in which a call is timed.
    """

    def __init__(
        self,
        choice: DenseChoice,
        backends: Backends,
        low_precision: LowPrecision,
        statistics: RunStatistics,
        timed: Callable,
    ):
        self.choice = choice
        self.backends = backends
        self.low_precision = low_precision
        self.statistics = statistics
        self.timed = timed

    def serve(self, call: Call) -> torch.Tensor | None:
        """Serve a plainly dense call.

        Returns:
            [B, H, L, D], or None when the host's own attention is the choice; the caller runs it
            within `timed`.
        """
        q, k, v = call.q, call.k, call.v
        backend, _ = self.backends.of(q, k, v)
        choice, wish = self.choice, self.low_precision
        name = choice.choose(
            backend, q, k, v, scale=call.scale, host=lambda q, k, v: call.dense(q.shape[1]),
            key_bias=call.key_bias, precision=self._precision(backend, call),
        )  # fmt: skip
        self.statistics.dense_choice = choice.describe(name)
        if name == "host":
            return None
        with self.timed("dense", q):
            if name in EXACT:
                return choice.run(name, backend, q, k, v, scale=call.scale)
            found = wish.attend(backend, q, k, v, scale=call.scale)
            return None if found is None else found[0]

    def serve_with_lse(
        self, backend: Backend, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Serve the dense call before a search, which needs the call's LSE.

        Returns:
            out [B, H, L, D], lse [B, H, L].
        """
        choice, found = self.choice, None
        q, k, v, scale = call.q, call.k, call.v, call.scale
        precision = self._precision(backend, call)
        exact = precision is None
        if not exact:
            name = choice.choose_with_lse(backend, q, k, v, scale=scale, precision=precision)
            exact = name in EXACT
        with self.timed("dense", q):
            if not exact:
                # it may be the run's only dense step
                self.statistics.dense_choice = choice.describe(name)
                found = self.low_precision.attend(backend, q, k, v, scale=scale)
            return found or choice.with_lse(backend, q, k, v, scale=scale, key_bias=call.key_bias)

    def _precision(self, backend, call: Call) -> str | None:
        """The low precision that may stand for election in this call, or None."""
        wish = self.low_precision
        serves = self.choice.has_candidates(backend, call.key_bias) and wish.serves(
            backend, call.q, call.k, call.v, allowed=call.low_precision
        )
        return wish.precision if serves else None
