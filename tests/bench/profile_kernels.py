"""What the time of a Hopper kernel is made of: its clock and power, its units' floors, stages left out.

    python tests/bench/profile_kernels.py --out results.json

Every kernel runs back to back for a while, as it is and once more with its exponentials left out
(and wrong results), while nvidia-smi reads the clock and the power every 50 ms. `products` and
`exponentials` are the shares of the time that the tensor cores and the exponential units would need
at that clock if they never waited. Random bfloat16 data, 24 heads x 119,040 tokens x 128.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from sparse_attn.backends import hopper  # noqa: E402
from tests.bench.contest import Contest, mask_of, random_lists  # noqa: E402
from tests.bench.record import facts  # noqa: E402

HEADS, LENGTH, DIM = 24, 119040, 128
DENSITY = 0.2
# per multiprocessor and clock: H100's 989.4 bf16 TFLOP/s are 132 x 2,048 multiply-adds at 1,830
# MHz, eight bits twice that; 16 exponentials by the table of the CUDA C++ Programming Guide
PRODUCTS = {"bf16": 2048, "int8": 4096}
EXPONENTIALS = 16
READ = "clocks.sm,power.draw.instant,clocks_event_reasons.active"
POWER_CAP = 0x4
EXPONENTIAL = "gl.exp2(gl.fma("


class Meter:
    """Reads clock, power and what holds the clock back, while it is open."""

    def __enter__(self):
        self.samples = []
        command = [
            "nvidia-smi",
            f"--query-gpu={READ}",
            "--format=csv,noheader,nounits",
            "-lms",
            "50",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        return self

    def _read(self):
        for line in self.process.stdout:
            clock, watts, reasons = line.split(",")
            self.samples.append((time.perf_counter(), float(clock), float(watts), int(reasons, 16)))

    def __exit__(self, *_):
        self.process.terminate()
        self.reader.join()

    def between(self, begin: float, end: float) -> dict:
        found = [sample for sample in self.samples if begin <= sample[0] <= end]
        if not found:
            return {}
        _, clocks, watts, reasons = zip(*found, strict=True)
        return {
            "clock_mhz": median(clocks),
            "watts": round(median(watts)),
            "power_capped": round(mean(bool(bits & POWER_CAP) for bits in reasons), 2),
            "readings": len(found),
        }


@contextmanager
def without_exponentials(*modules: str):
    """Gluon modules of the pack, compiled from their source with every exponential of a score left out.

    `modules` come in the order in which they import each other.
    """
    left_out = 0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for module in modules:
            name = f"{hopper.__name__}.{module}"
            text = Path(importlib.import_module(name).__file__).read_text()
            left_out += text.count(EXPONENTIAL)
            path = Path(folder) / f"{module}.py"
            path.write_text(text.replace(EXPONENTIAL, "(gl.fma("))
            spec = importlib.util.spec_from_file_location(name, path)
            changed = importlib.util.module_from_spec(spec)
            stack.enter_context(mock.patch.dict(sys.modules, {name: changed}))
            stack.enter_context(mock.patch.object(hopper, module, changed))
            spec.loader.exec_module(changed)
        assert left_out, modules
        yield


def operation(name: str, *args, **options):
    """Run an operation of the kernels for Hopper as they are now."""
    module = importlib.import_module(f"{hopper.__name__}.{name}")
    return getattr(module, name)(*args, **options)


def measure(run, seconds: float, meter: Meter) -> dict:
    """Median milliseconds, and what the meter read once the clock had settled."""
    run()
    torch.cuda.synchronize()
    events, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds:
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        run()
        pair[1].record()
        torch.cuda.synchronize()
        events.append(pair)
    times = [a.elapsed_time(b) for a, b in events]
    settled = began + 0.4 * seconds
    time.sleep(0.1)
    return {
        "ms": round(median(times[len(times) // 3 :]), 2),
        "runs": len(times),
        **meter.between(settled, began + seconds),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="of every kernel and variant")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    contest = Contest(HEADS, LENGTH, DIM, torch.device("cuda"))
    q, k, v, scale = contest.q, contest.k, contest.v, contest.scale
    lse = operation("attention", q, k, v, scale=scale)[1]
    rows, columns = -(-LENGTH // 128), LENGTH // 64
    indices, _ = random_lists(HEADS, rows, columns, DENSITY, contest.device)
    sparse = {"scale": scale, "mask": mask_of(indices, columns, 128)}
    masses = {"block_q": 64, "block_k": 64, "scale": scale}
    of_masses, attention = ("block_masses",), ("attention",)
    eight = "quantised_ops", "quantised_attention"
    # modules, share of all pairs, products per pair by precision, run
    contestants = {
        "masses from a cached LSE": (
            of_masses, 1.0, {"bf16": 1}, lambda: operation("block_masses", q, k, lse, **masses)
        ),
        "masses from a cached LSE, int8": (
            of_masses, 1.0, {"int8": 1},
            lambda: operation("block_masses", q, k, lse, int8=True, **masses),
        ),
        "dense": (
            attention, 1.0, {"bf16": 2}, lambda: operation("attention", q, k, v, scale=scale)
        ),
        "dense, int8": (
            eight, 1.0, {"int8": 2},
            lambda: operation("quantised_attention", q, k, v, scale=scale),
        ),
        "sparse 128x64 at 0.2": (
            attention, DENSITY, {"bf16": 2}, lambda: operation("attention", q, k, v, **sparse)
        ),
        "sparse 128x64 at 0.2, int8": (
            eight, DENSITY, {"int8": 2},
            lambda: operation("quantised_attention", q, k, v, **sparse),
        ),
    }  # fmt: skip
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    result = {
        "what": "what the time of the kernels is made of, 24 heads x 119,040 tokens x 128",
        "rows": [],
        **facts(),
    }
    with Meter() as meter:
        for name, (modules, share, products, run) in contestants.items():
            row = {"name": name, **measure(run, options.seconds, meter)}
            with without_exponentials(*modules):
                row["without_exponentials"] = measure(run, options.seconds, meter)
            if "clock_mhz" in row:
                pairs = HEADS * LENGTH**2 * share / processors
                clocks = row["ms"] * row["clock_mhz"] * 1e3
                each = sum(n * DIM / PRODUCTS[precision] for precision, n in products.items())
                row["products"] = round(pairs * each / clocks, 3)
                row["exponentials"] = round(pairs / EXPONENTIALS / clocks, 3)
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
