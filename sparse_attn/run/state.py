"""State of one sampler run: its steps, its schedule, its parts, and whether it goes on sparse."""

import threading
import time
from collections.abc import Callable, Hashable
from contextlib import nullcontext

import torch

from ..backends.choice import Backends
from ..call import Call
from ..config import AdaSpaConfig
from ..patterns.pattern import CarriedPattern
from ..schedule import Schedule, StepCounter, StepKind
from ..sentences import Sentence
from .cache import Cache
from .dense import Dense, DenseChoice
from .estimate import Estimate, Workload, estimate, kept_share
from .layers import Layers
from .pace import Pace
from .precision import Precision
from .readback import Readback
from .serving import NOT_A_NUMBER, Serving
from .statistics import RunStatistics
from .timer import Timer
from .verdict import why_dense

# of a list that the user has written, in a warning
MOST_SHOWN = 8
# characters
MOST_OF_AN_ERROR = 200


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
        self.pace, self.work = pace or Pace(), work
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
        self.precision = Precision(config.low_precision is not None, self.statistics.low_precision)
        choice = dense_choice or DenseChoice(config.dense_attention)
        self.dense = Dense(choice, self.backends, self.precision, self.statistics, self.timer)
        self.cache = Cache(config.cache, free_bytes)
        self.layers = Layers(self.cache, self.backends, self.statistics)
        self.serving = Serving(
            config, self.statistics, self.timer, self.readback, self.precision, self.dense,
            self.cache, self.layers, outlives_block, carried,
        )  # fmt: skip
        self.estimates: dict[int, Estimate] = {}
        self._reserved: set[int] = set()
        self.steps = StepCounter(schedule.sigmas)
        self._dense_layers: dict[int, frozenset[int]] = {}
        self._attended: set[int] = set()
        # seconds of dense calls in the steps before this one
        self._dense_before = 0.0
        self.step = -1
        # why the rest of the run is dense, or an empty string
        self.given_up = ""
        self._step_began = 0.0
        self._lock = threading.Lock()

    @property
    def schedule(self) -> Schedule:
        return self.statistics.schedule

    # ---- its calls

    def attend(self, call: Call) -> torch.Tensor:
        """Serve a call of one conditioning, or one without a key, which is plainly dense.

        Returns:
            [B, H, L, D].
        """
        self._attended.add(call.step)
        if call.key is None or not self._pays(call):
            return self.dense.serve(call)
        self._reserve(len(call.q))
        return self.serving.serve(call)

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

    # ---- its plan and its steps

    def estimate(self, call: Call, work: Workload) -> Estimate:
        """What the run will do and hold, remembered in `estimates` by the number of videos."""
        self._begin_dense(call)
        backend, _ = self.backends.of(call.q, call.k, call.v)
        one_pass = backend is not None and backend.one_pass_search
        carried = self.carried is not None and self.carried.layout == work.layout
        found = estimate(work, self.schedule, self.config, one_pass=one_pass, carried=carried)
        self.estimates[work.batch] = found
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
        self.serving.leave_step()
        now = time.perf_counter()
        # another node may stand in for the blocks of a model that is entered
        stood_in = bool(self._attended) and step not in self._attended
        if step >= 0 and not stood_in and not self.statistics.was_skipped(step):
            ours, took = step in self._attended, now - self._step_began
            # whatever was planned, the host ran what was declined
            kind = self.schedule.kind(step) if ours else StepKind.DENSE
            self.statistics.steps.append((kind, took))
            if kind is StepKind.DENSE:
                attention = sum(self.statistics.timing.dense) - self._dense_before
                self.pace.note_dense_step(self.work, took, attention if ours else None)
        self._step_began, self._dense_before = now, sum(self.statistics.timing.dense)
        self._judge(step + 1)

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
        statistics.schedule = planned.dense_from(step)
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
                self.serving.disable(call, layer, NOT_A_NUMBER, "after")

    def end(self, keep_pattern: bool = False) -> CarriedPattern | None:
        """Finish the statistics and free every tensor of the run.

        Returns:
            The run's masks on the CPU if `keep_pattern`, and there are any.
        """
        self._leave_step(self.step)
        self.statistics.dense_step, _ = self.pace.dense_steps.get(self.work, (None, None))
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

    def give_up(self, error: Exception, beside: bool = False) -> None:
        """Let the rest of the run be dense after an error that nobody expected.

        Args:
            beside: whether it came out of the attention that would serve without us.
        """
        if not self.given_up:
            said = repr(error)[:MOST_OF_AN_ERROR]
            self.given_up = Sentence("why_error_beside" if beside else "why_error", error=said)
            step = self.schedule.number(max(self.step, 0))
            self.statistics.warn(f"{self.given_up}: every call runs dense from step {step}")
        self.free()

    def free(self) -> None:
        """Let go of every tensor without waiting for the device."""
        self.layers.clear()
        self.serving.orders.clear()
        self.readback.clear()
        self.timer.clear()
        self.cache.clear()
