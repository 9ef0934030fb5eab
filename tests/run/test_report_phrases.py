"""Every phrase of the report stands where it is true, and not where it is untrue."""

import ast
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_attn.config import AdaSpaConfig
from sparse_attn.forecast.statistics import ForecastStatistics
from sparse_attn.run import report
from sparse_attn.run.pace import Speed
from sparse_attn.run.statistics import RunStatistics
from sparse_attn.run.timer import Timing
from sparse_attn.schedule import StepKind
from sparse_attn.sentences import ENGLISH
from tests.run.fakes import schedule
from tests.run.test_statistics import a_run

# these write numbers, or ask others for their lines
NO_PHRASES = {"seconds", "milliseconds", "gib", "ranges"}


def english(code: str) -> str:
    """A sentence, with {} for its values; other words as they are."""
    return re.sub(r"\{\w+\}", "{}", ENGLISH.get(code, code))


def template(node: ast.expr) -> str:
    """A string of the source, with {} for what it is filled with."""
    if isinstance(node, ast.Constant):
        # where it is named before it is said, the code of a sentence has two words
        return english(node.value) if "_" in node.value else node.value
    assert isinstance(node, ast.JoinedStr)
    return "".join(x.value if isinstance(x, ast.Constant) else "{}" for x in node.values)


def phrases_of(source: str) -> set[str]:
    """Every string in the functions of a module that has a word in it, and is not part of another.

    The code of a sentence counts as its English text.
    """
    found = set()

    def visit(node):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Sentence":
            node.args[0] = ast.Constant(english(getattr(node.args[0], "value", "")))
        if isinstance(node, ast.Dict):
            for value in node.values:
                visit(value)
            return
        if isinstance(node, ast.JoinedStr | ast.Constant):
            if not isinstance(node, ast.Constant) or isinstance(node.value, str):
                found.add(template(node))
            for part in node.values if isinstance(node, ast.JoinedStr) else ():
                if isinstance(part, ast.FormattedValue):
                    visit(part.value)
            return
        if isinstance(node, ast.Compare):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and function.name not in NO_PHRASES:
            for statement in function.body[ast.get_docstring(function) is not None :]:
                visit(statement)
    return {text for text in found if re.search("[a-z]{2}", text.replace("{}", ""))}


def sampled(**fields) -> RunStatistics:
    """A run like `a_run`, with other values."""
    run = a_run()
    for name, value in fields.items():
        setattr(run, name, value)
    return run


def changed(change, run=None) -> RunStatistics:
    run = run or a_run()
    change(run)
    return run


def configured(**fields) -> RunStatistics:
    run = a_run()
    run.config = replace(run.config, **fields)
    return run


def dense(**kept) -> RunStatistics:
    run = RunStatistics(AdaSpaConfig(), schedule("DSss"))
    run.model, run.layout, run.finished = "Wan", a_run().layout, True
    run.kept_dense.update({reason.replace("_", " "): n for reason, n in kept.items()})
    return run


def cached(skipped=(7, 8), finished=True) -> RunStatistics:
    return sampled(entered=set(range(20)) - set(skipped), finished=finished)


def timed(**seconds) -> RunStatistics:
    return sampled(timing=Timing(**seconds))


def carried(**fields) -> RunStatistics:
    def change(run):
        run.reuse.source, run.reuse.masks, run.reuse.recall = "an earlier run", 2, [0.9, 0.9]
        for found in run.patterns.values():
            found.carried, found.exact = True, False
        for name, value in fields.items():
            setattr(run.reuse, name, value)

    return changed(change)


def asked(samples=True, searched=True) -> RunStatistics:
    def change(run):
        if samples:
            run.patterns.samples[0, "positive"] = 19, [0.9, 0.8]
        for found in run.patterns.values():
            found.carried = not searched

    return changed(change, configured(recall=0.9))


def held(*parts) -> RunStatistics:
    def change(run):
        run.memory.held_bytes, run.memory.parts = 2**30, {*parts}

    return changed(change)


def with_similar(share) -> RunStatistics:
    def change(run):
        for found in run.patterns.values():
            found.similar = share

    return changed(change)


def low(calls=0, searches=0, declined=()) -> RunStatistics:
    def change(run):
        run.low_precision.calls, run.low_precision.searches = calls, searches
        run.low_precision.declined = Counter(declined)

    return changed(change, configured(precision="int8"))


def forecast(**fields) -> RunStatistics:
    """A run of 20 steps with Skip Steps, of which it forecast two unless told otherwise."""
    return sampled(forecast=ForecastStatistics(**{"steps": 20, "forecast": {5, 7}, **fields}))


def estimated() -> RunStatistics:
    return changed(lambda run: setattr(run.patterns[0, "positive"], "exact", False))


WINDOWS = (("window", 2, (0, 1)), ("window", 2, (1, 2)))
UNSEEN = sampled(patterns=dense().patterns, unseen=Counter({"unknown why": 4}))
# phrase: a run of which it is true, and one of which it is not
RUNS = {
    "{} tokens": (a_run(), changed(lambda r: setattr(r, "layout", None), dense())),
    "{} of them skipped by a cache": (cached(), cached(skipped=())),
    "{} of them forecast": (forecast(), forecast(forecast=set())),
    "density {}": (a_run(), dense()),
    "recall {}{}, worst head {}": (a_run(), dense()),
    "saved": (a_run(), timed(dense=[1.0], search=[9.0], sparse=[1.0])),
    "lost": (timed(dense=[1.0], search=[9.0], sparse=[1.0]), a_run()),
    "{} {} of attention": (a_run(), timed(sparse=[1.0])),
    "Model: {}": (a_run(), sampled(model="")),
    "Sparse attention by: {}": (
        a_run(), changed(lambda r: setattr(r, "backend", "Triton kernels"), dense())
    ),
    "Dense steps by: {}": (sampled(dense_choice="host"), a_run()),
    "Sparse beside dense: {} and {} a call; kept until ComfyUI restarts": (
        sampled(speed=Speed(3.0, 1.0, 640)), a_run()
    ),
    "Attention: {} spent ({} dense, {} search, {} sparse)": (a_run(), timed()),
    "One call: {} dense, {} sparse ({}x), measured against {}": (a_run(), timed(dense=[1.0])),
    "its own dense calls": (a_run(), timed(search_dense=[9.0], search=[10.0], sparse=[3.0])),
    "the dense pass of its searches": (
        timed(search_dense=[9.0], search=[10.0], sparse=[3.0]), a_run()
    ),
    "One step of the whole model: {}": (sampled(steps=[(StepKind.DENSE, 3.0)]), a_run()),
    "Memory held: {} on the {} for {} conditioning(s){}, predicted {} each": (held(), a_run()),
    " in {} {}": (held(*WINDOWS), held()),
    "context windows": (held(*WINDOWS), held(("tile", 0, 1))),
    "parts of the video": (held(("tile", 0, 1)), held(*WINDOWS)),
    "Skipped by a cache: {} steps, {}": (cached(), sampled(unseen=Counter({"unknown why": 4}))),
    "; searched at step {}": (cached(), changed(lambda r: r.entered.update((0, 2)), dense())),
    "Skip Steps: every step was computed.": (forecast(forecast=set()), forecast()),
    "Skip Steps: every step was computed: {}.": (
        forecast(forecast=set(), why_not="too few steps"), forecast(forecast=set())
    ),
    "the forecasts were too far off": (
        forecast(forecast=set(), withheld={6}), forecast(forecast=set())
    ),
    "Skip Steps: {} of {} steps forecast, {}.": (forecast(), forecast(forecast=set())),
    "Skip Steps: {} of {} steps forecast, {}; saved about {}.": (
        forecast(seconds=[2.0], evaluations=2), forecast()
    ),
    "Skip Steps stopped: {}.": (forecast(why_not="too few steps"), forecast()),
    "Computed steps were {} off a forecast of them, at most {}.": (
        forecast(errors={4: 0.01}), forecast()
    ),
    "Computed after all, as forecasts had drifted: {}.": (forecast(withheld={6}), forecast()),
    "Tail: pooled, the average of every skipped block stands in for it": (
        configured(tail="pooled"), dense()
    ),
    "Token order: by similarity in {} of the heads, else by position": (
        with_similar([1.0, 0.0]), a_run()
    ),
    "Precision: {} calls in {}": (low(calls=3), a_run()),
    "Searches in int8: {} calls": (low(searches=3), low(calls=3)),
    "Not in {}: {} calls, {}": (low(declined={"no room": 2}), low(calls=3)),
    "Kept dense: {} calls, {}": (dense(too_short=4), a_run()),
    "Video's self-attention not seen: {} calls, {}": (UNSEEN, dense(too_short=4)),
    "Not the video's self-attention: {} calls, {}": (
        sampled(beside=Counter({"cross-attention": 4})), dense(too_short=4)
    ),
    "Note: {}": (sampled(warnings=["out of memory"]), a_run()),
    "Recall asked for: {}": (asked(), a_run()),
    "; the searches found {} to {} by head": (asked(), asked(searched=False)),
    "; in step {} {} is left, worst head {} (sampled)": (asked(), asked(samples=False)),
    "Pattern of {}: {} masks used without a search": (carried(), a_run()),
    ", recall {} here (sampled), {} when found": (carried(), carried(masks=0)),
    "Searched after all: {} masks, {}": (carried(refused=Counter({"other sizes": 1})), carried()),
}  # fmt: skip


def says(run: RunStatistics, phrase: str) -> bool:
    words = ".*".join(re.escape(part) for part in phrase.split("{}"))
    begins = r"\b" if re.match(r"\w", phrase) else ""
    return re.search(begins + words, "\n".join(run.lines())) is not None


def test_every_phrase_of_the_report_has_its_runs():
    assert phrases_of(Path(report.__file__).read_text(encoding="utf-8")) == set(RUNS)


def test_a_phrase_without_its_runs_is_noticed():
    source = Path(report.__file__).read_text(encoding="utf-8")
    more = source + '\n\ndef other(run):\n    return f"all is {run} well"\n'
    assert phrases_of(more) - phrases_of(source) == {"all is {} well"}


@pytest.mark.parametrize("phrase", RUNS)
def test_a_phrase_stands_where_it_is_true_alone(phrase):
    true, untrue = RUNS[phrase]
    assert says(true, phrase)
    assert not says(untrue, phrase)


def test_labels_of_the_recall_are_those_of_its_searches():
    for run, label in ((a_run(), ""), (estimated(), " (estimated)"), (carried(), " (sampled)")):
        assert f"recall {run.patterns.recall()[0]:.2f}{label}, worst" in run.summary()
