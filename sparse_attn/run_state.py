"""State of one sampler run: what every layer knows, and what one attention call does with it."""

import threading
import time
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch

from . import attention, selection
from .block_mask import BlockMask
from .config import AdaSpaConfig
from .dense_choice import DenseChoice
from .fused_online_search import fused_online_search
from .lse_cached_search import lse_cached_search
from .memory import GPU_SHARE, Cache, predict
from .pattern import CarriedLayer, CarriedPattern, LayerName
from .recall import sample_rows, sampled_recall
from .run_statistics import Pattern, RunStatistics, block_map
from .schedule import Schedule, StepKind
from .stopwatch import Stopwatch
from .token_layout import TokenLayout

OUT_OF_MEMORY = "out of memory while searching"
NOT_A_NUMBER = "NaN or infinity in q, k or v"
# a carried mask may hold this much less of a layer than when it was found
RECALL_LOSS = 0.05
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Call:
    """One attention call of one conditioning.

    Args:
        key: names the layer within the run: device, conditioning, context window, block.
        layer: number of the layer, from 0.
        role: which conditioning, for people: "positive" or "negative".
        step: number of the step within this run, from 0.
        scale: multiplies q @ k.T.
        key_bias: [B, L] float32 added to the logits of every query, or None.
        dense: dense(q, k, v) -> [B, H, L, D], the attention the host would have run.
        name: names the layer in every run; None where its mask means nothing to another run.
    """

    key: Hashable
    layer: int
    role: str
    step: int
    layout: TokenLayout
    scale: float
    dense: Callable
    key_bias: torch.Tensor | None = None
    name: LayerName | None = None


@dataclass
class LayerState:
    """What a run remembers of one layer: its mask, its LSE, and whether it gave up.

    `density` and `recall`, one number per head, are those of the search that found the mask.
    """

    backend: ModuleType
    mask: BlockMask | None = None
    lse: torch.Tensor | None = None
    searched_at: int = -1
    stays_dense: str = ""
    name: LayerName | None = None
    layout: TokenLayout | None = None
    density: torch.Tensor | None = None
    recall: torch.Tensor | None = None
    carried: bool = False


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
        self.dense_choice = dense_choice or DenseChoice(config.dense_attention)
        self.outlives_block = outlives_block
        self.free_bytes = free_bytes
        self.carried = carried
        if carried is not None:
            self.statistics.carried_from = carried.source or "an earlier run"
        self.cache = Cache("cpu" if config.cache == "cpu" else "gpu")
        self.stopwatch = Stopwatch()
        self.layers: dict[Hashable, LayerState] = {}
        self.following: dict[Hashable, Hashable] = {}
        self.foreseen: set[int] = set()
        self.step = -1
        self._step_began = 0.0
        self._last_key = None
        self._pending = []
        self._lock = threading.Lock()

    # ---- what a call does

    def attend(self, call: Call, q, k, v) -> torch.Tensor:
        """Serve one attention call of a step that is not plainly dense.

        Args:
            q, k, v: [B, H, L, D], one conditioning.

        Returns:
            [B, H, L, D].
        """
        state = self._state(call, q, k, v)
        kind = self.schedule.kind(call.step)
        if state.stays_dense:
            self.statistics.kept_dense[state.stays_dense] += 1
            return self._dense(call, q, k, v)
        if kind is StepKind.DENSE:
            return self._dense_with_lse(call, state, q, k, v)
        if state.mask is None and self.carried is not None:
            self._carry(call, state, q, k)
        if state.mask is None:
            return self._first_search(call, state, q, k, v)
        if kind is StepKind.SEARCH and state.searched_at != call.step:
            if state.lse is not None:
                self._search_again(call, state, q, k)
            elif state.carried:
                # no search of this run has left an LSE
                return self._first_search(call, state, q, k, v)
        return self._sparse(call, state, q, k, v)

    def _dense(self, call, q, k, v):
        with self.stopwatch.measure(q.device, self._recorder("dense", len(q))):
            return call.dense(q, k, v)

    def _dense_with_lse(self, call, state, q, k, v):
        with self.stopwatch.measure(q.device, self._recorder("dense", len(q))):
            out, lse = self.dense_choice.with_lse(
                state.backend, q, k, v, scale=call.scale, key_bias=call.key_bias
            )
        with self.outlives_block():
            state.lse = self.cache.keep(lse)
        self._count_held()
        return out

    def _first_search(self, call, state, q, k, v):
        def dense_with_lse(q, k, v):
            with self.stopwatch.measure(q.device, self._recorder("search_dense", len(q))):
                return self.dense_choice.with_lse(
                    state.backend, q, k, v, scale=call.scale, key_bias=call.key_bias
                )

        previous = None if state.lse is None else self.cache.fetch(state.lse, q.device)
        state.lse = None
        try:
            with self.stopwatch.measure(q.device, self._recorder("search", len(q))):
                out, lse, masses = fused_online_search(
                    state.backend, dense_with_lse, q, k, v,
                    scale=call.scale,
                    block_size=self.config.block_size,
                    key_bias=call.key_bias,
                    previous_lse=previous,
                )  # fmt: skip
                self._adopt(call, state, masses, exact=True)
        except torch.OutOfMemoryError:
            failed = True
        else:
            failed = False
        if failed:
            # outside the handler, whose traceback holds the memory that the dense pass needs
            out = lse = masses = previous = None
            return self._give_up(call, state, q, k, v)
        if self.schedule.searches_after(call.step):
            with self.outlives_block():
                state.lse = self.cache.keep(lse)
        self._count_held()
        return self._checked(call, state, out, None, q, k, v)

    def _carry(self, call, state, q, k):
        """Begin with the carried mask, if it holds here what it held when it was found.

        Reads one number from the device, once per layer and run: the choice is due in this call.
        """
        statistics = self.statistics
        layer, reason = self.carried.find(
            call.name,
            family=statistics.model,
            layout=call.layout,
            block_size=self.config.block_size,
            batch=len(q),
            heads=q.shape[1],
        )
        if layer is not None:
            try:
                with self.stopwatch.measure(q.device, self._recorder("carry", len(q))):
                    reason = self._adopt_carried(call, state, layer, q, k)
            except torch.OutOfMemoryError:
                reason = "out of memory while measuring the recall"
        if reason:
            with self._lock:
                statistics.not_carried[reason] += 1

    def _adopt_carried(self, call, state, layer: CarriedLayer, q, k) -> str:
        size = self.config.block_size
        mask = BlockMask(layer.bits.to(q.device), call.layout.num_blocks(size), size, size)
        rows = sample_rows(call.layout.tokens, SAMPLED_ROWS)
        held = sampled_recall(q, k, mask, rows, scale=call.scale, key_bias=call.key_bias)
        # not (a >= b): also where it is NaN
        if not held.mean() >= layer.mean_recall() - RECALL_LOSS:
            return f"recall more than {RECALL_LOSS} below what the pattern had"
        cells = block_map(mask.with_bits(mask.bits[:1]).to_dense()[0])
        with self.outlives_block():
            state.mask = mask.with_bits(self.cache.keep(mask.bits))
        if not self.schedule.searches_after(call.step):
            state.lse = None
        state.carried, state.searched_at = True, call.step
        state.density, state.recall = torch.tensor(layer.density), torch.tensor(layer.recall)
        step = self.schedule.first_step + call.step
        with self._lock:
            self.statistics.carried += 1
            self.statistics.carried_recall += layer.recall
            self._pending.append((call, state, (step, False, state.density, held.mean(0), cells)))
        self._count_held()
        return ""

    def _search_again(self, call, state, q, k):
        try:
            with self.stopwatch.measure(q.device, self._recorder("search_again", len(q))):
                masses = lse_cached_search(
                    state.backend, q, k, self.cache.fetch(state.lse, q.device),
                    scale=call.scale,
                    block_size=self.config.block_size,
                    key_bias=call.key_bias,
                )  # fmt: skip
                self._adopt(call, state, masses, exact=False)
        except torch.OutOfMemoryError:
            self.statistics.warn(f"{OUT_OF_MEMORY}: layer {call.layer} kept its earlier pattern")
            state.searched_at = call.step
        if not self.schedule.searches_after(call.step):
            state.lse = None

    def _sparse(self, call, state, q, k, v):
        with self.stopwatch.measure(q.device, self._recorder("sparse", len(q))):
            bits = self.cache.fetch(state.mask.bits, q.device)
            self._prefetch_next(call, q.device)
            out, lse = state.backend.sparse_attention(
                q, k, v, *state.backend.unpack_mask(bits, state.mask.num_k),
                block_q=state.mask.block_q,
                block_k=state.mask.block_k,
                scale=call.scale,
                key_bias=call.key_bias,
            )  # fmt: skip
        return self._checked(call, state, out, lse, q, k, v)

    # ---- parts of a call

    def _adopt(self, call, state, masses, exact):
        """Turn masses into the layer's mask, and note what the mask holds."""
        keep, recall = selection.select(masses, call.layout, self.config)
        del masses
        if state.mask is not None:
            self.cache.forget(state.mask.bits)
        with self.outlives_block():
            mask = selection.pack(keep, self.config)
            state.mask = mask.with_bits(self.cache.keep(mask.bits))
        state.searched_at = call.step
        density = keep.flatten(2).sum(-1) / keep[0, 0].numel()
        state.density, state.recall, state.carried = density.mean(0), recall.mean(0), False
        step = self.schedule.first_step + call.step
        found = (step, exact, state.density, state.recall, block_map(keep[0]))
        with self._lock:
            self._pending.append((call, state, found))

    def _checked(self, call, state, out, lse, q, k, v):
        """Answer NaN with the dense result: at once on a CPU, from the next step on a GPU."""
        probe = (out if lse is None else lse).sum(dtype=torch.float32)
        if q.device.type == "cuda":
            with self._lock:
                self._pending.append((call, state, probe))
            return out
        if torch.isfinite(probe):
            return out
        return self._give_up(call, state, q, k, v, NOT_A_NUMBER)

    def _give_up(self, call, state, q, k, v, reason=OUT_OF_MEMORY):
        state.stays_dense = reason
        state.mask = state.lse = None
        step = self.schedule.first_step + call.step
        self.statistics.warn(f"{reason}: the layers concerned run dense from step {step}")
        self.statistics.kept_dense[reason] += 1
        return self._dense(call, q, k, v)

    def _prefetch_next(self, call, device):
        if self.cache.place != "cpu" or device.type != "cuda":
            return
        state = self.layers.get(self.following.get(call.key))
        if state is not None and state.mask is not None:
            self.cache.prefetch(state.mask.bits, device)

    def _state(self, call, q, k, v) -> LayerState:
        with self._lock:
            if self._last_key is not None:
                self.following.setdefault(self._last_key, call.key)
            self._last_key = call.key
            state = self.layers.get(call.key)
            if state is None:
                backend, why = attention.choose(q, k, v, self.config.block_size)
                self.statistics.backend = why
                state = LayerState(backend, stays_dense="" if backend else why)
                state.name, state.layout = call.name, call.layout
                self.layers[call.key] = state
        return state

    def _recorder(self, kind, rows):
        """Note seconds per batch row."""
        entries = getattr(self.statistics.timing, kind)
        return lambda seconds: entries.extend([seconds / rows] * rows)

    # ---- the run

    def wants_lse(self, step: int, q, k, v) -> bool:
        """Whether a dense step must go through `attend`, which keeps its LSE for the search."""
        if not self.schedule.wants_lse(step):
            return False
        backend, _ = attention.choose(q, k, v, self.config.block_size)
        return backend is not None and backend.ONE_PASS_SEARCH

    def dense_step(self, q, k, v, *, scale, host: Callable, key_bias=None) -> torch.Tensor | None:
        """Serve a plainly dense call with the fastest exact attention.

        Args:
            host: host(q, k, v) -> [B, H, L, D].

        Returns:
            [B, H, L, D], or None when the host's own attention is the choice; the caller runs it
            within `timed_dense`.
        """
        backend, _ = attention.choose(q, k, v, self.config.block_size)
        choice = self.dense_choice
        name = choice.choose(backend, q, k, v, scale=scale, host=host, key_bias=key_bias)
        measured = choice.describe()
        self.statistics.dense_choice = name + (f" ({measured})" if measured else "")
        if name == "host":
            return None
        with self.timed_dense(q):
            return choice.run(name, backend, q, k, v, scale=scale)

    def timed_dense(self, q):
        """Time a dense call of the host; `q` has the batch first."""
        return self.stopwatch.measure(q.device, self._recorder("dense", len(q)))

    def foresee(self, q, k, v, *, layers: int, batch: int, layout: TokenLayout) -> None:
        """Predict the memory of the run at its first call, and decide where the cache lives.

        Args:
            q, k, v: [_, H, L, D] of that call. batch: videos per conditioning.
        """
        backend, _ = attention.choose(q, k, v, self.config.block_size)
        size = predict(
            self.schedule,
            layers=layers,
            batch=batch,
            heads=q.shape[1],
            tokens=layout.tokens,
            block_size=self.config.block_size,
            one_pass=backend is not None and backend.ONE_PASS_SEARCH,
        )
        statistics = self.statistics
        statistics.predicted_bytes = size.total
        statistics.tokens = layout.tokens
        statistics.layout = layout.describe()
        if self.config.cache == "auto" and self.free_bytes is not None:
            # two conditionings: the positive and the negative prompt
            place = "cpu" if 2 * size.total > GPU_SHARE * self.free_bytes else "gpu"
            self.cache = Cache(place)
        statistics.cache_place = "cpu" if self.free_bytes is None else self.cache.place

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
        if step >= 0:
            self.statistics.steps.append((self.schedule.kind(step), now - self._step_began))
        self._step_began = now

    def end_step(self) -> None:
        """Read what the step left on the device. With `_carry`, all that waits for the GPU."""
        with self._lock:
            pending, self._pending = self._pending, []
        self.stopwatch.drain()
        for call, state, found in pending:
            if isinstance(found, torch.Tensor):
                healthy = bool(torch.isfinite(found))
            else:
                step, exact, density, recall, cells = found
                pattern = Pattern(
                    step, exact, density.tolist(), recall.tolist(), cells.cpu(), state.carried
                )
                healthy = all(0 <= r <= 1.001 for r in pattern.recall)
                if healthy:
                    self.statistics.patterns[call.layer, call.role] = pattern
            if not healthy and not state.stays_dense:
                state.stays_dense = NOT_A_NUMBER
                state.mask = state.lse = None
                step = self.schedule.first_step + call.step
                self.statistics.warn(
                    f"{NOT_A_NUMBER}: the layers concerned run dense after step {step}"
                )

    def end(self, keep_pattern: bool = False) -> CarriedPattern | None:
        """Finish the statistics and free every tensor of the run.

        Returns:
            The run's masks on the CPU if `keep_pattern`, and there are any.
        """
        self._leave_step(self.step)
        pattern = self._pattern() if keep_pattern else None
        self.statistics.finished = True
        self.free()
        return pattern

    def _pattern(self) -> CarriedPattern | None:
        layers, first = {}, None
        for state in self.layers.values():
            if state.mask is None or state.name is None or state.name in layers:
                continue
            like = state.layout, state.mask.bits.shape
            # one sequence a pattern: a part of the picture with a prompt of its own may be another
            first = first or like
            if like == first:
                layers[state.name] = CarriedLayer(
                    state.mask.bits.cpu(),
                    tuple(state.density.tolist()),
                    tuple(state.recall.tolist()),
                )
        if first is None:
            return None
        return CarriedPattern(self.statistics.model, first[0], self.config.block_size, layers)

    def free(self) -> None:
        """Let go of every tensor without waiting for the device."""
        self.layers.clear()
        self.following.clear()
        self._pending.clear()
        self.stopwatch = Stopwatch()
        self.cache.clear()
        self._last_key = None

    def _count_held(self):
        held = 0
        for state in list(self.layers.values()):
            for tensor in (state.lse, None if state.mask is None else state.mask.bits):
                held += 0 if tensor is None else tensor.nbytes
        self.statistics.held_bytes = max(self.statistics.held_bytes, held)
        # context windows hold a mask each, and how many there will be is not known before
        if self.config.cache == "auto" and self.free_bytes and held > GPU_SHARE * self.free_bytes:
            self.cache.place = self.statistics.cache_place = "cpu"
