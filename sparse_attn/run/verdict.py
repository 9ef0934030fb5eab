"""The verdict on a run: how long it took, what it would have taken, how close it is, what to do."""

from collections import Counter

from ..sentences import Sentence
from .pace import Speed
from .report import seconds

# nearer to each other two times are called equal: runs of one graph differ by as much
EVEN = 0.03
# Least recall at the last search for each word, with a tail: from whole videos of small models, by
# tests/lab/closeness.py.
CLOSENESS = {"very_close": 0.8, "close": 0.7, "may_differ": 0.0}
# up to this recall runs without a tail were measured, and a fifth of their videos differed little
MAY_DIFFER_WITHOUT_A_TAIL = 0.84


def verdict(run) -> list[Sentence]:
    """What people want to know of a run (`RunStatistics`) first."""
    if run.stopped_at is not None:
        step, total = run.stopped_at + 1, run.schedule.total_steps
        return [Sentence("stopped", step=str(step), total=str(total))]
    if not run.config.enabled:
        return [Sentence("took_off", took=seconds(run.took or 0))]
    if run.dense_from is not None and run.why_dense:
        code = "dense_from" if run.patterns else "dense_all"
        step = str(run.schedule.number(run.dense_from))
        told = _time(run) if run.patterns else _took(run)
        return [*told, Sentence(code, step=step, why=run.why_dense)]
    if not run.patterns:
        return [*_took(run), why_all_dense(run)]
    return [*_time(run), closeness(run)]


def named(run) -> list[Sentence]:
    """The verdict, behind the name of the expert where a run is of one of two."""
    known = {"high noise": "high_noise", "low noise": "low_noise"}
    return [*([Sentence(known[run.part])] if run.part in known else []), *run.verdict()]


def why_all_dense(run) -> Sentence:
    """Why no call of a run was sparse."""
    reasons = run.kept_dense + Counter(
        {Sentence("why_not_seen", why=why): n for why, n in run.unseen.items()}
    )
    ((why, _),) = reasons.most_common(1) or [("", 0)]
    return Sentence("all_dense", why=why) if why else Sentence("all_dense_steps")


def closeness(run) -> Sentence:
    """How close a run with patterns is to dense, by the recall that was measured."""
    recall, _ = run.patterns.recall()
    if run.config.pooled:
        return Sentence(next(code for code, least in CLOSENESS.items() if recall >= least))
    return Sentence("may_differ" if recall < MAY_DIFFER_WITHOUT_A_TAIL else "not_judged")


def numbers(run) -> list[Sentence]:
    """What stands below the verdict on a node, whose strip shows the steps."""
    if not run.patterns:
        return []
    recall, worst = run.patterns.recall()
    label = run.patterns.recall_label()
    code = f"figures_{label}" if label else "figures"
    values = {"tokens": f"{run.tokens:,}", "density": f"{run.patterns.density():.2f}"}
    return [Sentence(code, **values, recall=f"{recall:.2f}", worst=f"{worst:.2f}")]


def _took(run) -> list[Sentence]:
    return [] if run.took is None else [Sentence("took", took=seconds(run.took))]


def _time(run) -> list[Sentence]:
    """How long a run took, beside what it would have taken dense."""
    if run.took is None:
        return []
    dense, measured = run.seconds_off, True
    if dense is None:
        dense, measured = run.seconds_dense(), False
    if dense is None:
        # what a search's dense pass takes may not be what the host's attention takes
        saved = run.timing.saved()
        known = saved is not None and not run.timing.dense
        said = (
            Sentence("by_search", dense=seconds(run.took + saved)) if known else Sentence("untimed")
        )
        return [*_took(run), said]
    times = {"took": seconds(run.took), "dense": seconds(dense)}
    gain, suffix = dense / run.took, "_measured" if measured else ""
    if abs(gain - 1) < EVEN:
        return [Sentence("even", took=times["took"])]
    if gain > 1:
        return [Sentence("faster" + suffix, **times, gain=f"{gain:.{1 if gain >= 1.1 else 2}f}x")]
    return [Sentence("slower" + suffix, **times), *_why_slower(run)]


def _why_slower(run) -> list[Sentence]:
    timing = run.timing
    dense, sparse = timing.dense_call(), timing.sparse_call()
    if dense is None or sparse is None or run.why_dense:
        return []
    if sparse > dense:
        return [Sentence("too_small", sparse=call_seconds(sparse), dense=call_seconds(dense))]
    return [Sentence("too_few_steps")]


def why_dense(speed: Speed, kept: float) -> Sentence:
    """Why calls of a speed run dense; a sparse one computes the share `kept` of its blocks."""
    tokens = speed.least_tokens(kept)
    if tokens is not None:
        return Sentence("too_short_here", tokens=f"{tokens:,}")
    times = {"sparse": call_seconds(speed.sparse), "dense": call_seconds(speed.dense)}
    return Sentence("no_faster_here", **times)


def call_seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else seconds(value)
