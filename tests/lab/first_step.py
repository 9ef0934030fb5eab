"""A first step that is sparse where the pack has it dense, to see whether it could stand for one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace


@contextmanager
def at_density(density: float) -> Iterator[None]:
    """The pack's very first step keeps a share of the blocks, the best by exact masses; 0 changes nothing.

    That is the most such a step could give: the masses and the LSE that a later search begins with come
    from dense attention, which the step would save.

    Raises:
        RuntimeError: the step was dense all the same.
    """
    from sparse_attn.method.lse_cached_search import lse_cached_search
    from sparse_attn.method.sparse_step import sparse_step
    from sparse_attn.run.serving import Serving
    from sparse_attn.run.state import RunState
    from sparse_attn.schedule import StepKind

    usual, plain, served = Serving._serve, RunState.is_plainly_dense, []

    def serve(self, call, layer):
        if call.step or self.schedule.kind(call.step) is not StepKind.DENSE:
            return usual(self, call, layer)
        config = replace(self.config, sparsity=1 - density)
        if config.pooled:
            call = replace(call, by_position=self._by_position(call))
        _, lse = self.dense.of_search(call)
        found = lse_cached_search(layer.backend, call, config, lse, False)
        self._keep_lse(layer, lse)
        served.append(call.layer)
        return sparse_step(layer.backend, call, found.mask, found.order, False)[0]

    if density:
        Serving._serve = serve
        # a step of which nothing is kept would not come to it
        RunState.is_plainly_dense = lambda self, call: bool(call.step) and plain(self, call)
    try:
        yield
        if density and not served:
            raise RuntimeError("The first step was dense all the same.")
    finally:
        Serving._serve, RunState.is_plainly_dense = usual, plain
