"""Before a run: how much attention it will skip and what it will hold, by arithmetic alone."""

from dataclasses import dataclass

from ..backends.permuted import BLOCK
from ..block_mask import mask_blocks, walked
from ..config import AdaSpaConfig
from ..method.selection import row_budget
from ..method.text_sink import count_sinks
from ..orders.packed import packed_bytes
from ..orders.position import video_first
from ..schedule import Schedule, StepKind
from ..sentences import Sentence
from ..token_layout import TokenLayout
from . import packed_lse
from .report import gib

# masses need q @ k.T, one of the two products of attention
SEARCH_WORK = 0.5


@dataclass(frozen=True)
class Workload:
    """The attention over the video in one call of the model, of one conditioning.

    Args:
        calls: all of them. sparse_calls: without those of layers that the user wants dense.
        batch: videos. heads: per layer.
        windows: whether this is the call of one of several windows of the video.
    """

    layout: TokenLayout
    calls: int
    sparse_calls: int
    batch: int
    heads: int
    windows: bool = False


@dataclass(frozen=True)
class CacheSize:
    """Bytes that one conditioning holds at the fullest moment of a run."""

    mask_bytes: int = 0
    lse_bytes: int = 0
    order_bytes: int = 0

    @property
    def total(self) -> int:
        return self.mask_bytes + self.lse_bytes + self.order_bytes


@dataclass(frozen=True)
class Estimate:
    """What a run will do.

    Args:
        layout: of one sequence.
        skipped: share of all block pairs of the run's video attention that are not computed, a
            search counted as half a dense pass. Not a share of seconds. 0 where it is unknown.
        held_bytes: memory of one conditioning between steps.
        recall: recall that was asked for, so that the search decides what is skipped, or 0.
        windows: whether the video is sampled in windows, each with memory of its own.
    """

    layout: TokenLayout
    skipped: float
    held_bytes: int
    recall: float = 0.0
    windows: bool = False

    def said(self) -> list[Sentence]:
        tokens = f"{self.layout.tokens:,}"
        if self.recall and self.held_bytes:
            first = Sentence("expect_recall", tokens=tokens, recall=str(self.recall))
        elif self.skipped <= 0:
            return [Sentence("expect_nothing", tokens=tokens)]
        else:
            first = Sentence("expect_skip", tokens=tokens, share=f"{self.skipped:.0%}")
        holds = "holds_windows" if self.windows else "holds"
        return [first, Sentence(holds, size=gib(self.held_bytes))]


def estimate(
    work: Workload, schedule: Schedule, config: AdaSpaConfig, one_pass: bool, carried: bool = False
) -> Estimate:
    """Count the blocks of a run, and the bytes it will hold, before it starts.

    Args:
        one_pass: whether the backend searches in one pass and so keeps the LSE of a dense step.
        carried: whether the run begins with the pattern of another one.
    """
    density = kept_share(work.layout, config)
    spent, found, search = 0.0, carried, SEARCH_WORK / config.search_stride
    for i, kind in enumerate(schedule.kinds):
        if kind is StepKind.DENSE:
            spent += 1
        elif kind is StepKind.SPARSE or (carried and StepKind.SEARCH not in schedule.kinds[:i]):
            spent += density
        elif found:
            spent += density + search
        else:
            has_lse = i > 0 and schedule.wants_lse(i - 1)
            if has_lse and schedule.sparse_search:
                spent += density + search
            else:
                spent += 1 if has_lse and one_pass else 1 + search
            found = True
    steps = max(len(schedule.kinds), 1)
    skipped = (1 - spent / steps) * work.sparse_calls / work.calls if work.calls else 0.0
    skipped = 0.0 if config.recall else skipped
    held_bytes = cache_size(work, schedule, config, one_pass, carried).total
    return Estimate(work.layout, skipped, held_bytes, config.recall, work.windows)


def cache_size(
    work: Workload, schedule: Schedule, config: AdaSpaConfig, one_pass: bool, carried: bool = False
) -> CacheSize:
    """Predict the cache of one conditioning.

    A mask takes one bit per block pair, an LSE a little more than one byte per token, head and layer,
    an order a little more than two.
    The LSE of the last warm-up step gives way to the masks layer by layer, so both are whole at once
    only when a later search needs the LSE again. What lives within a call alone, such as the permuted
    copies of q, k and v, is not counted.
    """
    searches = schedule.kinds.count(StepKind.SEARCH)
    if searches == 0:
        return CacheSize()
    # a carried mask is of the kernels' own blocks
    sizes = config.blocks if carried else mask_blocks(work.layout.tokens, **config.blocks)
    rows, blocks = (work.layout.num_blocks(size) for size in sizes.values())
    heads = work.sparse_calls * work.batch * work.heads
    mask = heads * rows * -(-blocks // 8)
    lse = heads * packed_lse.packed_bytes(work.layout.tokens)
    order = heads * packed_bytes(work.layout) if config.by_similarity else 0
    # where a recall is asked for, every search measures its own LSE
    if config.recall:
        return CacheSize(mask, 0, order)
    if searches > 1:
        return CacheSize(mask, lse, order)
    keeps = one_pass or schedule.sparse_search
    before = keeps and any(schedule.wants_lse(i) for i in range(len(schedule.kinds)))
    if mask + order >= lse or not before:
        return CacheSize(mask, 0, order)
    return CacheSize(0, lse)


def why_not_worth(layout: TokenLayout, config: AdaSpaConfig) -> str:
    """Say why a sequence of any model gains nothing, or return an empty string."""
    if layout.frames == 1:
        return Sentence("one_frame")
    if layout.tokens < config.min_tokens:
        return Sentence("too_short", tokens=f"{layout.tokens:,}", least=f"{config.min_tokens:,}")
    return ""


def kept_share(layout: TokenLayout, config: AdaSpaConfig) -> float:
    """Share of block pairs that a sparse step computes.

    The budget, the text's rows whole and, with a tail, the blocks of means that every row reads.
    """
    if config.pooled:
        layout = video_first(layout)
    sizes = mask_blocks(layout.tokens, **config.blocks)
    block_q, block_k = sizes.values()
    rows, blocks = layout.num_blocks(block_q), layout.num_blocks(block_k)
    whole = count_sinks(layout, block_q)
    budget = row_budget(config.density, blocks, count_sinks(layout, block_k))
    means = -(-layout.num_blocks(walked(block_k)) // BLOCK) * BLOCK if config.pooled else 0
    kept = (rows - whole) * min(budget + means / block_k, blocks) + whole * blocks
    return kept / (rows * blocks)
