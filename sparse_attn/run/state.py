"""State of one sampler run: what every layer knows, and what one attention call does with it."""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from ..backends import choice as attention
from ..call import Call
from ..config import AdaSpaConfig
from ..method import block_scores as serving
from ..method import selection
from ..method.recall import sample_rows, sampled_recall
from ..orders.position import in_rods, rods
from ..patterns.pattern import CarriedPattern
from ..patterns.reuse import SAMPLED_ROWS, fitting_mask
from ..schedule import Schedule, StepKind
from ..token_layout import TokenLayout
from .cache import Cache, predict
from .dense import DenseChoice
from .dense_steps import DenseSteps
from .layers import Layers, pattern_of
from .precision import LowPrecision
from .readback import NOT_A_NUMBER, Findings
from .statistics import RunStatistics
from .timer import Stopwatch

OUT_OF_MEMORY = "out of memory while searching"
SPARSE_OUT_OF_MEMORY = "out of memory in a sparse step"


class RunState:
    """One sampler run, from its first step to its last.

    Args:
        config: what the user asked for.
        schedule: what each step does.
        dense_choice: measurements of the exact candidates; may outlive the run.
        outlives_block: context in which tensors that outlive a transformer block are allocated.
        free_bytes: free memory of the GPU when the run starts, or None where there is none.
        carried: masks of another run to begin with, or None.
    """

    NO_CONTEXT = nullcontext

    def __init__(
        self,
        config: AdaSpaConfig,
        schedule: Schedule,
        dense_choice: DenseChoice | None = None,
        outlives_block: Callable = NO_CONTEXT,
        free_bytes: int | None = None,
        carried: CarriedPattern | None = None,
    ):
        self.config = config
        self.schedule = schedule
        self.statistics = RunStatistics(schedule)
        self.statistics.asked_recall = config.recall
        self.statistics.tail = "pooled" if config.pooled else "none"
        for reason in (config.why_no_tail, config.why_no_fp8):
            if reason:
                self.statistics.warn(reason)
        self.findings = Findings(self.statistics)
        self.low_precision = LowPrecision(config.low_precision, self.statistics)
        self.backends = attention.Backends(config.block_q, config.block_k)
        self.dense_choice = dense_choice or DenseChoice(config.dense_attention)
        self.dense_steps = DenseSteps(
            self.dense_choice, self.backends, self.low_precision, self.statistics, self.timed
        )
        self.outlives_block = outlives_block
        self.carried = carried
        if carried is not None:
            self.statistics.carried_from = carried.source or "an earlier run"
        self.cache = Cache(config.cache, free_bytes)
        self.stopwatch = Stopwatch()
        self.layers = Layers(self.cache, self.backends, self.statistics)
        self.foreseen: set[int] = set()
        self.step = -1
        self._step_began = 0.0
        self._lock = threading.Lock()

    # ---- what a call does

    def attend(self, call: Call) -> torch.Tensor:
        """Serve one conditioning's call of a step that is not plainly dense; [B, H, L, D]."""
        state = self.layers.of(call)
        kind = self.schedule.kind(call.step)
        if state.stays_dense:
            self.statistics.kept_dense[state.stays_dense] += 1
            return self._dense(call)
        if self.config.pooled and state.mask is None:
            with self.outlives_block():
                rods(call.layout, call.q.device)
        if kind is StepKind.DENSE:
            return self._dense_with_lse(call, state)
        if state.mask is None and self.carried is not None:
            self._carry(call, state)
        if state.mask is None:
            return self._search_dense(call, state)
        if state.searched_at < self.schedule.search_due(call.step):
            if state.lse is not None:
                self._search_again(call, state)
            elif state.carried or self.config.recall:
                # a carried mask has left no LSE, and a recall is asked for of exact masses
                return self._search_dense(call, state)
        return self._sparse(call, state)

    def _dense(self, call):
        with self.timed("dense", call.q):
            return call.dense()

    def _dense_with_lse(self, call, state):
        out, lse = self.dense_steps.serve_with_lse(state.backend, call)
        with self.outlives_block():
            state.lse = self.cache.keep(lse)
        self.layers.count_held()
        return out

    def _search_dense(self, call, state):
        """Answer with dense attention, and search on the way."""

        def dense_with_lse(q, k, v, key_bias):
            with self.timed("search_dense", q):
                return self.dense_choice.with_lse(
                    state.backend, q, k, v, scale=call.scale, key_bias=key_bias
                )

        previous = None if state.lse is None else self.cache.fetch(state.lse, call.q.device)
        state.lse = found = None
        try:
            with self.timed("search", call.q):
                found = serving.search_dense(
                    state.backend, dense_with_lse, call, self.config,
                    previous_lse=previous,
                )  # fmt: skip
                # one pass knows its rows' LSE only when it ends, and takes the earlier one's
                one_pass = previous is not None and state.backend.one_pass_search
                self._adopt(call, state, found, exact=not one_pass)
        except torch.OutOfMemoryError:
            found = previous = None
        if found is None:
            # outside the handler, whose traceback holds the memory that the dense pass needs
            if state.mask is None:
                return self._give_up(call, state)
            self._keep_earlier(call, state)
            return self._sparse(call, state)
        if self._wants_lse_after(call.step):
            with self.outlives_block():
                state.lse = self.cache.keep(found.lse)
        self.layers.count_held()
        return self._checked(call, state, found.out, None)

    def _carry(self, call, state):
        """Begin with the carried mask, if it holds here what it held when it was found."""
        statistics = self.statistics
        with self.timed("carry", call.q):
            found = fitting_mask(self.carried, statistics.model, self.config, call)
        if isinstance(found, str):
            with self._lock:
                statistics.not_carried[found] += 1
            return
        layer = found.layer
        with self.outlives_block():
            self.layers.hold(state, found.mask, found.order)
        if not self.schedule.searches_after(call.step):
            state.lse = None
        state.carried, state.searched_at = True, call.step
        state.density, state.recall = torch.tensor(layer.density), torch.tensor(layer.recall)
        state.similar = found.similar
        with self._lock:
            statistics.carried += 1
            statistics.carried_recall += layer.recall
        self.findings.add_mask(call, state, found.recall, found.block_map, exact=False)
        self.layers.count_held()

    def _search_again(self, call, state):
        int8 = self.low_precision.searches(
            state.backend,
            call.q,
            call.k,
            call.v,
            **self.config.blocks,
            allowed=call.low_precision,
        )
        found = self._found_again(call, state, int8=int8)
        if not found and int8:
            # quantised copies may be what memory has no room for
            self.statistics.not_low_precision[OUT_OF_MEMORY] += 1
            found = self._found_again(call, state, int8=False)
        if not found:
            self._keep_earlier(call, state)
        if not self.schedule.searches_after(call.step):
            state.lse = None

    def _found_again(self, call, state, *, int8: bool) -> bool:
        """Search with the kept LSE; False where memory runs out."""
        try:
            with self.timed("search_again", call.q):
                lse = self.cache.fetch(state.lse, call.q.device)
                found = serving.search_again(
                    state.backend, lse, call, self.config, int8=int8
                )  # fmt: skip
                self._adopt(call, state, found, exact=False)
        except torch.OutOfMemoryError:
            return False
        if int8:
            with self._lock:
                self.statistics.low_precision_searches += 1
        return True

    def _keep_earlier(self, call, state):
        self.statistics.warn(f"{OUT_OF_MEMORY}: layer {call.layer} kept its earlier pattern")
        state.searched_at = call.step

    def _sparse(self, call, state):
        out = lse = mask = order = None
        try:
            with self.timed("sparse", call.q):
                mask, order = self.layers.held(state, call.q.device)
                self.layers.prefetch_next(call, call.q.device)
                out, lse = serving.sparse(
                    state.backend, mask, call, self.low_precision, order=order
                )
        except torch.OutOfMemoryError:
            pass
        if out is None:
            return self._give_up(call, state, SPARSE_OUT_OF_MEMORY)
        if self.config.recall and self.schedule.is_last_sparse(call.step):
            self._sample(call, state, mask, order)
        return self._checked(call, state, out, lse)

    def _sample(self, call, state, mask, order):
        """Measure what the mask still holds, as late as it is used, in the step's first call."""
        if state.sampled_at == call.step:
            return
        state.sampled_at = call.step
        rows = sample_rows(call.layout.tokens, SAMPLED_ROWS)
        try:
            with self.timed("sample", call.q):
                held = sampled_recall(
                    call.q,
                    call.k,
                    mask,
                    rows,
                    scale=call.scale,
                    key_bias=call.key_bias,
                    order=order,
                )
        except torch.OutOfMemoryError:
            self.statistics.warn(f"out of memory while sampling the recall of layer {call.layer}")
        else:
            self.findings.add_sample(call, state, held.mean(0))

    # ---- parts of a call

    def _adopt(self, call, state, found, exact):
        """Turn what a search found into the layer's mask, and note what the mask holds."""
        layout = call.layout if found.order is None else in_rods(call.layout)
        keep, recall = selection.select(
            state.backend, found.masses, layout, self.config, found.scores
        )
        with self.outlives_block():
            mask = selection.pack(keep, self.config)
            self.layers.hold(state, mask, found.order)
        state.searched_at = call.step
        state.density, state.recall = mask.density().mean(0), recall.mean(0)
        state.similar = None if found.similar is None else found.similar.float().mean(0)
        state.carried = False
        self.findings.add_mask(call, state, state.recall, mask.block_map(), exact=exact)

    def _checked(self, call, state, out, lse):
        """Answer NaN with the dense result: at once on a CPU, from the next step on a GPU."""
        probe = (out if lse is None else lse).sum(dtype=torch.float32)
        if call.q.device.type == "cuda":
            self.findings.add_probe(call, state, probe)
            return out
        if torch.isfinite(probe):
            return out
        return self._give_up(call, state, NOT_A_NUMBER)

    def _give_up(self, call, state, reason=OUT_OF_MEMORY):
        state.give_up(reason)
        step = self.schedule.first_step + call.step
        self.statistics.warn(f"{reason}: the layers concerned run dense from step {step}")
        self.statistics.kept_dense[reason] += 1
        return self._dense(call)

    # ---- the run

    def wants_lse(self, step: int, q, k, v) -> bool:
        """Whether a dense step must go through `attend`, which keeps its LSE for the search."""
        if self.config.recall or not self.schedule.wants_lse(step):
            return False
        backend, _ = self.backends.of(q, k, v)
        return backend is not None and backend.one_pass_search

    def _wants_lse_after(self, step):
        return self.schedule.searches_after(step) and not self.config.recall

    def timed(self, kind: str, q):
        """Time a call as one of the kinds of `Timing`; `q` has the batch first."""
        return self.stopwatch.measure(q.device, self.statistics.timing.recorder(kind, len(q)))

    def foresee(self, q, k, v, *, layers: int, batch: int, layout: TokenLayout) -> None:
        """Predict the memory of the run at its first call, and decide where the cache lives.

        Args:
            q, k, v: [_, H, L, D] of that call. batch: videos per conditioning.
        """
        backend, _ = self.backends.of(q, k, v)
        size = predict(
            self.schedule,
            layers=layers,
            batch=batch,
            heads=q.shape[1],
            tokens=layout.tokens,
            **self.config.blocks,
            one_pass=backend is not None and backend.one_pass_search,
            keeps_lse=not self.config.recall,
            own_orders=self.config.by_similarity,
        )
        statistics = self.statistics
        statistics.predicted_bytes = size.total
        statistics.tokens = layout.tokens
        statistics.layout = layout.describe()
        # two conditionings: the positive and the negative prompt
        self.cache.make_room(2 * size.total)
        statistics.cache_place = self.cache.shown_place()

    def enter_step(self, step: int) -> bool:
        """Note that a model call of `step` begins; True when the step is a new one."""
        with self._lock:
            changed, previous, self.step = step != self.step, self.step, step
        if changed:
            self._leave_step(previous)
        return changed

    def _leave_step(self, step: int) -> None:
        self.end_step()
        now = time.perf_counter()
        if step >= 0 and not self.statistics.was_skipped(step):
            self.statistics.steps.append((self.schedule.kind(step), now - self._step_began))
        self._step_began = now

    def end_step(self) -> None:
        """Read what the step left on the device: with `_carry`, all that waits for the GPU."""
        self.stopwatch.drain()
        self.findings.read()

    def end(self, keep_pattern: bool = False) -> CarriedPattern | None:
        """Finish the statistics and free every tensor of the run.

        Returns:
            The run's masks on the CPU if `keep_pattern`, and there are any.
        """
        self._leave_step(self.step)
        pattern = None
        if keep_pattern:
            states = list(self.layers.values())
            pattern = pattern_of(states, self.statistics.model, self.config)
        self.statistics.finished = True
        self.free()
        return pattern

    def stop(self) -> None:
        """End an interrupted run: what waits on the device is not read."""
        self.statistics.stopped_at = self.schedule.first_step + max(self.step, 0)
        self.free()

    def free(self) -> None:
        """Let go of every tensor without waiting for the device."""
        self.layers.clear()
        self.findings.clear()
        self.stopwatch = Stopwatch()
        self.cache.clear()
