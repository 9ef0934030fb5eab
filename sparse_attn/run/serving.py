"""What calls of a layer do in each kind of step: run dense, search, or run sparse."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..call import Call
from ..config import AdaSpaConfig
from ..method.fused_online_search import fused_online_search
from ..method.lse_cached_search import lse_cached_search
from ..method.mask_search import Found
from ..method.recall import sample_rows, sampled_recall
from ..method.sparse_step import sparse_step
from ..orders.position import serpentine_order
from ..patterns.pattern import CarriedPattern
from ..patterns.reuse import SAMPLED_ROWS, fitting_mask
from ..schedule import Schedule, StepKind
from ..sentences import Sentence
from . import packed_lse
from .cache import Cache
from .dense import Dense
from .layers import Layer, LayerPattern, Layers
from .memory import until_out_of_memory
from .precision import Precision
from .readback import Origin, Readback, waits
from .statistics import RunStatistics
from .timer import Timer

NOT_A_NUMBER = Sentence("why_not_a_number")
OUT_OF_MEMORY = Sentence("why_search_memory")
SPARSE_OUT_OF_MEMORY = Sentence("why_sparse_memory")
REUSE_OUT_OF_MEMORY = Sentence("why_recall_memory")
LET_GO = Sentence("why_let_go")
IN_VAIN = Sentence("why_in_vain")
# steps in a row whose searches served no other step, before no more are made
MOST_IN_VAIN = 2
LAST_STEP = Sentence("why_last_step")


@dataclass(eq=False)
class Serving:
    """Serves the calls of a run that may keep something of their layer, with the run's own parts.

    Args:
        outlives_block: context in which tensors that outlive a transformer block are allocated.
        carried: masks of another run to begin with, or None.
        orders: by layout and device, the order by position, which all layers share.
        in_vain: steps in a row whose searches served no other step.
    """

    config: AdaSpaConfig
    statistics: RunStatistics
    timer: Timer
    readback: Readback
    precision: Precision
    dense: Dense
    cache: Cache
    layers: Layers
    outlives_block: Callable
    carried: CarriedPattern | None
    orders: dict[tuple, torch.Tensor] = field(default_factory=dict)
    in_vain: int = 0

    @property
    def schedule(self) -> Schedule:
        return self.statistics.schedule

    def serve(self, call: Call) -> torch.Tensor:
        """Answer a call; [B, H, L, D]."""
        layer, out = self.layers.of(call), None
        if not layer.dense_reason:
            with until_out_of_memory():
                out = self._serve(call, layer)
            if out is None and not layer.dense_reason:
                self.disable(call, layer, OUT_OF_MEMORY)
        if out is not None:
            return out
        self.statistics.kept_dense[layer.dense_reason] += 1
        return self.dense.by_host(call)

    def leave_step(self) -> None:
        """Drop what the step did not use, and stop searching where nothing is used twice."""
        gone, all_new = self.layers.leave_step()
        if any(layer.pattern is not None or layer.lse is not None for layer in gone):
            self.statistics.warn(LET_GO)
        if not all_new:
            self.in_vain = 0
        elif any(layer.pattern is not None and not layer.served for layer in gone):
            self.in_vain += 1

    def _serve(self, call: Call, layer: Layer) -> torch.Tensor | None:
        """Do what the step asks of a layer; None where it has to run dense from now on."""
        if self.config.pooled:
            call = replace(call, by_position=self._by_position(call))
        if self.schedule.kind(call.step) is StepKind.DENSE:
            out, lse = self.dense.serve_with_lse(call)
            self._keep_lse(layer, lse)
            return out
        if layer.pattern is None and self.carried is not None:
            self._reuse_pattern(call, layer, self.carried)
        pattern, may_search = layer.pattern, self.schedule.may_search(call.step)
        if pattern is None:
            planned = self.schedule.sparse_search and layer.lse is not None
            if planned and self._search_with_lse(call, layer):
                return self._serve_sparse(call, layer)
            if may_search and self.in_vain < MOST_IN_VAIN:
                return self._search(call, layer)
            self.statistics.kept_dense[IN_VAIN if may_search else LAST_STEP] += 1
            return self.dense.by_host(call)
        if may_search and pattern.searched_at < self.schedule.search_due(call.step):
            if layer.lse is not None:
                if not self._search_with_lse(call, layer):
                    self._keep_pattern(call, layer, pattern)
            elif pattern.carried or self.config.recall:
                # a carried mask has left no LSE, and a recall is asked for of exact masses
                return self._search(call, layer)
        return self._serve_sparse(call, layer)

    def _search(self, call, layer):
        """Answer with dense attention, and search on the way."""
        lse, found = self._take_lse(call, layer), None
        if self._in_int8(call, layer) and (coarse := self.dense.coarse(call)) is not None:
            found = self._search_dense(call, layer, lse, coarse)
            self.precision.count_search(found is not None)
        if found is None:
            found = self._search_dense(call, layer, lse)
        if found is None and layer.pattern is None:
            return None
        if found is None:
            self._keep_pattern(call, layer, layer.pattern)
            return self._serve_sparse(call, layer)
        out, lse = found
        if self.schedule.searches_after(call.step) and not self.config.recall:
            self._keep_lse(layer, lse)
        self.layers.count_held()
        return self._checked(call, layer, out, out)

    def _in_int8(self, call, layer) -> bool:
        """Whether a search measures in INT8; a recall is asked for of exact masses."""
        wanted = self.precision.searches(layer.backend, call, **self.config.blocks)
        return wanted and not self.config.recall

    def _search_dense(self, call, layer, lse, coarse=None):
        """Output and LSE of a search, whose mask is installed; None where memory runs out."""
        with self.timer.attempt("search", call.q):
            found = fused_online_search(
                layer.backend, call, self.config, lse,
                partial(self.dense.of_search, coarse=coarse), coarse is not None,
            )  # fmt: skip
            return self._install_mask(call, layer, found)
        return None

    def _search_with_lse(self, call, layer) -> bool:
        """Search with the kept LSE; whether memory had room for it."""
        done = False
        if self._in_int8(call, layer):
            done = self._search_cached(call, layer, int8=True)
            self.precision.count_search(done)
        done = done or self._search_cached(call, layer, int8=False)
        if not self.schedule.searches_after(call.step):
            layer.lse = None
        return done

    def _search_cached(self, call, layer, *, int8: bool) -> bool:
        with self.timer.attempt("search_again", call.q):
            lse = self._lse(call, layer.lse)
            self._install_mask(
                call, layer, lse_cached_search(layer.backend, call, self.config, lse, int8)
            )
            return True
        return False

    def _serve_sparse(self, call, layer):
        found = None
        if self.precision.serves(layer.backend, call, **self.config.blocks):
            found = self._sparse_step(call, layer, quantised=True)
            self.precision.count(found is not None)
        if found is None:
            found = self._sparse_step(call, layer, quantised=False)
        if found is None:
            return self.disable(call, layer, SPARSE_OUT_OF_MEMORY)
        if self.config.recall and self.schedule.is_last_sparse(call.step):
            self._sample(call, layer)
        layer.served = True
        out, lse = found
        return self._checked(call, layer, out, out if lse is None else lse)

    def _sparse_step(self, call, layer, *, quantised: bool):
        with self.timer.attempt("sparse", call.q):
            mask, order = self.layers.fetch(layer, call.q.device)
            with self.outlives_block():
                self.layers.prefetch_next(call.key, call.q.device)
            return sparse_step(layer.backend, call, mask, order, quantised)
        return None

    def _sample(self, call, layer):
        """Measure what the mask still holds, as late as it is used, in the step's first call."""
        if layer.pattern.sampled_at == call.step:
            return
        layer.pattern = replace(layer.pattern, sampled_at=call.step)
        recall = None
        with self.timer.attempt("sample", call.q):
            mask, order = self.layers.fetch(layer, call.q.device)
            rows = sample_rows(call.layout.tokens, SAMPLED_ROWS)
            sampled = sampled_recall(call, mask, rows, order)
            with self.outlives_block():
                recall = sampled.mean(0)
        if recall is None:
            self.statistics.warn(f"out of memory while sampling the recall of layer {call.layer}")
        else:
            self.readback.add_sample(call, layer, recall)

    def _reuse_pattern(self, call, layer, carried: CarriedPattern):
        """Begin with the carried mask, if it holds here what it held when it was found."""
        reuse, reason = self.statistics.reuse, REUSE_OUT_OF_MEMORY
        with self.timer.attempt("carry", call.q):
            found = fitting_mask(carried, self.statistics.model, self.config, call)
            if isinstance(found, str):
                reason = found
            else:
                density, recall = map(torch.tensor, (found.layer.density, found.layer.recall))
                pattern = LayerPattern(
                    found.mask, found.order, density, recall, found.similar, call.step, carried=True
                )
                self._install(call, layer, pattern, found.recall, exact=False)
                reuse.masks += 1
                reuse.recall.append(found.layer.mean_recall())
        if layer.pattern is None:
            reuse.refused[reason] += 1
        elif not self.schedule.searches_after(call.step):
            layer.lse = None
        self.layers.count_held()

    def _by_position(self, call: Call) -> torch.Tensor:
        """The order of a sequence by position, made once; all layers share it."""
        key = call.layout, call.q.device
        if key not in self.orders:
            with self.outlives_block():
                self.orders[key] = serpentine_order(*key)
        return self.orders[key]

    def _install_mask(self, call: Call, layer: Layer, found: Found) -> tuple:
        """Let a layer use what a search found; returns the search's own output and LSE."""
        similar = None if found.similar is None else found.similar.float().mean(0)
        density, recall = found.mask.density().mean(0), found.recall.mean(0)
        if self.schedule.last_searches and self.config.search_stride > 1:
            # rows that chose hold more of it than those by which the next run checks it
            with until_out_of_memory():
                rows = sample_rows(call.layout.tokens, SAMPLED_ROWS)
                recall = sampled_recall(call, found.mask, rows, found.order).mean(0)
        pattern = LayerPattern(
            found.mask, found.order, density, recall, similar, searched_at=call.step
        )
        self._install(call, layer, pattern, recall, found.exact)
        return found.out, found.lse

    def _install(self, call, layer, pattern: LayerPattern, recall, exact: bool) -> None:
        """Let a layer use a pattern, which holds `recall` [H] in this call."""
        block_map, similar = pattern.mask.block_map(), pattern.similar
        with self.outlives_block():
            pattern = replace(
                pattern,
                density=pattern.density.clone(),
                recall=pattern.recall.clone(),
                similar=None if similar is None else similar.clone(),
            )
            kept = self.layers.install(layer, pattern)
            self.readback.add_pattern(call, layer, kept, recall.clone(), block_map.clone(), exact)

    def _take_lse(self, call: Call, layer: Layer) -> torch.Tensor | None:
        """The kept LSE on the call's device; the layer keeps it no longer."""
        lse, layer.lse = layer.lse, None
        return None if lse is None else self._lse(call, lse)

    def _lse(self, call: Call, kept: torch.Tensor) -> torch.Tensor:
        """A kept LSE as it was before, [B, H, L] float32."""
        return packed_lse.unpack(self.cache.fetch(kept, call.q.device), call.q.shape[2])

    def _keep_pattern(self, call: Call, layer: Layer, pattern: LayerPattern) -> None:
        """Go on with the earlier pattern where memory has no room for a search."""
        self.statistics.warn(f"{OUT_OF_MEMORY}: layer {call.layer} kept its earlier pattern")
        layer.pattern = replace(pattern, searched_at=call.step)

    def _keep_lse(self, layer: Layer, lse: torch.Tensor | None) -> None:
        """Keep an LSE while memory has room; without it the next search measures its own."""
        with until_out_of_memory(), self.outlives_block():
            layer.lse = None if lse is None else self.cache.keep(packed_lse.pack(lse))
        self.layers.count_held()

    def _checked(self, call, layer, out, probed):
        """Answer NaN with the dense result: at once on a CPU, from the next step on a GPU."""
        if waits(call.q.device):
            with self.outlives_block():
                self.readback.add_probe(call, layer, probed.sum(dtype=torch.float32))
        elif not torch.isfinite(probed.sum(dtype=torch.float32)):
            return self.disable(call, layer, NOT_A_NUMBER)
        return out

    def disable(self, call: Call | Origin, layer: Layer, reason: str, when: str = "from") -> None:
        """Let a layer run dense for the rest of the run."""
        layer.disable(reason)
        step = self.schedule.number(call.step)
        self.statistics.warn(f"{reason}: the layers concerned run dense {when} step {step}")
