"""The contestants, by the question they answer; what lost earlier is told in README.md.

In a group of `ABLATIONS` every rule is compared with the first one, its base.
"""

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
LOW = [TWO, THREE, PAPER, SOL]

EARLIER = TWO.but("queries half, second search at 0.45", again=(0.45,))
QUALITY = TWO.but("queries half, 20 % dense", warmup=0.2)
SEARCHES = [
    TWO,
    ONE,
    THREE,
    TWO.but("queries half, second search at 0.3", again=(0.3,)),
    EARLIER,
    TWO.but("queries half, second search at 0.8", again=(0.8,)),
]
DRIFT = [
    TWO,
    ONE.but("queries half, drift gate 1", drift=1.0),
    ONE.but("queries half, drift gate 0.5", drift=0.5),
    ONE.but("queries half, drift gate 0.25", drift=0.25),
]
CARRIED = [ONE, ONE.but("queries half, one search, pattern of another seed", carried=True)]
LSE = [
    PAPER,
    PAPER.but("paper, one search", again=()),
    PAPER.but("paper, later search with the cached LSE", lse="cached"),
    PAPER.but("paper, later search with the sparse pass's LSE", lse="sparse"),
]
PLACES = [
    TWO,
    TWO.but("queries half, density rises", grades=(0.5, 1.0, 1.5)),
    TWO.but("queries half, density falls", grades=(1.5, 1.0, 0.5)),
    TWO.but("queries half, first layer double", layers=(2.0, 0.8, 0.8, 0.8, 0.8, 0.8)),
    TWO.but("queries half, last layer double", layers=(0.8, 0.8, 0.8, 0.8, 0.8, 2.0)),
    TWO.but("queries half, both ends double", layers=(2.0, 0.5, 0.5, 0.5, 0.5, 2.0)),
    TWO.but("queries half, first layer dense", layers=(5.0, 0.2, 0.2, 0.2, 0.2, 0.2)),
    TWO.but("queries half, last layer dense", layers=(0.2, 0.2, 0.2, 0.2, 0.2, 5.0)),
]
WARMUP = [
    TWO,
    TWO.but("queries half, search in the very first step", warmup=0.0),
    TWO.but("queries half, 5 % dense", warmup=0.05),
    TWO.but("queries half, 20 % dense", warmup=0.2),
    TWO.but("queries half, 30 % dense", warmup=0.3),
]
BUDGETS = [
    TWO,
    TWO.but("queries half, mass target", budget="mass", score="mass"),
    TWO.but("queries half, share-of-error target", budget="mass"),
    TWO.but("queries half, head-adaptive", head_adaptive=True),
    TWO.but("queries half, head-adaptive error target", budget="mass", head_adaptive=True),
    TWO.but("queries half, global", budget="global"),
]
PAPER_BUDGETS = [
    PAPER,
    PAPER.but("paper, even heads", head_adaptive=False),
    PAPER.but("paper, mass target", head_adaptive=False, budget="mass"),
    PAPER.but("paper, head-adaptive mass target", budget="mass"),
    PAPER.but("paper, global", head_adaptive=False, budget="global"),
]
ROUTING = [
    TWO,
    TWO.but("queries half, by mass", score="mass"),
    TWO.but("queries half, by missing mass", score="deficit"),
]
TAILS = [
    TWO,
    TWO.but("queries half, query-weighted tail", tail="query weighted"),
    TWO.but("queries half, frozen tail", tail="frozen"),
    TWO.but("queries half, no tail, by mass", tail="none", score="mass"),
]
ORDERS = [
    TWO,
    PACK,
    RODS,
    RODS.but("two searches, 4x4x4 cubes", order="cubes 4x4x4"),
    RODS.but("two searches, 8x4x2 cubes", order="cubes 8x4x2"),
    RODS.but("two searches, Hilbert", order="hilbert"),
    RODS.but("two searches, raster", order="raster"),
]
BLOCKS = [
    TWO,
    WIDE,
    TWO.but("queries half, 64x128", block_k=128),
    TWO.but("queries half, 64x32", block_k=32),
    TWO.but("queries half, 128x32", block_q=128, block_k=32),
]
PRECISION = [TWO, TWO.but("queries half, in INT8 and FP8", quantised="int8")]
PAPER_PRECISION = [PAPER, PAPER.but("paper, in INT8 and FP8", quantised="int8")]

ABLATIONS = {
    "searches": SEARCHES, "tails": TAILS, "orders": ORDERS, "budgets": BUDGETS, "places": PLACES,
    "warmup": WARMUP, "routing": ROUTING, "precision": PRECISION, "carried": CARRIED,
    "drift": DRIFT, "blocks": BLOCKS, "paper budgets": PAPER_BUDGETS, "lse": LSE,
    "paper precision": PAPER_PRECISION,
}  # fmt: skip
GROUPS = {
    "decide": DECIDE, "rivals": RIVALS, "sol op": OP, "eight": EIGHT, "eight first": EIGHT_FIRST,
    "one": [ONE], "low": LOW, "long": [PAPER, TWO, THREE, SOL],
    "earlier": [EARLIER],
    "quality": [QUALITY, QUALITY.but("queries half, 20 % dense, second search at 0.45", again=(0.45,))],
    **ABLATIONS,
}  # fmt: skip
