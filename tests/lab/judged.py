"""Chooses rules on some models and judges them on the others, from recorded results.

    python tests/lab/judged.py tests/lab/results/second_weights/h200_*.json \
        --out tests/lab/results/judged.json --table

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

from paired import load, paired  # noqa: E402
from rule import PAPER, SCHEDULES  # noqa: E402

from tests.bench.record import facts  # noqa: E402

# heads of 64 and plain scenes; heads of 128 and rich ones
SPLIT = (("tiny",), ("wan128", "joint"))
# of the pack as it was when the results were recorded
TWO = "one cluster order (queries half), rods where better"
EARLIER = "queries half, second search at 0.45"
THREE = "one cluster order (queries half), three searches"
RODS = "ours, by block tail, two searches"


@dataclass(frozen=True)
class Claim:
    """That one rule is closer to dense than another, at places (schedule, density).

    Args:
        field: the preset's field that the claim decides, with its value there; () for none.
        presets: which have it.
    """

    text: str
    rule: str
    base: str
    places: tuple[tuple[str, float], ...]
    presets: tuple[str, ...] = ()
    field: tuple = ()


MOST = (("20", 0.2), ("20", 0.1), ("50", 0.2), ("8", 0.2))
CLAIMS = (
    Claim("the preset's rule over the paper's", EARLIER, PAPER.name, MOST, ("Balanced", "Fast")),
    Claim("second search at 0.45 over 0.6", EARLIER, TWO, MOST,
          ("Balanced", "Fast"), ("search_points", (0.45,))),
    Claim("second search at 0.6 over 0.45, behind 20 % dense", "queries half, 20 % dense",
          "queries half, 20 % dense, second search at 0.45", (("20", 0.3),),
          ("Quality",), ("search_points", (0.6,))),
    Claim("three searches over two", THREE, EARLIER, MOST),
    Claim("two searches over one", TWO, "queries half, one search", (("20", 0.2), ("8", 0.2))),
    Claim("similarity over position", TWO, RODS, (("20", 0.2), ("20", 0.1), ("8", 0.2)),
          ("Balanced", "Quality", "Fast"), ("token_order", "similarity")),
    Claim("pooled tail over none", TWO, "queries half, no tail, by mass", (("20", 0.2),),
          ("Balanced", "Quality", "Fast"), ("tail", "pooled")),
    Claim("even heads over adaptive ones", TWO, "queries half, head-adaptive", (("20", 0.2),),
          ("Balanced", "Quality", "Fast"), ("head_adaptive", False)),
    Claim("even heads over adaptive ones, by the paper's rule", "paper, even heads", PAPER.name,
          (("20", 0.2),)),
    Claim("10 % dense steps over 5 %", TWO, "queries half, 5 % dense", (("20", 0.2),)),
    Claim("20 % dense steps over 10 %", "queries half, 20 % dense", TWO, (("20", 0.2),)),
    Claim("30 % dense steps over 20 %", "queries half, 30 % dense", "queries half, 20 % dense",
          (("20", 0.2),)),
    Claim("two dense steps of 8 over one", "queries half, two dense steps, two searches", TWO,
          (("8", 0.2),)),
)  # fmt: skip


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
    return {
        "claim": claim, "density": place[1], "steps": SCHEDULES[place[0]][0],
        "rule": rule, "base": base, "rules_compared": compared,
        "choosing": choosing, "judging": judging,
        "gap_db": round(choosing["gain_db"] - judging["gain_db"], 2), "verdict": verdict(judging),
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
    """Every claim at every place where all models ran both of its rules, judged both ways."""
    found = []
    for claim in CLAIMS:
        for place in claim.places:
            rows, base = (data["rows"].get((*place, n), {}) for n in (claim.rule, claim.base))
            compared = sum((s, d) == place for s, d, _ in data["rows"])
            for choosers, judges in (SPLIT, SPLIT[::-1]):
                if {*choosers, *judges} <= set(rows) & set(base):
                    sides = side(rows, base, choosers), side(rows, base, judges)
                    found.append(_row(claim.text, place, claim.rule, claim.base, compared, sides))
    return found


def table(rows: list[dict]) -> str:
    """Markdown: the winners both ways, then a line per claim and place."""

    def gain(seen: dict) -> str:
        return f"{seen['gain_db']:+.1f} ± {seen['stderr']:.1f} ({seen['wins']} of {seen['videos']})"

    lines = ["| steps, density | of rules | chosen by | winner | there | judges | its place |",
             "| --- |" + " --- |" * 6]  # fmt: skip
    best = [row for row in rows if "place_by_judges" in row]
    for row in best:
        names = [", ".join(row[part]["models"]) for part in ("choosing", "judging")]
        lines.append(
            f"| {row['steps']}, {row['density']:g} | {row['rules_compared']} | {names[0]} "
            f"| {row['rule']} | {gain(row['choosing'])} | {gain(row['judging'])} "
            f"| {row['place_by_judges']} |"
        )
    heads = [", ".join(models) for models in SPLIT]
    lines += ["", f"| claim | steps, density | {' | '.join(heads)} | judged |",
              "| --- |" + " --- |" * 4]  # fmt: skip
    pairs = [row for row in rows if row not in best]
    for one, two in zip(pairs[::2], pairs[1::2], strict=True):
        sides = [gain(one["choosing"]), gain(one["judging"])]
        words = " and ".join(dict.fromkeys((two["verdict"], one["verdict"])))
        place = f"{one['steps']}, {one['density']:g}"
        lines.append(f"| {one['claim']} | {place} | {' | '.join(sides)} | {words} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print a table too")
    options = parser.parse_args()
    data = load(options.files)
    rows = winners(data) + claims(data)
    told = {
        "what": __doc__.splitlines()[0], "rows": rows, "files": [p.name for p in options.files],
        **{key: data[key] for key in ("hardware", "versions", "date")},
        "command": facts()["command"],
    }  # fmt: skip
    options.out.write_text(json.dumps(told, indent=1) + "\n")
    if options.table:
        print(table(rows))


if __name__ == "__main__":
    main()
