"""The contestants, by the question they answer; what lost earlier is told in README.md."""

from rule import PAPER, Rule

SOL = Rule("pooled threshold every step, tail (Sol-Attn's rule)", score="threshold", tail="pooled")
SLA = Rule("pooled top-k every step (SLA's rule)", score="pooled")
RODS = Rule(
    "ours, by block tail, two searches", score="block tail", order="rods", tail="pooled",
    again=(0.6,),
)  # fmt: skip
ONE = RODS.but("queries half, one search", order="clusters", choose=True, again=())
TWO = ONE.but("one cluster order (queries half), rods where better", again=(0.6,))
THREE = ONE.but("one cluster order (queries half), three searches", again=(0.3, 0.6))
PACK = TWO.but("the pack's order, two searches", order="clusters of the pack")
WIDE = TWO.but("queries half, 128x64", block_q=128)

RIVALS = [
    PAPER,
    SOL,
    SLA,
    SLA.but("pooled top-k every step, tail", tail="pooled"),
    Rule("spatial or temporal heads (SVG-like)", score="spatial or temporal"),
    Rule("radial decay", score="radial"),
    Rule("random blocks", score="random"),
    Rule("exact masses, raster"),
    Rule("dense in INT8 and FP8", density=1.0, dense=True, quantised="int8"),
]
OP = [
    SOL,
    Rule("Sol-Attn's own op, threshold", score="sol op"),
    Rule("Sol-Attn's own op, top-k", score="sol op top-k"),
]
DECIDE = [PAPER, SOL, RODS, TWO, THREE, PACK, WIDE]
EIGHT = [
    PAPER,
    SOL,
    ONE,
    TWO,
    ONE.but("queries half, searches at 1, 3, 5", again=(0.375, 0.625)),
    ONE.but("queries half, two dense steps, one search", warmup=0.25),
    TWO.but("queries half, two dense steps, two searches", warmup=0.25),
    PACK,
]
EIGHT_FIRST = [
    PAPER,
    SOL,
    ONE,
    ONE.but("queries half, searches at 0, 2, 4", again=(0.25, 0.5)),
    ONE.but("queries half, searches at 0, 1, 3", again=(0.125, 0.375)),
]
SEARCHES = [
    PAPER.but("paper, one search", again=()),
    PAPER.but("paper, later search with the cached LSE", lse="cached"),
    PAPER.but("paper, later search with the sparse pass's LSE", lse="sparse"),
    ONE,
    THREE,
    ONE.but("drift gate 0.5", drift=0.5),
    ONE.but("drift gate 0.25", drift=0.25),
    ONE.but("one search, pattern of another seed", carried=True),
]
PLACES = [
    TWO.but("density rises", grades=(0.5, 1.0, 1.5)),
    TWO.but("density falls", grades=(1.5, 1.0, 0.5)),
    TWO.but("first layer double", layers=(2.0, 0.8, 0.8, 0.8, 0.8, 0.8)),
    TWO.but("last layer double", layers=(0.8, 0.8, 0.8, 0.8, 0.8, 2.0)),
    TWO.but("5 % dense", warmup=0.05),
    TWO.but("20 % dense", warmup=0.2),
]
BUDGETS = [
    TWO.but("queries half, by mass", score="mass"),
    TWO.but("queries half, mass target", budget="mass", score="mass"),
    TWO.but("queries half, share-of-error target", budget="mass"),
    TWO.but("queries half, global", budget="global"),
    TWO.but("queries half, head-adaptive", head_adaptive=True),
]
OTHERS = [
    TWO.but("at 64x128", block_k=128),
    TWO.but("at 64x32", block_k=32),
    RODS.but("two searches, Hilbert", order="hilbert"),
    TWO.but("queries half, frozen tail", tail="frozen"),
    TWO.but("queries half, query-weighted tail", tail="query weighted"),
    RIVALS[-1],
    PAPER.but("paper in INT8 and FP8", quantised="int8"),
    TWO.but("queries half, in INT8 and FP8", quantised="int8"),
]

GROUPS = {
    "decide": DECIDE, "rivals": RIVALS, "sol op": OP, "eight": EIGHT, "eight first": EIGHT_FIRST,
    "one": [ONE], "low": [PAPER, THREE], "long": [PAPER, TWO, THREE, SOL],
    "searches": SEARCHES, "places": PLACES, "budgets": BUDGETS, "others": OTHERS,
    "ablations": [*SEARCHES, *PLACES, *BUDGETS, *OTHERS],
}  # fmt: skip
