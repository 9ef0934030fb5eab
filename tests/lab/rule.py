"""One way to run the sparse steps of a generation, as a frozen value."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Rule:
    """What a contestant does.

    Args:
        score: what blocks are ranked by: "mass", "deficit" or "block tail" of `scores.analyse`, or
            "pooled" and "threshold" (mean query times mean key, anew at every step; "threshold"
            keeps what stands out by a number of standard deviations), "random", "radial",
            "spatial or temporal", or Sol-Attn's own: `sol_op.SCORES`.
        order: see `orders.order_of`, or an order per head, one of `clusters.NAMES`.
        choose: in every head the order or rods, whichever leaves less of the score.
        block_q, block_k: tokens per block.
        tail: "none", or what stands for the blocks that are left out; see `tails.py`.
        budget: "top-k" (the same count in every row), "mass" (in every row the shortest prefix
            that reaches a share of the score), "global" (the best blocks of the whole layer, and
            in every row at least a quarter of the even share). All three keep equally many blocks.
        head_adaptive: the paper's shift of budget between heads; with "mass" the rows of a head
            share what it has.
        again: shares of the schedule at which the mask is searched again.
        drift: search a layer again once its pooled keys moved by this share; 0 never.
        lse: where a later search takes its softmax denominators from: "exact", "cached" at the
            first search, "sparse" (of the sparse pass before, less the log of the recall).
        grades: relative densities over equal parts of the sparse steps; their mean is the rule's.
        layers: factors of the density over the layers, mean 1; empty for none.
        quantised: "" or "int8" (q and k in INT8, v in FP8, both only rounded).
        carried: take the mask that another prompt and seed found.
        dense: attention stays dense throughout (to test `quantised` alone).
        warmup: share of the steps before the first search, None for the schedule's own.
    """

    name: str
    density: float = 0.2
    score: str = "mass"
    order: str = "raster"
    choose: bool = False
    block_q: int = 64
    block_k: int = 64
    tail: str = "none"
    budget: str = "top-k"
    head_adaptive: bool = False
    again: tuple[float, ...] = ()
    drift: float = 0.0
    lse: str = "exact"
    grades: tuple[float, ...] = (1.0,)
    layers: tuple[float, ...] = ()
    quantised: str = ""
    carried: bool = False
    dense: bool = False
    warmup: float | None = None
    notes: str = field(default="", compare=False)

    def but(self, name: str, **changes) -> "Rule":
        return replace(self, name=name, **changes)

    @property
    def every_step(self) -> bool:
        return self.score in ("pooled", "threshold", "sol op", "sol op top-k")


# steps, and the step of the first search
SCHEDULES = {"20": (20, 2), "50": (50, 10), "8": (8, 1), "8 from the start": (8, 0)}


def first_search(rule: Rule, schedule: str) -> tuple[int, int]:
    """Steps of the schedule, and the one of the rule's first search."""
    steps, first = SCHEDULES[schedule]
    return steps, first if rule.warmup is None else round(rule.warmup * steps)


PAPER = Rule("paper: raster, head-adaptive, two searches", head_adaptive=True, again=(0.6,))
