"""Tables and plots from the results of `run_lab.py`.

    python tests/lab/report.py FILE.json ... --out tests/lab/results

Rows of several files are joined: a later one takes the place of an earlier one, and what a model
did with other weights than in the last file that names its weights does not count. Prints one table
per schedule and density (mean over models and seeds, standard error, paired difference to the
paper's rule), one per question (to the question's base), and writes tables.md and, where rules ran
so, quality_density.svg, quality_time.svg and quality_eight_steps.svg.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import cost  # noqa: E402
import plots  # noqa: E402
from contestants import GROUPS, OP, QUESTIONS, SOL  # noqa: E402
from paired import error, load, mean, paired, rule_of, values  # noqa: E402
from rule import PAPER  # noqa: E402

OP_NAME = OP[1].name


def table(data: dict, schedule: str, density: float, against: str = PAPER.name) -> str:
    """One Markdown table, best first."""
    group = {name: rows for (s, d, name), rows in data["rows"].items()
             if s == schedule and d in (density, 1.0)}  # fmt: skip
    base = group.get(against)
    models = sorted({model for rows in group.values() for model in rows})
    lines = [
        f"| rule | PSNR dB | to the paper's rule | {' | '.join(models)} | SSIM "
        "| perceptual | changes | flicker | task | recall | ms a call | s a run |",
        "| --- |" + " --- |" * (len(models) + 10),
    ]
    ranked = []
    for name, rows in group.items():
        have = [model for model in models if model in rows]
        psnr = values(rows, "psnr", have)
        gain = paired(rows, base or {}, "psnr")
        cells = [f"{mean(psnr):.2f} ± {error(psnr):.2f}", gain.text() + gain.wins_text()]
        for column, digits in (
            ("ssim", 3), ("perceptual", 4), ("changes", 4), ("flicker", 2), ("task", 3),
        ):  # fmt: skip
            seen = values(rows, column, have)
            cells.append(f"{mean(seen):.{digits}f}" if seen else "")
        rule, extras = rule_of(rows[have[0]]), cost.recorded_extras()
        ms, run = cost.call_ms(rule, extras), cost.run_seconds(rule, schedule, extras)
        recall = mean([rows[m]["recall"] for m in have])
        cells[2:2] = by_model(rows, base or {}, models)
        cells += [f"{recall:.3f}" if recall == recall else "", f"{ms:.1f}" if ms else ""]
        cells.append(f"{run:.0f}" if run else "")
        ranked.append((-gain.mean if gain.pairs else 0.0, f"| {name} | {' | '.join(cells)} |"))
    return "\n".join(lines + [line for _, line in sorted(ranked)])


def by_model(rows: dict, base: dict, models) -> list[str]:
    """PSNR differences."""
    both = set(rows) & set(base)
    return [paired({m: rows[m]}, base, "psnr").text(1) if m in both else "" for m in models]


def question(data: dict, schedule: str, density: float, group: str) -> str:
    """The rules of a question against its first one, "" where fewer than two ran."""
    rows = {n: found for (s, d, n), found in data["rows"].items() if (s, d) == (schedule, density)}
    base, *others = (rule.name for rule in QUESTIONS[group])
    others = [name for name in others if name in rows]
    if base not in rows or not others:
        return ""
    models = sorted(rows[base])
    psnr = mean(values(rows[base], "psnr", models))
    lines = [
        f"Base: {base}, {psnr:.2f} dB\n",
        f"| rule | PSNR dB | to the base | {' | '.join(models)} | SSIM | flicker | task | searches "
        "| s a run |",
        "| --- |" + " --- |" * (len(models) + 7),
    ]
    for name in others:
        gain = paired(rows[name], rows[base], "psnr")
        # a mean over fewer models would not be comparable
        every = set(models) <= set(rows[name])
        cells = [f"{mean(values(rows[name], 'psnr', models)):.2f}" if every else ""]
        cells += [gain.text() + gain.wins_text(), *by_model(rows[name], rows[base], models)]
        for column, digits in (("ssim", 3), ("flicker", 2), ("task", 3)):
            cells.append(paired(rows[name], rows[base], column).text(digits))
        found = list(rows[name].values())
        searches = mean([1 + r["searches"] / (len(r["recall_by_layer"]) or 1) for r in found])
        run = cost.run_seconds(rule_of(found[0]), schedule, cost.recorded_extras())
        cells += [f"{searches:.1f}", f"{run:.0f}" if run else ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def equal_time(data: dict, against=(PAPER.name, SOL.name, OP_NAME)) -> str:
    """Rules at another density whose run takes 6 % longer to 9 % less than one of `against`."""
    lines = [
        "| steps | rule, density, s a run | rule, density, s a run | PSNR difference |",
        "| --- | --- | --- | --- |",
    ]

    def seconds(key, rows):
        rule = rule_of(next(iter(rows.values())))
        return cost.run_seconds(rule, key[0], cost.recorded_extras())

    every = {key: (seconds(key, rows), rows) for key, rows in sorted(data["rows"].items())}
    for (schedule, density, name), (price, rows) in every.items():
        for (s, d, other), (run, found) in every.items():
            if name not in against or other in against or s != schedule or not price or not run:
                continue
            if density != d and 0.91 <= run / price <= 1.06:
                gain = paired(found, rows, "psnr")
                lines.append(
                    f"| {s} | {name}, {density:g}, {price:.0f} | {other}, {d:g}, {run:.0f} "
                    f"| {gain.text()}{gain.wins_text()} |"
                )
    return "\n".join(lines)


def tasks(data: dict) -> str:
    """How much of what was asked for reads back, by model, with the dense videos for comparison."""
    models = sorted({row["model"] for row in data["dense_rows"]})
    dense = {(row["schedule"], row["model"]): row["task"] for row in data["dense_rows"]}
    lines = [
        f"| steps | density | rule | {' | '.join(models)} | difference to dense |",
        "| --- |" + " --- |" * (len(models) + 3),
    ]
    for (schedule, density, name), rows in sorted(data["rows"].items()):
        base = {m: {"task": dense.get((schedule, m))} for m in models}
        gap = paired(rows, base, "task")
        if not gap.pairs:
            continue
        cells = [
            f"{mean(rows[m]['task']):.2f} ({mean(base[m]['task']):.2f})"
            if m in rows and rows[m]["task"] and base[m]["task"] else ""
            for m in models
        ]  # fmt: skip
        cells.append(f"{gap.text(3)} ({gap.pairs})")
        lines.append(f"| {schedule} | {density:g} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layers(data: dict, schedule: str = "20", density: float = 0.2) -> str:
    """Share of the attention that the latest mask holds at its search, layer by layer."""
    lines = []
    for rule in GROUPS["decide"]:
        rows = data["rows"].get((schedule, density, rule.name), {})
        for model, row in sorted(rows.items()):
            if held := [f"{x:.2f}" for x in row["recall_by_layer"].values()]:
                lines.append(f"| {rule.name} | {model} | {' | '.join(held)} |")
    count = max((line.count("|") - 3 for line in lines), default=0)
    head = f"| rule | model | {' | '.join(map(str, range(count)))} |"
    return "\n".join([head, "| --- | --- |" + " --- |" * count, *lines]) if lines else ""


def curves(data: dict, schedule: str, x_of) -> dict[str, list]:
    """{rule: [(x, mean PSNR)]} for rules that ran at more than one density on all models."""
    found: dict[str, list] = {}
    models = {model for rows in data["rows"].values() for model in rows}
    for (s, _, name), rows in data["rows"].items():
        if s == schedule and set(rows) == models:
            row = next(iter(rows.values()))
            x = x_of(row)
            if x is not None and row["density"] < 1:
                found.setdefault(name, []).append((x, mean(values(rows, "psnr", rows))))
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def eight_steps(data: dict) -> dict[str, list]:
    """{rule: [(seconds of a run, mean PSNR)]} of the runs of 8 steps."""
    found = {}
    for schedule, group in (("8", "eight"), ("8 from the start", "eight first")):
        names = {rule.name for rule in GROUPS[group] if not rule.every_step}
        for (s, density, name), rows in sorted(data["rows"].items()):
            if s == schedule and name in names:
                rule = rule_of(next(iter(rows.values())))
                label = name if schedule == "8" else f"{name}, from step 0"
                label += "" if density == 0.2 else f", density {density:g}"
                seconds = cost.run_seconds(rule, schedule, cost.recorded_extras())
                found[label] = [(seconds, mean(values(rows, "psnr", rows)))]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    data = load(options.files)
    options.out.mkdir(parents=True, exist_ok=True)
    parts = []
    for schedule, density in sorted({(s, d) for s, d, _ in data["rows"] if d < 1}):
        parts.append(f"## Steps {schedule}, density {density:g}\n")
        parts.append(table(data, schedule, density) + "\n")
    for group in QUESTIONS:
        for schedule, density in sorted({(s, d) for s, d, _ in data["rows"] if d < 1}):
            if found := question(data, schedule, density, group):
                title = f"{group.capitalize()}: steps {schedule}, density {density:g}"
                parts.append(f"## {title}\n\n{found}\n")
    parts.append("## Equal time of a run\n\n" + equal_time(data) + "\n")
    parts.append("## The task read back (dense in brackets)\n\n" + tasks(data) + "\n")
    if held := layers(data):
        parts.append("## Recall by layer at the search: steps 20, density 0.2\n\n" + held + "\n")
    text = "\n".join(parts)
    (options.out / "tables.md").write_text(text)
    print(text)
    schedules = sorted({s for s, _, _ in data["rows"]}, key=lambda s: s != "20")
    for name, label, x_of in (
        ("quality_density", "density", lambda row: row["density"]),
        ("quality_time", "ms of a sparse call, 24 heads x 119,040 tokens, H200",
         lambda row: cost.call_ms(rule_of(row), cost.recorded_extras())),
    ):  # fmt: skip
        if lines := curves(data, schedules[0], x_of):
            path = options.out / f"{name}.svg"
            plots.lines(lines, label, "PSNR to dense, dB", f"{schedules[0]} steps", path)
    if points := eight_steps(data):
        label = "seconds of 8 steps of HunyuanVideo, 720p, H200, composed of measured steps"
        path = options.out / "quality_eight_steps.svg"
        plots.lines(points, label, "PSNR to dense, dB", "8 steps", path)


if __name__ == "__main__":
    main()
