"""Compares ways to run sparse steps on whole generations of the lab's models.

    python tests/lab/run_lab.py --comfyui PATH --models tiny wan128 joint \
        --jobs 20:0.2:decide 8:0.2:eight --out OUT/lab.json

A job is SCHEDULE:DENSITY:GROUP, or SCHEDULE:DENSITY:GROUP:MODEL,MODEL; see SCHEDULES and
`contestants.GROUPS`. Every contestant samples the same prompts and seeds as the dense generation
that it is compared with: the pack as its node installs it, a rival through the same attention
override. The result is rewritten after every row; `report.py` makes tables and plots of it.
A contestant that fails costs the others nothing: it is named in the result and at the end.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(ROOT), str(ROOT / "tests" / "tiny_model"), str(HERE)]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

import networks  # noqa: E402
import torch  # noqa: E402
from contestants import GROUPS  # noqa: E402
from metrics import Readers, likeness  # noqa: E402
from models import MODELS  # noqa: E402
from rule import SCHEDULES  # noqa: E402

from tests.bench.record import facts  # noqa: E402


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


class Lab:
    def __init__(self, options):
        self.options = options
        self.began = time.perf_counter()
        self.readers = Readers() if options.task else None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.subjects, self.videos, self.weights = {}, {}, {}
        self.rows, self.dense = [], {}
        self.done, self.failed = set(), []

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def subject(self, name):
        if name not in self.subjects:
            import generation

            o = self.options
            subject = generation.subject(name, o.comfyui, o.seeds, o.latent, o.clips)
            self.subjects[name] = subject
            data = networks.content(MODELS[name].path)
            self.weights[name] = hashlib.sha256(data).hexdigest()[:12]
            print(f"{name}: {subject.layout.describe()}, {self.seconds():.0f} s", flush=True)
        return self.subjects[name]

    def dense_videos(self, name, schedule):
        """The dense generation of a schedule's steps."""
        subject, steps = self.subject(name), SCHEDULES[schedule][0]
        if (name, steps) not in self.videos:
            self.videos[name, steps] = subject.dense(steps)
        video = self.videos[name, steps]
        if (name, schedule) not in self.dense:
            task = self.read(subject, video)
            self.dense[name, schedule] = {"model": name, "schedule": schedule, "task": task}
        return video

    def read(self, subject, videos):
        asked = self.readers and subject.readable
        return self.readers.read(subject.scenes, videos) if asked else None

    def job(self, name, schedule, density, rules):
        rules = [r if r.density else r.but(r.name, density=density) for r in rules]
        for rule in rules:
            if self.seconds() > self.options.seconds:
                return
            if (name, schedule, rule) in self.done:
                continue
            dense, began = self.dense_videos(name, schedule), self.seconds()
            try:
                run = self.subject(name).run(self.settled(name, schedule, rule), schedule)
                row = self.row(name, schedule, rule, dense, run)
            except Exception as error:
                # one contestant must not cost the others their turn
                self.failed.append(f"{name} {schedule} {rule.name}: {error!r}")
                print(self.failed[-1], flush=True)
                continue
            row["seconds"] = round(self.seconds() - began, 2)
            self.done.add((name, schedule, rule))
            self.rows.append(row)
            print(
                f"{self.seconds():6.1f} s {name:>7} {schedule:>4} {rule.density:.3f} "
                f"{rule.name:<50} {mean(row['psnr']):6.2f} dB recall {row['recall']:.3f} "
                f"density {row['density_kept']:.3f} ({row['seconds']:.2f} s)",
                flush=True,
            )
            self.write()

    def settled(self, name, schedule, rule):
        """The rule, at the density that another one has kept where it asks for that.

        Raises:
            LookupError: the other one was not sampled.
        """
        if not rule.as_dense_as:
            return rule
        asked = name, schedule, rule.as_dense_as, rule.density
        for row in self.rows:
            if (row["model"], row["schedule"], row["rule"], row["density"]) == asked:
                return rule.but(rule.name, density=row["density_kept"])
        raise LookupError(f"{rule.as_dense_as!r} was not sampled before.")

    def row(self, name, schedule, rule, dense, run) -> dict:
        held = {layer: round(x, 4) for layer, x in run.recall.items()}
        row = {
            "model": name,
            "schedule": schedule,
            "rule": rule.name,
            "density": rule.density,
            "settings": rule.settings(),
            "density_kept": round(run.density, 4),
            "recall": mean(list(held.values())) if held else float("nan"),
            "recall_by_layer": held,
            "searches": run.searches,
            "task": self.read(self.subject(name), run.video),
            **likeness(dense.to(self.device), run.video.to(self.device)),
        }
        if run.similar is not None:
            row["share_by_similarity"] = round(run.similar, 3)
        return row

    def write(self, wait: bool = False) -> None:
        def settled(row):
            task = row["task"]
            if not task or not hasattr(task[0], "result"):
                return row
            if wait or all(future.done() for future in task):
                row["task"] = [round(future.result(), 4) for future in task]
                return row
            return {**row, "task": None}

        result = {
            "what": "whole generations against the dense one of the same seed, one value per seed",
            "weights": self.weights,
            "rows": [settled(row) for row in self.rows],
            "dense": [settled(row) for row in self.dense.values()],
            "prompts": {name: subject.prompts for name, subject in self.subjects.items()},
            "layouts": {name: s.layout.describe() for name, s in self.subjects.items()},
            "failed": self.failed,
            "seconds": round(self.seconds(), 1),
            **facts(),
        }
        out = self.options.out
        out.parent.mkdir(parents=True, exist_ok=True)
        new = out.with_suffix(".new")
        new.write_text(json.dumps(result) + "\n")
        new.replace(out)  # at no time half of a file


def latent_size(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", required=True)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["tiny"])
    parser.add_argument("--jobs", nargs="+", default=["20:0.2:decide"])
    parser.add_argument("--out", type=Path, required=True, help="file of the results")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--latent", type=latent_size, help="TxHxW instead of the models' own")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long")
    parser.add_argument("--clips", type=Path, help="file of natural_clips.py, for natural")
    parser.add_argument("--task", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    lab = Lab(options)
    try:
        for job in options.jobs:
            schedule, density, group, *only = job.split(":")
            for name in only[0].split(",") if only else options.models:
                lab.job(name, schedule, float(density), GROUPS[group])
    finally:
        lab.write(wait=lab.readers is not None)
        if lab.readers:
            lab.readers.close()
    print(f"{len(lab.rows)} rows in {lab.seconds():.0f} s", flush=True)
    if lab.failed:
        sys.exit("\n".join(["Not sampled:", *lab.failed]))


if __name__ == "__main__":
    main()
