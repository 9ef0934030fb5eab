"""Chooses rules on some models and judges them on the others, from recorded results.

    python tests/lab/judged.py tests/lab/results/second_weights/h200_[4-9]*.json \
        tests/lab/results/h200_*.json --out tests/lab/results/judged.json --table

The models are split in two, and the split is swapped once. A winner is the best of its rivals on the
choosing models; what it is worth is what the judging models say, and the gap between the two is what
choosing among many rules adds by luck and by fitting the models that chose.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from contestants import (  # noqa: E402
    EARLIER,
    FIRST_STEP,
    GROUPS,
    OP,
    RECALL,
    SOL,
    TAIL_ERROR,
    THREE,
    TWO,
    WIDE,
)  # fmt: skip
from paired import load, paired  # noqa: E402
from rule import PAPER, SCHEDULES  # noqa: E402

from tests.bench.record import facts  # noqa: E402

RESULTS = HERE / "results"
# flat moving shapes, for which the rules were thought of; continued clips, and solid things in space
SPLIT = (("tiny", "wan128", "joint"), ("natural", "solid"))
POSITION, ONE, PLAIN = "position, two searches", "similarity, one search", "paper, even heads"
TWENTY, QUERIES = "similarity, 20 % dense", "similarity, one query row of four"
INT8 = "similarity, INT8"
TIMED = GROUPS["as timed"]
# what rules were called when `second_weights` was recorded
NOW = {
    "one cluster order (queries half), rods where better": TWO.name,
    "queries half, second search at 0.45": EARLIER.name,
    "one cluster order (queries half), three searches": THREE.name,
    "ours, by block tail, two searches": POSITION,
    "one cluster order, rods where better, 128x64": WIDE.name,
    "queries half, one search": ONE,
    "queries half, head-adaptive": "similarity, head-adaptive",
    "queries half, search in the very first step": "similarity, search in the very first step",
    "queries half, two dense steps, one search": "similarity, two dense steps, one search",
    "queries half, two dense steps, two searches": "similarity, two dense steps, two searches",
    "queries half, searches at 1, 3, 5": "similarity, searches at 1, 3, 5",
    "queries half, 20 % dense, second search at 0.45": f"{TWENTY}, second search at 0.45",
    **{f"queries half, {n} % dense": f"similarity, {n} % dense" for n in (5, 20, 30)},
    **{f"queries half, second search at {x}": f"similarity, second search at {x}"
       for x in (0.3, 0.8)},
}  # fmt: skip


def dense(steps: int, number: int) -> str:
    """The name of `contestants.front`'s rule with so many dense steps."""
    return f"{steps} steps: {number} dense, density 0.2" + (", one search" if steps == 4 else "")


@dataclass(frozen=True)
class Claim:
    """That one rule is closer to dense than another, at places (schedule, density).

    Args:
        field: the preset's field that the claim decides, with its value there; () for none.
        presets: which have it.
        base_density: of the other rule, None for the same.
    """

    text: str
    rule: str
    base: str
    places: tuple[tuple[str, float], ...]
    presets: tuple[str, ...] = ()
    field: tuple = ()
    base_density: float | None = None


ALL = ("Balanced", "Quality", "Fast")
LOW, HALF = ("20", 0.2), ("20", 0.1)
EIGHT, FOUR = ("8", 0.2), ("4", 0.2)
MOST = (LOW, HALF, ("50", 0.2), EIGHT)
CLAIMS = (
    Claim("the preset's rule over the paper's", EARLIER.name, PAPER.name, MOST, ("Balanced", "Fast")),
    Claim("the preset's rule at half the density over the paper's", EARLIER.name, PAPER.name, (HALF,),
          base_density=0.2),
    Claim("the preset's rule over Sol-Attn's", EARLIER.name, SOL.name, (LOW, HALF, ("8", 0.2))),
    Claim("similarity over position", TWO.name, POSITION, (LOW, HALF), ALL,
          ("token_order", "similarity")),
    Claim("position with a pooled tail over the model's order without", POSITION, PLAIN, (LOW, HALF),
          ALL, ("tail", "pooled")),
    Claim("second search at 0.45 over 0.6", EARLIER.name, TWO.name, MOST, ("Balanced", "Fast"),
          ("search_points", (0.45,))),
    Claim("second search at 0.45 over 0.3", EARLIER.name, "similarity, second search at 0.3", (LOW,)),
    Claim("second search at 0.6 over 0.8", TWO.name, "similarity, second search at 0.8", (LOW,)),
    Claim("second search at 0.6 over 0.45, behind 20 % dense", TWENTY,
          f"{TWENTY}, second search at 0.45", (LOW, ("20", 0.3)), ("Quality",),
          ("search_points", (0.6,))),
    Claim("three searches over two", THREE.name, EARLIER.name, (LOW,)),
    Claim("two searches over one", TWO.name, ONE, (LOW, ("8", 0.2))),
    Claim("even heads over adaptive ones", TWO.name, "similarity, head-adaptive", (LOW,), ALL,
          ("head_adaptive", False)),
    Claim("even heads over adaptive ones, by the paper's rule", PLAIN, PAPER.name, (LOW, HALF)),
    Claim("one dense step of 20 over none", "similarity, 5 % dense",
          "similarity, search in the very first step", (LOW,)),
    Claim("two dense steps over one", TWO.name, "similarity, 5 % dense", (LOW,)),
    Claim("three dense steps over two", "similarity, 15 % dense", TWO.name, (LOW,)),
    Claim("four dense steps over three", TWENTY, "similarity, 15 % dense", (LOW,)),
    Claim("six dense steps over four", "similarity, 30 % dense", TWENTY, (LOW,)),
    Claim("two dense steps of 8 over one", "similarity, two dense steps, two searches", TWO.name,
          (("8", 0.2),)),
    Claim("INT8 over bf16", INT8, TWO.name, (LOW, HALF)),
    Claim("one query row of four over all", QUERIES, TWO.name, (LOW,)),
    Claim("Balanced in INT8 over sol_attn as its node runs it, which takes no less time", TIMED[1].name,
          TIMED[0].name, (LOW, EIGHT, FOUR)),
    Claim("the preset's rule over sol_attn by a threshold, its own op", EARLIER.name, OP[1].name, (LOW, HALF)),
    Claim("the preset's rule over sol_attn by top-k, its own op", EARLIER.name, OP[2].name, (LOW, HALF)),
    Claim("blocks by the tail's error over blocks by mass", TAIL_ERROR[1].name, TAIL_ERROR[0].name, (LOW,)),
    *(Claim(f"a recall of {rule.recall} over the density that it took, for every video", rule.name,
            fixed.name, (LOW,)) for rule, fixed in zip(RECALL[:2], RECALL[2:], strict=True)),
    Claim("a first step of all blocks over one of half", FIRST_STEP[0].name, FIRST_STEP[1].name,
          (LOW, EIGHT, FOUR)),
    Claim("a first step of half the blocks over none", FIRST_STEP[1].name, FIRST_STEP[2].name,
          (LOW, EIGHT, FOUR)),
    Claim("a dense step before the first search over none", FIRST_STEP[0].name, FIRST_STEP[2].name,
          (LOW, EIGHT, FOUR)),
    *(Claim(f"of {steps} steps {more} dense over {less}", dense(steps, more), dense(steps, less),
            ((str(steps), 0.2),))
      for steps, less, more in ((4, 1, 2), (50, 1, 2), (50, 2, 5), (50, 5, 10), (50, 10, 15))),
)  # fmt: skip


def recorded(paths) -> dict:
    """`paired.load`, with every rule by the name that it has now."""
    data, rows = load(paths), {}
    for (schedule, density, name), found in data["rows"].items():
        rows.setdefault((schedule, density, NOW.get(name, name)), {}).update(found)
    return {**data, "rows": rows}


def side(rows: dict, base: dict, models) -> dict:
    """What the models say of a rule against another; all of them ran both."""
    mine, other = ({m: found[m] for m in models} for found in (rows, base))
    gain, seen = paired(mine, other, "psnr"), paired(mine, other, "perceptual")
    return {
        "models": list(models), "gain_db": round(gain.mean, 2), "stderr": round(gain.error, 2),
        "wins": gain.wins, "videos": gain.pairs,
        "perceptual": round(seen.mean, 5) if seen.pairs else None,
    }  # fmt: skip


def verdict(judging: dict) -> str:
    """Whether a lead holds: beyond two standard errors, "open" within them."""
    if abs(judging["gain_db"]) <= 2 * judging["stderr"]:
        return "open"
    return "holds" if judging["gain_db"] > 0 else "fails"


def _row(claim: str, place, rule: str, base: str, compared: int, sides) -> dict:
    choosing, judging = sides
    gap = round(choosing["gain_db"] - judging["gain_db"], 2) if choosing else None
    return {
        "claim": claim, "density": place[1], "steps": SCHEDULES[place[0]][0],
        "rule": rule, "base": base, "rules_compared": compared,
        "choosing": choosing, "judging": judging, "gap_db": gap, "verdict": verdict(judging),
    }  # fmt: skip


def rivals(data: dict, place) -> dict[str, dict]:
    """{rule: rows} of a place for rules that all models ran, with two searches and no more dense steps
    than the schedule has."""
    everyone = {model for models in SPLIT for model in models}
    found = {}
    for (schedule, density, name), rows in data["rows"].items():
        if (schedule, density) == place and everyone <= set(rows):
            settings = next(iter(rows.values()))["settings"]
            others = {"warmup", "drift", "carried"} & set(settings)
            if len(settings.get("again", ())) == 1 and not others:
                found[name] = rows
    return found


def winners(data: dict) -> list[dict]:
    """The best rule of every place by the choosing models, and what the judges say of it."""
    found = []
    for place in sorted({(s, d) for s, d, _ in data["rows"] if d < 1}):
        group = rivals(data, place)
        base = group.pop(PAPER.name, {})
        for choosers, judges in (SPLIT, SPLIT[::-1]):
            if len(group) < 2 or not base:
                continue
            scored = {name: side(rows, base, choosers) for name, rows in group.items()}
            best = max(scored, key=lambda name: scored[name]["gain_db"])
            seen = {name: side(rows, base, judges) for name, rows in group.items()}
            ranked = sorted(seen, key=lambda name: -seen[name]["gain_db"])
            text = f"best by {' and '.join(choosers)}, over the paper's rule"
            row = _row(text, place, best, PAPER.name, len(scored), (scored[best], seen[best]))
            found.append(row | {"place_by_judges": 1 + ranked.index(best)})
    return found


def claims(data: dict) -> list[dict]:
    """Every claim at every place, judged both ways; each time by models that all ran both its rules.

    "choosing" is None where the others did not.
    """
    found = []
    for claim in CLAIMS:
        for place in claim.places:
            under = place[0], claim.base_density or place[1]
            rows = data["rows"].get((*place, claim.rule), {})
            base = data["rows"].get((*under, claim.base), {})
            compared = sum((s, d) == place for s, d, _ in data["rows"])
            seen = {
                models: side(rows, base, models) if set(models) <= set(rows) & set(base) else None
                for models in SPLIT
            }
            for choosers, judges in (SPLIT, SPLIT[::-1]):
                if seen[judges]:
                    sides = seen[choosers], seen[judges]
                    found.append(_row(claim.text, place, claim.rule, claim.base, compared, sides))
    return found


def table(rows: list[dict]) -> str:
    """Markdown: the winners both ways, then a line per claim and place."""

    def gain(seen: dict | None) -> str:
        if seen is None:
            return "not sampled"
        return f"{seen['gain_db']:+.1f} ± {seen['stderr']:.1f} ({seen['wins']} of {seen['videos']})"

    lines = ["| steps, density | of rules | chosen by | winner | there | judges | its place |",
             "| --- |" + " --- |" * 6]  # fmt: skip
    best = [row for row in rows if "place_by_judges" in row]
    for row in best:
        chosen_by = ", ".join(row["choosing"]["models"])
        lines.append(
            f"| {row['steps']}, {row['density']:g} | {row['rules_compared']} | {chosen_by} "
            f"| {row['rule']} | {gain(row['choosing'])} | {gain(row['judging'])} "
            f"| {row['place_by_judges']} |"
        )
    heads = [", ".join(models) for models in SPLIT]
    lines += ["", f"| claim | steps, density | {' | '.join(heads)} | perceptual there | judged |",
              "| --- |" + " --- |" * 5]  # fmt: skip
    judged: dict[tuple, dict] = {}
    for row in (row for row in rows if row not in best):
        key = row["claim"], row["steps"], row["density"]
        judged.setdefault(key, {})[tuple(row["judging"]["models"])] = row
    for (text, steps, density), by in judged.items():
        told = [by.get(models) for models in SPLIT]
        sides = [gain(row and row["judging"]) for row in told]
        seen = told[1] and told[1]["judging"]["perceptual"]
        sides.append("" if seen is None else f"{seen:+.3f}")
        words = " and ".join(dict.fromkeys(row["verdict"] for row in told[::-1] if row))
        lines.append(f"| {text} | {steps}, {density:g} | {' | '.join(sides)} | {words} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print a table too")
    options = parser.parse_args()
    data = recorded(options.files)
    rows = winners(data) + claims(data)
    told = {
        "what": __doc__.splitlines()[0], "rows": rows, "files": [p.resolve().relative_to(RESULTS).as_posix() for p in options.files],
        **{key: data[key] for key in ("hardware", "versions", "date")},
        "command": facts()["command"],
    }  # fmt: skip
    options.out.write_text(json.dumps(told, indent=1) + "\n")
    if options.table:
        print(table(rows))


if __name__ == "__main__":
    main()
