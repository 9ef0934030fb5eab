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
        model = f"{run.model}, {run.layout.describe()}" if run.layout else run.model
        text.append(Sentence("line_model", model=model))
    if run.patterns:
        text.append(Sentence("line_sparse", backend=run.backend))
    if run.dense_choice:
        text.append(Sentence("line_dense", choice=run.dense_choice))
    if run.speed is not None:
        times = {"sparse": milliseconds(run.speed.sparse), "dense": milliseconds(run.speed.dense)}
        text.append(Sentence("line_beside", **times))
    if timing.spent():
        spent = {"dense": sum(timing.dense), "sparse": sum(timing.sparse)}
        spent |= {"search": timing.searching(), "spent": timing.spent()}
        text.append(Sentence("line_attention", **{k: seconds(s) for k, s in spent.items()}))
    dense = timing.dense_call()
    if dense and timing.sparse:
        sparse, source = median(timing.sparse), "of_own_calls" if timing.dense else "of_searches"
        times = {"dense": milliseconds(dense), "sparse": milliseconds(sparse)}
        text.append(
            Sentence("line_call", **times, gain=f"{dense / sparse:.1f}", source=Sentence(source))
        )
    if run.steps:
        steps = ", ".join(f"{seconds(s)} {kind}" for kind, s in run.step_seconds().items())
        text.append(Sentence("line_step", steps=steps))
    memory = run.memory
    if memory.predicted_bytes or memory.held_bytes:
        kinds = {part[0] for part in memory.parts}
        parts = "context windows" if kinds == {"window"} else "parts of the video"
        parts = f" in {len(memory.parts)} {parts}" if memory.parts else ""
        sizes = {"held": gib(memory.held_bytes), "each": gib(memory.predicted_bytes)}
        count, place = str(len(memory.conditionings)), memory.place.upper()
        text.append(Sentence("line_memory", **sizes, count=count, place=place, parts=parts))
    if skipped := run.skipped():
        found = ranges(sorted({pattern.step for pattern in run.patterns.values()}))
        steps = ranges(skipped) + (f"; searched at step {found}" if found else "")
        text.append(Sentence("line_skipped", count=str(len(skipped)), steps=steps))
    if run.forecast.steps:
        text += forecast_lines(run.forecast)
    text += reuse_lines(run)
    if run.config.pooled and run.patterns:
        text.append(Sentence("line_tail"))
    if (share := run.patterns.similar()) is not None:
        text.append(Sentence("line_order", share=f"{share:.0%}"))
    if run.config.recall:
        text.append(Sentence("line_recall", recall=_recall(run)))
    precision, low = run.config.low_precision, run.low_precision
    if precision:
        text.append(Sentence("line_precision", count=str(low.calls), precision=precision))
    if low.searches:
        text.append(Sentence("line_searches", count=str(low.searches)))
    for why, count in low.declined.most_common():
        text.append(Sentence("line_not_in", precision=str(precision), count=str(count), why=why))
    kinds = ("line_kept", run.kept_dense), ("line_unseen", run.unseen), ("line_other", run.beside)
    for code, counts in kinds:
        for why, count in counts.most_common():
            text.append(Sentence(code, count=str(count), why=why))
    return text + [Sentence("line_note", text=warning) for warning in run.warnings]


def _recall(run) -> str:
    text = str(run.config.recall)
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
        count, steps = str(len(told.forecast)), ranges(told.numbers(told.forecast))
        values = {"count": count, "total": str(told.steps), "steps": steps}
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
    """Such as "4.6 s", "46 s", "3 min 40 s" or, from ten minutes on, "11 min"."""
    if value >= 600:
        return f"{value / 60:.0f} min"
    if value >= 120:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{value:.0f} s" if value >= 20 else f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def milliseconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value >= 0.1 else f"{value * 1e3:.2f} ms"


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
