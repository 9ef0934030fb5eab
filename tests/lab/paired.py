"""Rows of `run_lab.py`, and differences between them, seed by seed."""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from rule import Rule


def load(paths) -> dict:
    """{(schedule, density, rule name): {model: row}} and everything else of the last file.

    Raises:
        ValueError: a model was sampled at two sizes.
    """
    files = [json.loads(Path(path).read_text()) for path in paths]
    weights = {name: tag for data in files for name, tag in data.get("weights", {}).items()}
    found, dense, sizes = {}, [], {}
    for data in files:
        tags = data.get("weights", {})
        stale = {name for name, tag in weights.items() if tags.get(name) != tag}
        for name, size in data.get("layouts", {}).items():
            if name not in stale and sizes.setdefault(name, size) != size:
                raise ValueError(f"{name} was sampled at {sizes[name]} and at {size}.")
        for row in data["rows"]:
            key = row["schedule"], row["density"], row["rule"]
            if row["model"] not in stale:
                found.setdefault(key, {})[row["model"]] = row
        dense += [row for row in data["dense"] if row["model"] not in stale]
    return {**files[-1], "rows": found, "dense_rows": dense}


def mean(values) -> float:
    return statistics.fmean(values)


def error(values) -> float:
    """Standard error of a mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def values(rows: dict, column: str, models) -> list[float]:
    return [x for model in models for x in rows[model].get(column) or []]


class Difference(NamedTuple):
    mean: float
    error: float
    wins: int
    pairs: int

    def text(self, digits: int = 2) -> str:
        if not self.pairs:
            return ""
        return f"{self.mean:+.{digits}f} ± {self.error:.{digits}f}"

    def wins_text(self) -> str:
        return f" ({self.wins} of {self.pairs})" if self.pairs else ""


def difference(pairs) -> Difference:
    """Of pairs (a, b), a less b."""
    apart = [a - b for a, b in pairs]
    if not apart:
        return Difference(float("nan"), float("nan"), 0, 0)
    return Difference(mean(apart), error(apart), sum(x > 0 for x in apart), len(apart))


def paired(rows: dict, base: dict, column: str) -> Difference:
    """Over the seeds of the models that have the column in both."""
    models = sorted(m for m in set(rows) & set(base) if rows[m].get(column) and base[m].get(column))
    return difference(
        pair for m in models for pair in zip(rows[m][column], base[m][column], strict=True)
    )


def rule_of(row: dict) -> Rule:
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in row["settings"].items()}
    return Rule(row["rule"], density=row["density"], **settings)
