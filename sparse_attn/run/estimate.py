"""Before a run: how much attention it will skip and what it will hold, by arithmetic alone."""

from dataclasses import dataclass

from ..backends.permuted import BLOCK
from ..config import AdaSpaConfig
from ..method.selection import row_budget
from ..method.text_sink import count_sinks
from ..orders.position import in_rods
from ..schedule import Schedule, StepKind
from ..token_layout import TokenLayout
from .cache import predict
from .report import gib

# masses need q @ k.T, one of the two products of attention
SEARCH_WORK = 0.5


@dataclass(frozen=True)
class Estimate:
    """What a run will do.

    Args:
        steps: step numbers by kind.
        skipped: share of all block pairs of the run's video attention that are not computed, a
            search counted as half a dense pass. Not a share of seconds. 0 where it is unknown.
        held_bytes: memory of one conditioning between steps.
        too_short: why the run gains nothing, or an empty string.
        recall: recall that was asked for, so that the search decides what is skipped, or 0.
        windows: whether the video is sampled in windows, each with memory of its own.
    """

    tokens: int
    steps: str
    skipped: float = 0.0
    held_bytes: int = 0
    too_short: str = ""
    recall: float = 0.0
    windows: bool = False

    def line(self) -> str:
        if self.too_short:
            return self.too_short
        each = "prompt and each context window" if self.windows else "prompt"
        holds = f"holds {gib(self.held_bytes)} for each {each}"
        if self.recall and self.held_bytes:
            return (
                f"{self.tokens:,} tokens, {self.steps}: the search decides what a recall of "
                f"{self.recall} can skip; {holds}"
            )
        if self.skipped <= 0:
            return f"{self.tokens:,} tokens, {self.steps}: nothing to gain in these steps"
        return (
            f"{self.tokens:,} tokens, {self.steps}: skips {self.skipped:.0%} of the video's "
            f"attention, counted in blocks, not in seconds; {holds}"
        )


def estimate(
    layout: TokenLayout,
    schedule: Schedule,
    config: AdaSpaConfig,
    *,
    layers: int,
    batch: int,
    heads: int,
    one_pass: bool,
    carried: bool = False,
    windows: bool = False,
) -> Estimate:
    """Count the blocks of a run before it starts.

    Args:
        layers: attention layers over the video in one call of the model.
        batch: videos per conditioning. heads: per layer.
        one_pass: whether a search costs nothing beside its dense pass.
        carried: whether the run begins with the pattern of another one.
        windows: whether the run samples in context windows; `layout` is that of one.
    """
    if reason := too_short(layout, config):
        return Estimate(layout.tokens, schedule.describe(), too_short=reason)
    sparse_layers = layers - len({n % layers for n in config.dense_layers if -layers <= n < layers})
    density = kept_share(layout, config)
    size = predict(
        schedule, layers=sparse_layers, batch=batch, heads=heads, tokens=layout.tokens,
        **config.blocks, one_pass=one_pass,
        keeps_lse=not config.recall, own_orders=config.by_similarity,
    )  # fmt: skip
    spent, found = 0.0, carried
    for i, kind in enumerate(schedule.kinds):
        if kind is StepKind.DENSE:
            spent += 1
        elif kind is StepKind.SPARSE or (carried and StepKind.SEARCH not in schedule.kinds[:i]):
            spent += density
        elif found:
            spent += density + SEARCH_WORK
        else:
            has_lse = one_pass and i > 0 and schedule.wants_lse(i - 1)
            spent += 1 if has_lse else 1 + SEARCH_WORK
            found = True
    steps = max(len(schedule.kinds), 1)
    skipped = (1 - spent / steps) * sparse_layers / layers if layers else 0.0
    if config.recall:
        skipped = 0.0
    return Estimate(
        layout.tokens, schedule.describe(), skipped, size.total,
        recall=config.recall, windows=windows,
    )  # fmt: skip


def too_short(layout: TokenLayout, config: AdaSpaConfig) -> str:
    """Say why a sequence of any model gains nothing, or return an empty string."""
    if layout.frames == 1:
        return "one frame is an image: leave AdaSpa off, it runs dense"
    if layout.tokens < config.min_tokens:
        return (
            f"too short: leave AdaSpa off; {layout.tokens:,} tokens run dense, and it begins at "
            f"{config.min_tokens:,} (`min_tokens`)"
        )
    return ""


def kept_share(layout: TokenLayout, config: AdaSpaConfig) -> float:
    """Share of block pairs that a sparse step computes.

    The budget, the text's rows whole and, with a tail, the blocks of means that every row reads.
    """
    if config.pooled:
        layout = in_rods(layout)
    rows, blocks = layout.num_blocks(config.block_q), layout.num_blocks(config.block_k)
    whole = count_sinks(layout, config.block_q)
    budget = row_budget(config.density, blocks, count_sinks(layout, config.block_k))
    means = -(-blocks // BLOCK) if config.pooled else 0
    kept = (rows - whole) * min(budget + means, blocks) + whole * blocks
    return kept / (rows * blocks)
