"""What the node, the log and the report say of a run; `run` is its `RunStatistics`."""

from statistics import fmean, median

from ..sentences import Sentence


def summary(run) -> str:
    """One line for the log: the verdict, then the numbers."""
    said = " ".join(run.verdict())
    return f"{said} {figures(run)}" if run.patterns else said


def figures(run) -> str:
    """The numbers of a run that has patterns, in one line."""
    mean, worst = run.patterns.recall()
    label = run.patterns.recall_label()
    parts = [
        f"{run.tokens:,} tokens",
        run.schedule.until(run.stopped_at).describe(),
        *([f"{len(skipped)} of them skipped by a cache"] if (skipped := run.skipped()) else []),
        *([f"{len(run.forecast.forecast)} of them forecast"] if run.forecast.forecast else []),
        f"density {run.patterns.density():.2f}",
        f"recall {mean:.2f}{f' ({label})' if label else ''}, worst head {worst:.2f}",
    ]
    saved = run.timing.saved()
    if saved is not None:
        verb = "saved" if saved >= 0 else "lost"
        parts.append(f"{verb} {seconds(abs(saved))} of attention")
    return ", ".join(parts)


def lines(run) -> list[str]:
    """The whole report, a line each."""
    timing = run.timing
    part = f"{run.part.capitalize()}: " if run.part else ""
    text = [part + " ".join(run.verdict()), *([figures(run)] if run.patterns else [])]
    if not run.config.enabled:
        return text
    if run.model:
        text.append(f"Model: {run.model}" + (f", {run.layout.describe()}" if run.layout else ""))
    if run.patterns:
        text.append(f"Sparse attention by: {run.backend}")
    if run.dense_choice:
        text.append(f"Dense steps by: {run.dense_choice}")
    if run.speed is not None:
        text.append(
            f"Sparse beside dense: {milliseconds(run.speed.sparse)} and "
            f"{milliseconds(run.speed.dense)} a call; kept until ComfyUI restarts"
        )
    if timing.spent():
        text.append(
            f"Attention: {seconds(timing.spent())} spent ({seconds(sum(timing.dense))} dense, "
            f"{seconds(timing.searching())} search, {seconds(sum(timing.sparse))} sparse)"
        )
    dense = timing.dense_call()
    if dense and timing.sparse:
        source = "its own dense calls" if timing.dense else "the dense pass of its searches"
        text.append(
            f"One call: {milliseconds(dense)} dense, {milliseconds(median(timing.sparse))} "
            f"sparse ({dense / median(timing.sparse):.1f}x), measured against {source}"
        )
    if run.steps:
        steps = ", ".join(f"{seconds(s)} {kind}" for kind, s in run.step_seconds().items())
        text.append(f"One step of the whole model: {steps}")
    memory = run.memory
    if memory.predicted_bytes or memory.held_bytes:
        kinds = {part[0] for part in memory.parts}
        parts = "context windows" if kinds == {"window"} else "parts of the video"
        parts = f" in {len(memory.parts)} {parts}" if memory.parts else ""
        text.append(
            f"Memory held: {gib(memory.held_bytes)} on the {memory.place.upper()} for "
            f"{len(memory.conditionings)} conditioning(s){parts}, predicted "
            f"{gib(memory.predicted_bytes)} each"
        )
    if skipped := run.skipped():
        found = ranges(sorted({pattern.step for pattern in run.patterns.values()}))
        searched = f"; searched at step {found}" if found else ""
        text.append(f"Skipped by a cache: {len(skipped)} steps, {ranges(skipped)}{searched}")
    if run.forecast.steps:
        text += forecast_lines(run.forecast)
    text += reuse_lines(run)
    if run.config.pooled and run.patterns:
        text.append("Tail: pooled, the average of every skipped block stands in for it")
    if (share := run.patterns.similar()) is not None:
        text.append(f"Token order: by similarity in {share:.0%} of the heads, else by position")
    if run.config.recall:
        text.append(_recall(run))
    precision, low = run.config.low_precision, run.low_precision
    if precision:
        text.append(f"Precision: {low.calls} calls in {precision}")
    if low.searches:
        text.append(f"Later searches in int8: {low.searches} calls")
    for reason, count in low.declined.most_common():
        text.append(f"Not in {precision}: {count} calls, {reason}")
    for reason, count in run.kept_dense.most_common():
        text.append(f"Kept dense: {count} calls, {reason}")
    for reason, count in run.unseen.most_common():
        text.append(f"Video's self-attention not seen: {count} calls, {reason}")
    for reason, count in run.beside.most_common():
        text.append(f"Not the video's self-attention: {count} calls, {reason}")
    return text + [f"Note: {warning}" for warning in run.warnings]


def _recall(run) -> str:
    text = f"Recall asked for: {run.config.recall}"
    found = [r for p in run.patterns.values() if not p.carried for r in p.recall]
    if found:
        text += f"; the searches found {min(found):.3f} to {max(found):.3f} by head"
    if sampled := run.patterns.sampled_recall():
        steps = ranges(sorted({step for step, _ in run.patterns.samples.values()}))
        mean, worst = sampled
        text += f"; in step {steps} {mean:.2f} is left, worst head {worst:.2f} (sampled)"
    return text


def forecast_lines(told) -> list[Sentence]:
    """What Skip Steps did in a run; `told` is its `ForecastStatistics`."""
    why, saved = told.why_not, told.saved()
    if told.forecast:
        values = {
            "count": str(len(told.forecast)),
            "total": str(told.steps),
            "steps": ranges(told.numbers(told.forecast)),
        }
        if saved:
            text = [Sentence("skipped_saved", **values, saved=seconds(saved))]
        else:
            text = [Sentence("skipped", **values)]
        if why:
            text.append(Sentence("skip_stopped", why=why))
    else:
        why = why or (Sentence("skip_drifted") if told.withheld else "")
        text = [Sentence("skipped_none_why", why=why) if why else Sentence("skipped_none")]
    if told.errors:
        mean, most = fmean(told.errors.values()), max(told.errors.values())
        text.append(Sentence("skip_errors", mean=f"{mean:.1%}", most=f"{most:.1%}"))
    if told.withheld and told.forecast:
        text.append(Sentence("skip_withheld", steps=ranges(told.numbers(told.withheld))))
    return text


def reuse_lines(run) -> list[str]:
    """Lines on masks of another run, and on those that outlive this one."""
    reuse = run.reuse
    if not reuse.source:
        return list(reuse.kept)
    line = f"Pattern of {reuse.source}: {reuse.masks} masks used without a search"
    now = [r for p in run.patterns.values() if p.carried for r in p.recall]
    if reuse.masks and now:
        line += (
            f", recall {sum(now) / len(now):.2f} here (sampled), "
            f"{fmean(reuse.recall):.2f} when found"
        )
    refused = [
        f"Searched after all: {count} masks, {reason}"
        for reason, count in reuse.refused.most_common()
    ]
    return [line, *refused, *reuse.kept]


def ranges(steps: list[int]) -> str:
    """Such as "3-5, 8" of [2, 3, 4, 7]: steps ascend from 0, and people count from 1."""
    parts = []
    for number in (step + 1 for step in steps):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def seconds(value: float) -> str:
    if value >= 600:
        return f"{value / 60:.0f} min"
    return f"{value:.0f} s" if value >= 20 else f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def milliseconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value >= 0.1 else f"{value * 1e3:.2f} ms"


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
