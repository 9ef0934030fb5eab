"""State of one sampler run: which layer a call belongs to, which kind of step, and what follows."""

import threading
import time
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import replace

import torch

from ..backends.choice import Backends
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
from ..schedule import Schedule, StepCounter, StepKind
from ..sentences import Sentence
from .cache import Cache
from .dense import Dense, DenseChoice
from .estimate import Estimate, Workload, estimate, kept_share
from .layers import Layer, LayerPattern, Layers
from .memory import until_out_of_memory
from .pace import Pace
from .precision import Precision
from .readback import Origin, Readback, waits
from .statistics import RunStatistics
from .timer import Timer
from .verdict import why_dense

NOT_A_NUMBER = "NaN or infinity in q, k or v"
OUT_OF_MEMORY = "out of memory while searching"
SPARSE_OUT_OF_MEMORY = "out of memory in a sparse step"
REUSE_OUT_OF_MEMORY = "out of memory while measuring the recall"
LET_GO = "patterns of prompts or parts of the video that a step did not use were let go"
IN_VAIN = "prompts or parts of the video are new at every step, so no pattern is used again"
# steps in a row whose searches served no other step, before no more are made
MOST_IN_VAIN = 2
# of a list that the user has written, in a warning
MOST_SHOWN = 8
# characters
MOST_OF_AN_ERROR = 200
LAST_STEP = "the run's last step, after which no pattern is of use"


class RunState:
    """One sampler run, from its first step to its last.

    Args:
        config: what the user asked for.
        schedule: what each step does.
        dense_choice: measurements of the dense candidates; may outlive the run.
        pace: what is known of speed; may outlive the run.
        work: what is sampled, for `pace`.
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
        pace: Pace | None = None,
        work: Hashable = None,
    ):
        self.config = config
        self.schedule = schedule
        self.pace, self.work = pace or Pace(), work
        self.outlives_block = outlives_block
        self.carried = carried
        self.statistics = RunStatistics(config, schedule)
        for reason in (config.why_no_tail, config.why_no_fp8):
            if reason:
                self.statistics.warn(reason)
        if carried is not None:
            self.statistics.reuse.source = carried.source or "an earlier run"
        self.timer = Timer(self.statistics.timing)
        self.readback = Readback(self.statistics)
        self.backends = Backends(config.block_q, config.block_k)
        self.precision = Precision(
            config.low_precision is not None, self.statistics.low_precision
        )  # fmt: skip
        self.dense = Dense(
            dense_choice or DenseChoice(config.dense_attention),
            self.backends, self.precision, self.statistics, self.timer,
        )  # fmt: skip
        self.cache = Cache(config.cache, free_bytes)
        self.layers = Layers(self.cache, self.backends, self.statistics)
        self.estimates: dict[int, Estimate] = {}
        self._reserved: set[int] = set()
        self._orders: dict[tuple, torch.Tensor] = {}
        self.steps = StepCounter(schedule.sigmas)
        self._dense_layers: dict[int, frozenset[int]] = {}
        self._in_vain = 0
        self._attended: set[int] = set()
        self.step = -1
        # why the rest of the run is dense, or an empty string
        self.given_up = ""
        self._step_began = 0.0
        self._lock = threading.Lock()

    # ---- what a call does

    def attend(self, call: Call) -> torch.Tensor:
        """Serve a call of one conditioning, or one without a key, which is plainly dense.

        Returns:
            [B, H, L, D].
        """
        self._attended.add(call.step)
        if call.key is None or not self._pays(call):
            return self.dense.serve(call)
        self._reserve(len(call.q))
        layer, out = self.layers.of(call), None
        if not layer.dense_reason:
            with until_out_of_memory():
                out = self._serve(call, layer)
            if out is None and not layer.dense_reason:
                self._disable(call, layer, OUT_OF_MEMORY)
        if out is not None:
            return out
        self.statistics.kept_dense[layer.dense_reason] += 1
        return self.dense.by_host(call)

    def is_plainly_dense(self, call: Call) -> bool:
        """Whether nothing is kept of a call, so that all conditionings may share one."""
        if not self._pays(call):
            return True
        if self.schedule.kind(call.step) is not StepKind.DENSE:
            return False
        if self.config.recall or call.foreign or not self.schedule.wants_lse(call.step):
            return True
        backend, _ = self.backends.of(call.q, call.k, call.v)
        return backend is None or not (backend.one_pass_search or self.schedule.sparse_search)

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
            if self._search_sparse(call, layer):
                return self._serve_sparse(call, layer)
            if may_search and self._in_vain < MOST_IN_VAIN:
                return self._search(call, layer)
            self.statistics.kept_dense[IN_VAIN if may_search else LAST_STEP] += 1
            return self.dense.by_host(call)
        if may_search and pattern.searched_at < self.schedule.search_due(call.step):
            if layer.lse is not None:
                self._search_again(call, layer)
            elif pattern.carried or self.config.recall:
                # a carried mask has left no LSE, and a recall is asked for of exact masses
                return self._search(call, layer)
        return self._serve_sparse(call, layer)

    def _search(self, call, layer):
        """Answer with dense attention, and search on the way."""
        out = lse = None
        with self.timer.attempt("search", call.q):
            out, lse = self._install_mask(
                call, layer,
                fused_online_search(
                    layer.backend, call, self.config, self._take_lse(call, layer), self.dense.exact
                ),
            )  # fmt: skip
        if out is None and layer.pattern is None:
            return None
        if out is None:
            self._keep_pattern(call, layer, layer.pattern)
            return self._serve_sparse(call, layer)
        if self.schedule.searches_after(call.step) and not self.config.recall:
            self._keep_lse(layer, lse)
        self.layers.count_held()
        return self._checked(call, layer, out, out)

    def _search_again(self, call, layer):
        """Search with the kept LSE."""
        counts = self.statistics.low_precision
        done = False
        if self.precision.searches(layer.backend, call, **self.config.blocks):
            done = self._search_with_lse(call, layer, int8=True)
            if done:
                counts.searches += 1
            else:
                # quantised copies may be what memory has no room for
                counts.declined[OUT_OF_MEMORY] += 1
        if not (done or self._search_with_lse(call, layer, int8=False)):
            self._keep_pattern(call, layer, layer.pattern)
        if not self.schedule.searches_after(call.step):
            layer.lse = None

    def _search_sparse(self, call, layer) -> bool:
        """Search with the LSE of the dense step before, where the schedule has planned it so."""
        if not self.schedule.sparse_search or layer.lse is None:
            return False
        done = self._search_with_lse(call, layer, int8=False)
        if not self.schedule.searches_after(call.step):
            layer.lse = None
        return done

    def _search_with_lse(self, call, layer, *, int8: bool) -> bool:
        with self.timer.attempt("search_again", call.q):
            lse = self.cache.fetch(layer.lse, call.q.device)
            self._install_mask(
                call, layer, lse_cached_search(layer.backend, call, self.config, lse, int8)
            )  # fmt: skip
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
            return self._disable(call, layer, SPARSE_OUT_OF_MEMORY)
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
                pattern = LayerPattern(
                    found.mask, found.order, torch.tensor(found.layer.density),
                    torch.tensor(found.layer.recall), found.similar, searched_at=call.step,
                    carried=True,
                )  # fmt: skip
                self._install(call, layer, pattern, found.recall, exact=False)
                reuse.masks += 1
                reuse.recall.append(found.layer.mean_recall())
        if layer.pattern is None:
            reuse.refused[reason] += 1
        elif not self.schedule.searches_after(call.step):
            layer.lse = None
        self.layers.count_held()

    # ---- parts of a call

    def _by_position(self, call: Call) -> torch.Tensor:
        """The order of a sequence by position, made once; all layers share it."""
        key = call.layout, call.q.device
        if key not in self._orders:
            with self.outlives_block():
                self._orders[key] = serpentine_order(*key)
        return self._orders[key]

    def _install_mask(self, call: Call, layer: Layer, found: Found) -> tuple:
        """Let a layer use what a search found; returns the search's own output and LSE."""
        similar = None if found.similar is None else found.similar.float().mean(0)
        density, recall = found.mask.density().mean(0), found.recall.mean(0)
        pattern = LayerPattern(
            found.mask, found.order, density, recall, similar, searched_at=call.step
        )  # fmt: skip
        self._install(call, layer, pattern, recall, found.exact)
        return found.out, found.lse

    def _install(self, call, layer, pattern: LayerPattern, recall, exact: bool) -> None:
        """Let a layer use a pattern, which holds `recall` [H] in this call."""
        block_map, similar = pattern.mask.block_map(), pattern.similar
        with self.outlives_block():
            pattern = replace(
                pattern, density=pattern.density.clone(), recall=pattern.recall.clone(),
                similar=None if similar is None else similar.clone(),
            )  # fmt: skip
            kept = self.layers.install(layer, pattern)
            self.readback.add_pattern(call, layer, kept, recall.clone(), block_map.clone(), exact)

    def _take_lse(self, call: Call, layer: Layer) -> torch.Tensor | None:
        """The kept LSE on the call's device; the layer keeps it no longer."""
        lse, layer.lse = layer.lse, None
        return None if lse is None else self.cache.fetch(lse, call.q.device)

    def _keep_pattern(self, call: Call, layer: Layer, pattern: LayerPattern) -> None:
        """Go on with the earlier pattern where memory has no room for a search."""
        self.statistics.warn(f"{OUT_OF_MEMORY}: layer {call.layer} kept its earlier pattern")
        layer.pattern = replace(pattern, searched_at=call.step)

    def _keep_lse(self, layer: Layer, lse: torch.Tensor | None) -> None:
        """Keep an LSE while memory has room; without it the next search measures its own."""
        with until_out_of_memory(), self.outlives_block():
            layer.lse = None if lse is None else self.cache.keep(lse.half())
        self.layers.count_held()

    def _checked(self, call, layer, out, probed):
        """Answer NaN with the dense result: at once on a CPU, from the next step on a GPU."""
        if waits(call.q.device):
            with self.outlives_block():
                self.readback.add_probe(call, layer, probed.sum(dtype=torch.float32))
        elif not torch.isfinite(probed.sum(dtype=torch.float32)):
            return self._disable(call, layer, NOT_A_NUMBER)
        return out

    def _disable(self, call: Call | Origin, layer: Layer, reason: str, when: str = "from") -> None:
        """Let a layer run dense for the rest of the run."""
        layer.disable(reason)
        step = self.schedule.number(call.step)
        self.statistics.warn(f"{reason}: the layers concerned run dense {when} step {step}")

    # ---- the run

    def estimate(self, call: Call, work: Workload, windows: bool) -> Estimate:
        """What the run will do and hold, remembered in `estimates` by the number of videos.

        Args:
            windows: whether the run samples in context windows; `work` is that of one.
        """
        self._begin_dense(call)
        backend, _ = self.backends.of(call.q, call.k, call.v)
        found = self.estimates[work.batch] = estimate(
            work, self.schedule, self.config,
            one_pass=backend is not None and backend.one_pass_search,
            carried=self.carried is not None and self.carried.layout == work.layout,
            windows=windows,
        )  # fmt: skip
        return found

    def expected(self) -> list[Sentence]:
        """About how long the run takes, once a dense step of what it samples was timed."""
        found = next(iter(self.estimates.values()), None)
        speed = self.statistics.speed
        kept = kept_share(found.layout, self.config) if found else 1.0
        less = (1 - speed.sparse / speed.dense) / (1 - kept) if speed and kept < 1 else 1.0
        return self.pace.expect(self.work, len(self.schedule.kinds), found and found.skipped * less)

    def _reserve(self, batch: int) -> None:
        """At the first call that holds something, decide where the cache lives."""
        estimate = self.estimates.get(batch)
        if estimate is None or batch in self._reserved:
            return
        self._reserved.add(batch)
        self.statistics.layout = estimate.layout
        memory = self.statistics.memory
        memory.predicted_bytes = estimate.held_bytes
        # two conditionings: the positive and the negative prompt
        self.cache.make_room(2 * estimate.held_bytes)
        memory.place = self.cache.shown_place()

    def dense_layers(self, total: int) -> frozenset[int]:
        """Numbers of the layers that the user wants dense, of a model of `total`."""
        if total not in self._dense_layers:
            listed = set(self.config.dense_layers)
            missing = {n for n in listed if not -total <= n < total}
            if missing:
                some = sorted(missing)[:MOST_SHOWN]
                more = f" and {len(missing) - len(some):,} more" if len(missing) > len(some) else ""
                self.statistics.warn(
                    f"`dense_layers` lists {some}{more}, and this model has layers 0 to {total - 1}"
                )
            self._dense_layers[total] = frozenset(n % total for n in listed - missing)
        return self._dense_layers[total]

    def enter_step(self, step: int) -> bool:
        """Note that a model call of `step` begins; True when the step is a new one."""
        with self._lock:
            changed, previous, self.step = step != self.step, self.step, step
        if changed:
            self._leave_step(previous)
        return changed

    def _leave_step(self, step: int) -> None:
        self.end_step()
        self._let_go()
        now = time.perf_counter()
        # another node may stand in for the blocks of a model that is entered
        stood_in = bool(self._attended) and step not in self._attended
        if step >= 0 and not stood_in and not self.statistics.was_skipped(step):
            kind, took = self.schedule.kind(step), now - self._step_began
            self.statistics.steps.append((kind, took))
            if kind is StepKind.DENSE:
                self.pace.note_dense_step(self.work, took, self.statistics)
        self._step_began = now
        self._judge(step + 1)

    def _let_go(self) -> None:
        """Drop what the step did not use, and stop searching where nothing is used twice."""
        gone, all_new = self.layers.leave_step()
        if any(layer.pattern is not None or layer.lse is not None for layer in gone):
            self.statistics.warn(LET_GO)
        if not all_new:
            self._in_vain = 0
        elif any(layer.pattern is not None and not layer.served for layer in gone):
            self._in_vain += 1

    def _begin_dense(self, call: Call) -> None:
        """Run dense from the first call on where that is pinned, or known to be as fast."""
        speed = self.pace.known(call.q, self.config)
        if self.config.verdict == "dense":
            self._run_dense(max(self.step, 0), Sentence("pinned_dense"))
        elif self.config.verdict == "auto" and speed is not None:
            self.statistics.speed = speed
            if not speed.pays:
                kept = kept_share(call.layout, self.config)
                self._run_dense(max(self.step, 0), why_dense(speed, kept))

    def _judge(self, step: int) -> None:
        """Run dense from `step` on where sparse calls have proved no faster, of every shape."""
        speeds = self.pace.judge(self.statistics.timing, self.config)
        if self.config.verdict != "auto" or not speeds:
            return
        self.statistics.speed = min(speeds.values(), key=lambda speed: speed.dense / speed.sparse)
        if not any(speed.pays for speed in speeds.values()):
            kept = self.statistics.patterns.density() or 0.0
            self._run_dense(step, why_dense(self.statistics.speed, kept))

    def _run_dense(self, step: int, why: Sentence) -> None:
        planned, statistics = self.schedule, self.statistics
        self.schedule = statistics.schedule = planned.dense_from(step)
        if self.schedule != planned:
            statistics.dense_from, statistics.why_dense = step, why
            self.layers.clear()

    def _pays(self, call: Call) -> bool:
        """Whether nothing says that dense calls like this one are faster."""
        speed = self.pace.known(call.q, self.config) if self.config.verdict == "auto" else None
        return speed is None or speed.pays

    def end_step(self) -> None:
        """Read what the step left on the device: with a carried mask, all that waits for the GPU."""
        self.timer.read()
        for call, layer in self.readback.read():
            if not layer.dense_reason:
                self._disable(call, layer, NOT_A_NUMBER, "after")

    def end(self, keep_pattern: bool = False) -> CarriedPattern | None:
        """Finish the statistics and free every tensor of the run.

        Returns:
            The run's masks on the CPU if `keep_pattern`, and there are any.
        """
        self._leave_step(self.step)
        pattern = None
        if keep_pattern:
            pattern = self.layers.as_pattern(self.statistics.model, self.config)
        self.statistics.finished = True
        self.free()
        return pattern

    def stop(self) -> None:
        """End an interrupted run: what waits on the device is not read."""
        self.statistics.stopped_at = self.schedule.first_step + max(self.step, 0)
        self.free()

    def give_up(self, error: Exception) -> None:
        """Let the rest of the run be dense after an error that nobody expected."""
        if not self.given_up:
            self.given_up = f"an error in AdaSpa, {repr(error)[:MOST_OF_AN_ERROR]}"
            step = self.schedule.number(max(self.step, 0))
            self.statistics.warn(f"{self.given_up}: every call runs dense from step {step}")
        self.free()

    def free(self) -> None:
        """Let go of every tensor without waiting for the device."""
        self.layers.clear()
        self._orders.clear()
        self.readback.clear()
        self.timer.clear()
        self.cache.clear()
