"""All contestants, by the question they answer. Every group also holds what it is compared with."""

from rule import PAPER, Rule

EXACT = Rule("exact masses, raster")
CUBES = Rule("cubes, pooled tail, by error", score="error", order="4x4x4", tail="pooled")
OURS = Rule("rods, pooled tail, by tail error", score="tail error", order="rods", tail="pooled")
SOL = Rule("pooled threshold every step, tail (Sol-Attn's rule)", score="threshold", tail="pooled")
SLA = Rule("pooled top-k every step (SLA's rule)", score="pooled")
RANDOM = Rule("random blocks", score="random")

RIVALS = [
    PAPER,
    SOL,
    SLA,
    SLA.but("pooled top-k every step, tail", tail="pooled"),
    Rule("spatial or temporal heads (SVG-like)", score="spatial or temporal"),
    Rule("radial decay", score="radial"),
    RANDOM,
]
ORDER = [
    PAPER,
    EXACT,
    EXACT.but("exact masses, 4x4x4", order="4x4x4"),
    EXACT.but("exact masses, rods", order="rods"),
    OURS,
    OURS.but("raster, pooled tail, by tail error", order="raster"),
    OURS.but("4x4x4, pooled tail, by tail error", order="4x4x4"),
    OURS.but("fitted cubes, pooled tail, by tail error", order="fitted"),
    OURS.but("Hilbert, pooled tail, by tail error", order="hilbert"),
    OURS.but("rods of 2x8, pooled tail, by tail error", order="rods 2x8"),
    OURS.but("rods of 8x4, pooled tail, by tail error", order="rods 8x4"),
]
ROUTE = [
    PAPER,
    OURS,
    OURS.but("rods, pooled tail, by mass", score="mass"),
    OURS.but("rods, pooled tail, by error", score="error"),
    OURS.but("rods, pooled tail, by tail error squared", score="tail error squared"),
    OURS.but("rods, pooled tail, by deficit", score="deficit"),
    OURS.but("rods, pooled tail, by spread", score="spread"),
    Rule("raster, no tail, by drop error", score="drop error"),
    Rule("raster, no tail, by drop error squared", score="drop error squared"),
    Rule("rods, no tail, by drop error", score="drop error", order="rods"),
]
TAIL = [
    PAPER,
    OURS,
    OURS.but("rods, second-order tail", tail="second order"),
    OURS.but("rods, corrected tail", tail="corrected"),
    OURS.but("rods, calibrated tail", tail="calibrated"),
    OURS.but("rods, tail of half blocks", tail="halves"),
    OURS.but("rods, tail of quarter blocks", tail="quarters"),
    OURS.but("rods, weighted tail", tail="weighted"),
    OURS.but("rods, frozen tail", tail="frozen", score="error"),
    OURS.but("raster, frozen tail", tail="frozen", score="error", order="raster"),
]
BUDGET = [
    PAPER,
    EXACT,
    EXACT.but("exact masses, raster, head-adaptive", head_adaptive=True),
    EXACT.but("exact masses, raster, mass target", budget="mass"),
    EXACT.but("exact masses, raster, global", budget="global"),
    OURS,
    OURS.but("ours, head-adaptive", head_adaptive=True),
    OURS.but("ours, share-of-error target", budget="mass"),
    OURS.but("ours, global", budget="global"),
    OURS.but("ours, global, squared", budget="global", score="tail error squared"),
    OURS.but("ours, mass target", budget="mass", score="mass"),
]
BLOCKS = [
    PAPER,
    PAPER.but("paper at 128x64", block_q=128),
    OURS,
    OURS.but("ours at 128x64", block_q=128),
    OURS.but("ours at 64x128", block_k=128),
    OURS.but("ours at 128x128", block_q=128, block_k=128),
    OURS.but("ours at 64x32", block_k=32),
    OURS.but("ours at 128x32", block_q=128, block_k=32),
]
SEARCH = [
    PAPER,
    PAPER.but("paper, one search", again=()),
    PAPER.but("paper, three searches", again=(0.4, 0.7)),
    PAPER.but("paper, later search with the cached LSE", lse="cached"),
    PAPER.but("paper, later search with the sparse pass's LSE", lse="sparse"),
    PAPER.but("paper, pattern of another seed", again=(), carried=True),
    OURS,
    OURS.but("ours, two searches", again=(0.6,)),
    OURS.but("ours, three searches", again=(0.4, 0.7)),
    OURS.but("ours, drift gate 0.5", drift=0.5),
    OURS.but("ours, drift gate 0.25", drift=0.25),
    OURS.but("ours, pattern of another seed", carried=True),
]
PLACE = [
    PAPER,
    OURS,
    OURS.but("ours, density falls over the steps", grades=(1.5, 1.0, 0.5)),
    OURS.but("ours, density rises over the steps", grades=(0.5, 1.0, 1.5)),
    OURS.but("ours, first layer double", layers=(2.0, 0.8, 0.8, 0.8, 0.8, 0.8)),
    OURS.but("ours, last layer double", layers=(0.8, 0.8, 0.8, 0.8, 0.8, 2.0)),
    OURS.but("ours, search in step 0", warmup=0.0),
    OURS.but("ours, 6 % dense", warmup=0.06),
    OURS.but("ours, 12 % dense", warmup=0.12),
    OURS.but("ours, 20 % dense", warmup=0.2),
    PAPER.but("paper, search in step 0", warmup=0.0),
    PAPER.but("paper, 20 % dense", warmup=0.2),
]
PRECISION = [
    PAPER,
    Rule("dense in INT8 and FP8", density=1.0, dense=True, quantised="int8"),
    PAPER.but("paper in INT8 and FP8", quantised="int8"),
    OURS,
    OURS.but("ours in INT8 and FP8", quantised="int8"),
]
BEST = OURS.but("ours, global", budget="global")
DROP = Rule("raster, no tail, by drop error", score="drop error")
TOGETHER = [
    PAPER,
    BEST,
    BEST.but("best, two searches", again=(0.6,)),
    BEST.but("best at 128x64", block_q=128),
    BEST.but("best, tail of half blocks", tail="halves"),
    BEST.but("best, weighted tail", tail="weighted"),
    BEST.but("best, in INT8 and FP8", quantised="int8"),
    DROP.but("raster, no tail, by drop error, two searches", again=(0.6,)),
]
GLOBAL = [
    BEST,
    DROP.but("raster, no tail, by drop error, global", budget="global"),
    DROP.but("rods, no tail, by drop error, global", budget="global", order="rods"),
    BEST.but("raster, pooled tail, by tail error, global", order="raster"),
    BEST.but("ours, global, by deficit", score="deficit"),
    BEST.but("ours, global, by block tail", score="block tail"),
    DROP.but("raster, no tail, by block drop, global", budget="global", score="block drop"),
    BEST.but("ours, global, by mass", score="mass"),
]
TWO = OURS.but("ours, by block tail, two searches", score="block tail", again=(0.6,))
MIXED = [
    TWO,
    TWO.but("two searches, weighted tail", tail="weighted"),
    TWO.but("two searches, tail of half blocks", tail="halves"),
    TWO.but("two searches, query-weighted tail", tail="query weighted"),
    TWO.but("two searches, weighted tail, 128x64", tail="weighted", block_q=128),
    TWO.but("three searches, weighted tail", tail="weighted", again=(0.4, 0.7)),
    TWO.but("two searches, weighted tail, by mass", tail="weighted", score="mass"),
    TWO.but("two searches, frozen tail", tail="frozen"),
    TWO.but("two searches, density rises", grades=(0.5, 1.0, 1.5)),
    TWO.but("two searches, density falls", grades=(1.5, 1.0, 0.5)),
    TWO.but("two searches, 128x64, tail of half blocks", tail="halves", block_q=128),
]
WEIGHTED = TWO.but("two searches, query-weighted tail", tail="query weighted")
ONE = TWO.but("one cluster order, rods where better", order="clusters one", choose=True)
PRODUCT = [
    TWO,
    TWO.but("ours, by block tail, two searches, 128x64", block_q=128),
    TWO.but("two searches, weighted tail", tail="weighted"),
    TWO.but("ours, by block tail", again=()),
]
WEIGHTS = [
    WEIGHTED,
    WEIGHTED.but("two searches, query-weighted tail, 128x64", block_q=128),
]
DECIDE = [
    PAPER,
    SOL,
    TWO,
    WEIGHTED,
    ONE,
    ONE.but("one cluster order (queries half), rods where better", order="clusters one half"),
    TWO.but("cluster orders of q and of k, rods where better", order="clusters", choose=True),
    TWO.but("one cluster order in all heads", order="clusters one"),
    ONE.but("one cluster order, rods where better, query-weighted tail", tail="query weighted"),
    ONE.but("one cluster order, rods where better, 128x64", block_q=128),
    TWO.but("ours, by block tail, two searches, 128x64", block_q=128),
]
CLUSTERS = [
    TWO.but("cluster orders of q and of k", order="clusters"),
    TWO.but("clusters of keys only", order="clusters keys"),
    TWO.but("clusters within coarse rods", order="clusters within"),
    TWO.but("clusters, places do not count", order="clusters free"),
    TWO.but("clusters, places count more", order="clusters near"),
    ONE.but("one cluster order, rods where better, one search", again=()),
    ONE.but("one cluster order, rods where better, three searches", again=(0.3, 0.6)),
    ONE.but("one cluster order, rods where better, in INT8 and FP8", quantised="int8"),
]
STEPS = [PAPER, SOL, TWO, WEIGHTED, ONE, DECIDE[6]]
HALF = DECIDE[5]
OFTEN = [
    HALF,
    HALF.but("one cluster order (queries half), three searches", again=(0.3, 0.6)),
    HALF.but("one cluster order (queries half), four searches", again=(0.25, 0.45, 0.7)),
]
LONG = [PAPER, SOL, TWO, HALF, OFTEN[1]]
ABLATIONS = [
    TWO.but("ours, by block tail", again=()),
    TWO.but("three searches", again=(0.4, 0.7)),
    TWO.but("drift gate 0.5", again=(), drift=0.5),
    PAPER.but("paper, later search with the cached LSE", lse="cached"),
    PAPER.but("paper, later search with the sparse pass's LSE", lse="sparse"),
    TWO.but("one search, pattern of another seed", again=(), carried=True),
    TWO.but("two searches, density rises", grades=(0.5, 1.0, 1.5)),
    TWO.but("two searches, density falls", grades=(1.5, 1.0, 0.5)),
    TWO.but("two searches, first layer double", layers=(2.0, 0.8, 0.8, 0.8, 0.8, 0.8)),
    TWO.but("two searches, last layer double", layers=(0.8, 0.8, 0.8, 0.8, 0.8, 2.0)),
    TWO.but("two searches, 5 % dense", warmup=0.05),
    TWO.but("two searches, 20 % dense", warmup=0.2),
    PAPER.but("paper, 20 % dense", warmup=0.2),
    TWO.but("two searches at 64x128", block_k=128),
    TWO.but("two searches at 128x128", block_q=128, block_k=128),
    Rule("dense in INT8 and FP8", density=1.0, dense=True, quantised="int8"),
    PAPER.but("paper in INT8 and FP8", quantised="int8"),
    TWO.but("two searches in INT8 and FP8", quantised="int8"),
    TWO.but("two searches, Hilbert", order="hilbert"),
    TWO.but("two searches, frozen tail", tail="frozen"),
    TWO.but("two searches, mass target", budget="mass", score="mass"),
    TWO.but("two searches, head-adaptive", head_adaptive=True),
    TWO.but("two searches, share-of-error target", budget="mass"),
]
PRODUCT_PAIR = [*PRODUCT[:2], PAPER]
NEW = [
    PAPER,
    *GLOBAL[:3],
    OURS,
    SOL,
    DROP,
    *GLOBAL[3:],
    CUBES,
    EXACT,
    TOGETHER[2],
    TOGETHER[3],
    SLA,
]
FEW = [PAPER, BEST, SOL, *GLOBAL[1:3], OURS, DROP]
PAIR = [PAPER, BEST, GLOBAL[1], SOL]
EQUAL = [BEST]
MAIN = [PAPER, OURS, SOL, EXACT, CUBES, BEST, OURS.but("ours at 128x64", block_q=128), *TAIL[2:4],
        *ROUTE[2:6], ORDER[5], ORDER[7], DROP, SLA]  # fmt: skip
SHORT = [PAPER, OURS, SOL, CUBES, BUDGET[9], *TAIL[2:4]]

GROUPS = {
    "main": MAIN, "short": SHORT, "new": NEW, "few": FEW, "pair": PAIR, "equal": EQUAL,
    "rivals": RIVALS, "order": ORDER, "route": ROUTE, "tail": TAIL,
    "budget": BUDGET, "blocks": BLOCKS, "search": SEARCH, "place": PLACE, "precision": PRECISION,
    "together": TOGETHER, "global": GLOBAL, "mixed": MIXED,
    "decide": DECIDE, "clusters": CLUSTERS, "ablations": ABLATIONS, "steps": STEPS, "often": OFTEN,
    "long": LONG,
    "product": PRODUCT, "product pair": PRODUCT_PAIR, "weights": WEIGHTS,
}  # fmt: skip
