"""Which recall of a run each word of the node's verdict needs, from whole videos of the lab.

    python tests/lab/closeness.py            # prints it, and writes results/closeness.json

Of every run of the pack's own rule (pooled tail, order by similarity where it is better; 5 to 35 % of
the blocks; 8, 20 and 50 steps) there is the recall at its latest search and, of eight seeds, PSNR and
SSIM of its video to the dense one. A word asks of the average video what `AdaSpa Compare` asks for
the like: "very close" is "hard to see", "close" is "small differences". Lines through the runs of two
models (least squares) say at which recall the average has that PSNR and that SSIM; the larger of both,
rounded up to 0.01, is the word's. The third model, which had no part in it, says how well that holds,
and two that draw another world: `natural` and `solid`.
"""

import json
import sys
from math import ceil
from pathlib import Path
from statistics import fmean

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

from sparse_attn.video_metrics import ALIKE  # noqa: E402

SOURCES = {
    model: HERE / "results" / "second_weights" / f"h200_9_{model}.json"
    for model in ("tiny", "wan128", "joint")
}
JUDGES = {model: HERE / "results" / f"h200_{model}.json" for model in ("natural", "solid")}
CHOSEN_ON, HELD_OUT = ("tiny", "wan128"), ("joint", *JUDGES)
WORDS = {"very_close": "hard_to_see", "close": "small"}
# as it was called when each model was sampled
OWN = {"score": "block tail", "order": "clusters", "tail": "pooled", "choose": True}
NOW = {"order": "similarity", "tail": "pooled"}
# what users set too: more searches, other blocks, low precision, a longer warm-up
FREE = {"again", "block_q", "quantised", "precision", "search_gap", "warmup"}
OUT = HERE / "results" / "closeness.json"


def runs(model: str, ours: bool = True) -> list[dict]:
    """The runs of a model by the pack's rule; or those that know a recall and have no tail."""
    found, own = [], OWN if model in SOURCES else NOW
    for row in json.loads((SOURCES | JUDGES)[model].read_text(encoding="utf-8"))["rows"]:
        settings = row["settings"]
        fixed = {key: value for key, value in settings.items() if key not in FREE}
        if ours and fixed == own and settings.get("warmup", 0.12) >= 0.12:
            # with "from the start" no step is dense before the search
            found += [row] if "start" not in row["schedule"] else []
        elif not ours and "tail" not in settings and np.isfinite(row["recall"]):
            found.append(row)
    return found


def least_recall(chosen: list[dict], word: str) -> dict:
    """At which recall the average video of a run has the PSNR and the SSIM of a word."""
    recall = [run["recall"] for run in chosen]
    found = {}
    for measure, asked in zip(("psnr", "ssim"), ALIKE[word], strict=True):
        slope, base = np.polyfit(recall, [fmean(run[measure]) for run in chosen], 1)
        found[measure] = round(float((asked - base) / slope), 4)
    return {**found, "recall": ceil(100 * max(found.values())) / 100}


def told(group: list[dict]) -> dict:
    """What the videos of some runs are like."""
    psnr, ssim = ([x for run in group for x in run[key]] for key in ("psnr", "ssim"))
    hard, small = (
        fmean(p >= ALIKE[word][0] and s >= ALIKE[word][1] for p, s in zip(psnr, ssim, strict=True))
        for word in ("hard_to_see", "small")
    )
    return {
        "videos": len(psnr), "psnr": round(fmean(psnr), 2), "ssim": round(fmean(ssim), 4),
        "hard_to_see": round(hard, 4), "small_or_less": round(small, 4),
    }  # fmt: skip


def bands(group: list[dict], least: dict[str, float]) -> dict:
    """Runs by the word that they would get."""
    found, above = {}, 1.01
    for word, recall in {**least, "may_differ": 0.0}.items():
        of_word = [run for run in group if recall <= run["recall"] < above]
        found[word] = told(of_word) if of_word else None
        above = recall
    return found


def derive() -> dict:
    chosen = [run for model in CHOSEN_ON for run in runs(model)]
    words = {word: least_recall(chosen, like) for word, like in WORDS.items()}
    least = {word: found["recall"] for word, found in words.items()}
    bare = [run for model in SOURCES for run in runs(model, ours=False)]
    return {
        "what": "least recall at the last search for each word of the verdict, with a pooled tail",
        "asked": {word: dict(zip(("psnr", "ssim"), ALIKE[like], strict=True))
                  for word, like in WORDS.items()},
        "sources": [path.relative_to(HERE).as_posix() for path in (SOURCES | JUDGES).values()],
        "chosen_on": CHOSEN_ON, "words": words,
        "chosen": bands(chosen, least),
        "held_out": HELD_OUT, "judged": {model: bands(runs(model), least) for model in HELD_OUT},
        "without_a_tail": {"most_recall": max(run["recall"] for run in bare), **told(bare)},
        "large_models": "none was measured",
    }  # fmt: skip


if __name__ == "__main__":
    text = json.dumps(derive(), indent=1)
    OUT.write_text(text + "\n", encoding="utf-8")
    print(text)
