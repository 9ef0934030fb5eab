"""One way to run the sparse steps of a generation, as a frozen value."""

from dataclasses import dataclass, fields, replace
from math import ceil

from sparse_attn.config import BLOCK_SIZES, PRESETS, AdaSpaConfig

# Sol-Attn as comfy-kitchen runs it
AT_TAU = "sol op at tau 1.3"
OP_SCORES = ("sol op", "sol op top-k", AT_TAU)


@dataclass(frozen=True)
class Rule:
    """What a contestant does: settings of the pack, or a rival's way to choose blocks.

    Args:
        density: share of block pairs that a sparse step keeps; None leaves it to the job.
        score: "mass" is the pack; else what a rival ranks blocks by, one of `rivals.SCORES`, or
            Sol-Attn's own op, one of `OP_SCORES`.
        order: what makes a block: "raster" (the model's order), "position" or "similarity".
        block_q, block_k: tokens per block.
        tail: what stands for the blocks that are left out: "none" or "pooled". The pack has an
            order with a tail and none without.
        head_adaptive, precision, search_gap, query_stride, recall: as in `AdaSpaConfig`.
        again: shares of the schedule at which the pack searches again.
        first_density: of the very first step, which would be dense, by `first_step.py`; 0 leaves it dense.
        as_dense_as: name of a rule whose mean density on the same model is taken in place of `density`.
        warmup: share of the steps before the first search, None for the schedule's own; of a preset
            as its user sets it, by which the pack decides on few steps.
    """

    name: str
    density: float | None = None
    score: str = "mass"
    order: str = "raster"
    block_q: int = 64
    block_k: int = 64
    tail: str = "none"
    head_adaptive: bool = False
    precision: str = "auto"
    again: tuple[float, ...] = ()
    warmup: float | None = None
    search_gap: int = 0
    query_stride: int = 1
    first_density: float = 0.0
    recall: float = 0.0
    as_dense_as: str = ""

    def but(self, name: str, **changes) -> "Rule":
        return replace(self, name=name, **changes)

    @property
    def every_step(self) -> bool:
        return self.score in ("pooled", "threshold", *OP_SCORES)

    def settings(self) -> dict:
        """What differs from a rule without settings, but for name and density."""
        found = vars(self)
        return {
            field.name: found[field.name]
            for field in fields(self)
            if field.name not in ("name", "density") and found[field.name] != field.default
        }

    def config(self, schedule: str) -> AdaSpaConfig:
        """The pack's settings; sequences of any length are sparse.

        Raises:
            ValueError: the pack has no such blocks, or searches again before its first search.
        """
        sizes = {blocks: name for name, blocks in BLOCK_SIZES.items()}
        if (self.block_q, self.block_k) not in sizes:
            raise ValueError(f"The pack has no blocks of {self.block_q}x{self.block_k}.")
        steps, first = first_search(self, schedule)
        return AdaSpaConfig(
            sparsity=1 - self.density, block_size=sizes[self.block_q, self.block_k],
            warmup=first / steps if self.warmup is None else self.warmup, search_points=self.again, search_gap=self.search_gap,
            head_adaptive=self.head_adaptive, tail=self.tail, precision=self.precision,
            token_order="position" if self.order == "raster" else self.order, min_tokens=0,
            query_stride=self.query_stride, recall=self.recall,
        )  # fmt: skip


# steps, and the step of the first search
SCHEDULES = {
    "20": (20, 2), "50": (50, 10), "8": (8, 1), "8 from the start": (8, 0), "6": (6, 1), "4": (4, 1),
}  # fmt: skip


def first_search(rule: Rule, schedule: str) -> tuple[int, int]:
    """Steps of the schedule, and the one of the rule's first search."""
    steps, first = SCHEDULES[schedule]
    if rule.warmup is None:
        return steps, first
    if rule.score == AT_TAU:
        # its share of dense steps rounds up, and its first sparse step chooses its own blocks
        return steps, ceil(rule.warmup * steps) - 1
    return steps, max(round(rule.warmup * steps), 1 if rule.warmup else 0)


def of_preset(name: str) -> Rule:
    """A preset as its user gets it, at its own density and warm-up."""
    preset = PRESETS[name]
    return Rule(
        name, preset.density, order=preset.token_order if preset.pooled else "raster",
        block_q=preset.block_q, block_k=preset.block_k, tail=preset.tail,
        head_adaptive=preset.head_adaptive, precision=preset.precision,
        again=preset.search_points, warmup=preset.warmup, search_gap=preset.search_gap,
        query_stride=preset.query_stride,
    )  # fmt: skip


PAPER = Rule("paper: raster, head-adaptive, two searches", head_adaptive=True, again=(0.6,))
