"""Compares ways to run sparse steps on whole generations of the lab's models.

    python tests/lab/run_lab.py --comfyui PATH --weights FOLDER --models tiny wan128 joint \
        --jobs 20:0.2:decide 8:0.2:eight --out OUT/lab.json

A job is SCHEDULE:DENSITY:GROUP, or SCHEDULE:DENSITY:GROUP:MODEL,MODEL; see SCHEDULES and
`contestants.GROUPS`. Every contestant shares the dense steps and the search step of the dense
generation with the same seed, and is compared with that generation. The result is rewritten after
every row; `report.py` makes tables and plots of it.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TINY = ROOT / "tests" / "tiny_model"
PATHS = [str(ROOT), str(TINY), str(HERE)]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

import torch  # noqa: E402
from contestants import GROUPS  # noqa: E402
from metrics import Readers, likeness  # noqa: E402
from rule import SCHEDULES, first_search  # noqa: E402

from tests.bench.record import facts  # noqa: E402


def digest(name: str, folder: Path | None) -> str:
    """What tells a model's weights from earlier ones."""
    committed = name == "tiny"
    path = TINY / "tiny_wan.safetensors" if committed else folder / f"{name}.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


class Lab:
    def __init__(self, options):
        self.options = options
        self.began = time.perf_counter()
        self.readers = Readers() if options.task else None
        self.subjects, self.paths, self.weights = {}, {}, {}
        self.firsts = {}
        self.rows, self.dense, self.extras = [], [], {}
        self.done = set()

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def out_of_time(self) -> bool:
        return self.seconds() > self.options.seconds

    def subject(self, name):
        if name not in self.subjects:
            from generation import Subject, same_as_comfyui
            from models import MODELS

            options = self.options
            spec = MODELS[name]
            subject = Subject(spec, options.comfyui, options.weights, options.seeds)
            self.subjects[name] = subject
            self.weights[name] = digest(name, options.weights)
            print(f"{name}: {subject.layout.describe()}, {self.seconds():.0f} s", flush=True)
            if options.check:
                apart = same_as_comfyui(subject, 4)
                print(f"{name}: at most {apart:.1e} off ComfyUI's own sampling", flush=True)
        return self.subjects[name]

    def expect(self, schedule, rules, names):
        """Have the dense generation look at every step at which one of the rules searches first."""
        for name in names:
            firsts = self.firsts.setdefault((name, schedule), set())
            firsts |= {first_search(rule, schedule)[1] for rule in rules}

    def path(self, name, schedule):
        """The dense generation, with what it saw at the steps that `expect` named."""
        from generation import Path as DensePath

        if (name, schedule) not in self.paths:
            subject = self.subject(name)
            path = DensePath(subject, SCHEDULES[schedule][0], self.firsts[name, schedule])
            self.paths[name, schedule] = path
            task = self.read(subject, path.video)
            self.dense.append({"model": name, "schedule": schedule, "task": task})
        return self.paths[name, schedule]

    def read(self, subject, videos):
        return self.readers.read(subject.scenes, videos) if self.readers else None

    def job(self, name, schedule, density, rules, record=False):
        rules = [r if r.dense else r.but(r.name, density=density) for r in rules]
        rules = [r for r in rules if (name, schedule, r) not in self.done]
        path = None
        for rule in rules:
            if self.out_of_time():
                return
            if path is None:
                path = self.path(name, schedule)
            began = self.seconds()
            try:
                videos, run = path.run(rule, first_search(rule, schedule)[1], record)
                row = self.row(name, schedule, rule, path, videos, run)
            except Exception as error:
                # one contestant must not cost the others their turn
                print(f"{name} {schedule} {rule.name}: {error}", flush=True)
                continue
            row["seconds"] = round(self.seconds() - began, 2)
            self.done.add((name, schedule, rule))
            self.rows.append(row)
            psnr = sum(row["psnr"]) / len(row["psnr"])
            print(
                f"{self.seconds():6.1f} s {name:>7} {schedule:>4} {rule.density:.3f} "
                f"{rule.name:<50} {psnr:6.2f} dB recall {row['recall']:.3f} "
                f"density {row['density_kept']:.3f} ({row['seconds']:.2f} s)",
                flush=True,
            )
            self.write()

    def row(self, name, schedule, rule, path, videos, run) -> dict:
        held = {layer: round(float(x), 4) for layer, x in sorted(run.held.items())}
        row = {
            "model": name,
            "schedule": schedule,
            "rule": rule.name,
            "density": rule.density,
            "settings": {
                key: value
                for key, value in vars(rule).items()
                if key not in ("name", "density", "notes") and value != getattr(type(rule)(""), key)
            },
            "density_kept": round(run.density(), 4),
            "recall": sum(held.values()) / len(held) if held else float("nan"),
            "recall_by_layer": held,
            "searches": run.searches,
            "task": self.read(path.subject, videos),
            **likeness(path.video, videos),
        }
        if run.first_order:
            row["share_in_clusters"] = round(float(sum(run.first_order) / len(run.first_order)), 3)
        if run.recalls:
            row["recall_by_step_and_layer"] = {
                step: [round(float(x), 4) for x in layers.values()]
                for step, layers in run.recalls.items()
            }
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
            "dense": [settled(row) for row in self.dense],
            "prompts": {name: subject.prompts for name, subject in self.subjects.items()},
            "layouts": {name: s.layout.describe() for name, s in self.subjects.items()},
            "extra_ms": self.extras,
            "seconds": round(self.seconds(), 1),
            **facts(),
        }
        out = self.options.out
        out.parent.mkdir(parents=True, exist_ok=True)
        new = out.with_suffix(".new")
        new.write_text(json.dumps(result) + "\n")
        new.replace(out)  # at no time half of a file


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", required=True)
    parser.add_argument("--weights", type=Path, help="folder of the models that are not committed")
    parser.add_argument("--models", nargs="+", default=["tiny"])
    parser.add_argument("--jobs", nargs="+", default=["20:0.2:decide"])
    parser.add_argument("--out", type=Path, required=True, help="file of the results")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long")
    parser.add_argument("--task", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--record", nargs="*", default=[], help="groups whose recall is sampled")
    parser.add_argument("--check", action="store_true", help="compare with ComfyUI's own sampler")
    parser.add_argument("--costs", action="store_true", help="measure what tails add to a call")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    lab = Lab(options)
    jobs = []
    for job in options.jobs:
        schedule, density, group, *only = job.split(":")
        names = only[0].split(",") if only else options.models
        jobs.append((schedule, float(density), group, names))
        lab.expect(schedule, GROUPS[group], names)
    try:
        for number, (schedule, density, group, names) in enumerate(jobs):
            for name in names:
                lab.job(name, schedule, density, GROUPS[group], group in options.record)
            if number == 0 and options.costs:
                import cost

                lab.extras = {key: round(ms, 3) for key, ms in cost.measure().items()}
                print(lab.extras, flush=True)
    finally:
        lab.write(wait=lab.readers is not None)
        if lab.readers:
            lab.readers.close()
    print(f"{len(lab.rows)} rows in {lab.seconds():.0f} s", flush=True)


if __name__ == "__main__":
    main()
