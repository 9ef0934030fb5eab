"""The contestants, by the question they answer; what was compared before is in `results`.

In a group of `QUESTIONS` every rule is compared with the first one, its base.
"""

from rule import AT_TAU, PAPER, Rule, of_preset

SOL = Rule("pooled threshold every step, tail (Sol-Attn's rule)", score="threshold", tail="pooled")
SLA = Rule("pooled top-k every step (SLA's rule)", score="pooled")
TWO = Rule("similarity, two searches", order="similarity", tail="pooled", again=(0.6,))
ONE = TWO.but("similarity, one search", again=())
EARLIER = TWO.but("similarity, second search at 0.45", again=(0.45,))
THREE = TWO.but("similarity, three searches", again=(0.3, 0.6))
POSITION = TWO.but("position, two searches", order="position")
WIDE = TWO.but("similarity, two searches, 128x64", block_q=128)
PLAIN = PAPER.but("paper, even heads", head_adaptive=False)

RIVALS = [
    PAPER,
    SOL,
    SLA,
    SLA.but("pooled top-k every step, tail", tail="pooled"),
    Rule("spatial or temporal heads (SVG-like)", score="spatial or temporal"),
    Rule("radial decay", score="radial"),
    Rule("random blocks", score="random"),
    PLAIN.but("exact masses, raster", again=()),
]
AS_TIMED = Rule("Sol-Attn's own op, tau 1.3, after 20 % dense steps", score=AT_TAU, warmup=0.2)
OP = [
    SOL,
    Rule("Sol-Attn's own op, threshold", score="sol op"),
    Rule("Sol-Attn's own op, top-k", score="sol op top-k"),
]
TAIL_ERROR = [
    Rule("exact masses, model's order, tail, one search", score="exact mass", tail="pooled")
]
TAIL_ERROR.append(
    TAIL_ERROR[0].but("tail error, model's order, tail, one search", score="tail error")
)
# what the seconds of a run buy most: dense steps at the start, blocks, or a second search. Searches
# measure one query row of four
NOW = EARLIER.but("1 dense step, then a search", warmup=0.05, query_stride=4)


def front(steps: int, *asked) -> list[Rule]:
    """Rules of (dense steps before the first search, density, whether a second search follows)."""
    rules = []
    for dense, density, second in asked:
        words = f"{steps} steps: {dense} dense, density {density}"
        again = NOW.again if second else ()
        rules.append(
            NOW.but(
                words + ("" if second else ", one search"),
                density=density,
                warmup=dense / steps,
                again=again,
            )
        )
    return rules


FRONT_4 = front(4, (1, 0.2, 0), (1, 0.1, 0), (2, 0.2, 0), (2, 0.1, 0), (1, 0.3, 0))
# a warm-up that rounds to none gets a step, and its search runs sparse
FRONT_4 += [
    NOW.but(f"4 steps: 1 dense, sparse search, density {x}", density=x, warmup=0.1, again=())
    for x in (0.2, 0.3, 0.4)
]
FRONT_6 = front(6, (1, 0.2, 0), (2, 0.2, 0), (2, 0.1, 0), (1, 0.1, 0))
FRONT_8 = front(
    8, (1, 0.2, 1), (2, 0.1, 1), (2, 0.1, 0), (1, 0.1, 1), (2, 0.15, 1), (2, 0.2, 1), (3, 0.1, 0),
    (2, 0.2, 0), (1, 0.3, 1),
)  # fmt: skip
FRONT_20 = front(
    20, (2, 0.2, 1), (1, 0.1, 1), (2, 0.1, 1), (3, 0.1, 1), (4, 0.1, 1), (3, 0.15, 1), (4, 0.3, 1),
    (3, 0.2, 1), (4, 0.2, 1), (2, 0.15, 1), (5, 0.1, 1),
)  # fmt: skip
FRONT_50 = front(50, (1, 0.2, 1), (2, 0.2, 1), (5, 0.2, 1), (10, 0.2, 1), (15, 0.2, 1))
FIRST_STEP = [
    NOW,
    NOW.but("1 step at density 0.5, then a search", first_density=0.5),
    NOW.but("no dense step, then a search", warmup=0.0),
]
RECALL = [TWO.but(f"similarity, recall of {x} asked for", recall=x) for x in (0.8, 0.9)]
# and the same blocks for every video
RECALL += [TWO.but(f"as dense as: {rule.name}", as_dense_as=rule.name) for rule in RECALL]
BEHIND = [
    TWO.but("similarity, 20 % dense", warmup=0.2),
    EARLIER.but("similarity, 20 % dense, second search at 0.45", warmup=0.2),
]
EIGHT = [
    PAPER,
    SOL,
    ONE,
    TWO,
    EARLIER,
    ONE.but("similarity, searches at 1, 3, 5", again=(0.375, 0.625)),
    ONE.but("similarity, two dense steps, one search", warmup=0.25),
    TWO.but("similarity, two dense steps, two searches", warmup=0.25),
]
EIGHT_FIRST = [
    PAPER,
    SOL,
    ONE,
    ONE.but("similarity, searches at 0, 2, 4", again=(0.25, 0.5)),
    ONE.but("similarity, searches at 0, 1, 3", again=(0.125, 0.375)),
]

QUESTIONS = {
    "searches": [
        TWO,
        ONE,
        THREE,
        TWO.but("similarity, second search at 0.3", again=(0.3,)),
        EARLIER,
        TWO.but("similarity, second search at 0.8", again=(0.8,)),
    ],
    "query_rows": [TWO, TWO.but("similarity, one query row of four", query_stride=4)],
    "query rows": [TWO, TWO.but("similarity, one query row of four", query_stride=4)],
    "tails": [PLAIN, POSITION, TWO],
    "orders": [TWO, POSITION],
    "budgets": [TWO, TWO.but("similarity, head-adaptive", head_adaptive=True)],
    "warmup": [
        TWO,
        TWO.but("similarity, search in the very first step", warmup=0.0),
        TWO.but("similarity, 5 % dense", warmup=0.05),
        TWO.but("similarity, 15 % dense", warmup=0.15),
        *BEHIND,
        TWO.but("similarity, 30 % dense", warmup=0.3),
    ],
    "blocks": [TWO, WIDE],
    "precision": [TWO, TWO.but("similarity, INT8", precision="int8")],
    "paper budgets": [PAPER, PLAIN],
    "paper precision": [PAPER, PAPER.but("paper, INT8", precision="int8")],
}
GROUPS = {
    "decide": [PAPER, SOL, POSITION, TWO, THREE, WIDE], "rivals": RIVALS, "sol_op": OP,
    "own op": [EARLIER, *OP[1:]],
    "eight": EIGHT, "eight first": EIGHT_FIRST, "one": [ONE], "low": [TWO, THREE, PAPER, SOL],
    "long": [PAPER, TWO, THREE, SOL], "earlier": [EARLIER], "lead": [PAPER, EARLIER], "sol": [SOL],
    "front 4": FRONT_4, "front 6": FRONT_6, "front 8": FRONT_8, "front 20": FRONT_20,
    "front 50": FRONT_50,
    "first step": FIRST_STEP,
    "tail error": TAIL_ERROR,
    "recall": RECALL,
    "behind 20 %": BEHIND, "fifty": [PAPER, EARLIER, TWO, SOL],
    "second search": [EARLIER, TWO],
    "as timed": [AS_TIMED, of_preset("Balanced").but("Balanced, INT8", density=None, precision="int8")],
    "presets": [of_preset(name) for name in ("Quality", "Balanced", "Fast", "Paper")],
    **QUESTIONS,
}  # fmt: skip
