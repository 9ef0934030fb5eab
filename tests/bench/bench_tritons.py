"""Every tile of the table, compiled for every NVIDIA architecture by several releases of Triton.

Needs no GPU. Says what spills and which products lose their tensor cores. A release is a folder that
`pip install --no-deps --target FOLDER triton==...` has filled:

    python tests/bench/bench_tritons.py FOLDER ... --out tests/bench/results/tritons.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.backends.test_tiles import ARCHS, NO_PRODUCTS, STACK_LIMIT  # noqa: E402

COMPILE = """
import json, sys
from tests.backends import test_tiles
arch, *names = sys.argv[1:]
launch = test_tiles.Compiled.__getitem__

def launch_some(self, grid):
    wanted = not names or self.kernel.fn.__name__.strip("_") in names
    return launch(self, grid) if wanted else lambda *args, **kwargs: None

test_tiles.Compiled.__getitem__ = launch_some
print(json.dumps(test_tiles.compile_all(int(arch), every=True)))
"""


def ask(folder: Path, arch: int, names: list[str]) -> dict:
    """What kernels of one architecture take of a program's resources, by one release."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
        run = subprocess.run(
            [sys.executable, "-c", COMPILE, str(arch), *names],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    seconds = round(time.monotonic() - start, 1)
    found = {"arch": arch, "commit": commit(), "seconds": seconds}
    if run.returncode:
        return {**found, "failed": run.stderr.strip().splitlines()[-1:]}
    kernels = json.loads(run.stdout.splitlines()[-1])
    for kernel in kernels:
        # tells it from others of that process only
        del kernel["key"]
    return {**found, "kernels": sorted(kernels, key=lambda kernel: str(kernel.values()))}


def faults(kernels: list[dict]) -> list[str]:
    """What of one architecture spills or has lost its tensor cores."""
    said = []
    for kernel in kernels:
        if kernel["stack"] > STACK_LIMIT:
            said.append(f"{kernel['kernel']}: {kernel['stack']} bytes of stack")
        if not kernel["tensor_core"] and kernel["kernel"] not in NO_PRODUCTS:
            said.append(f"{kernel['kernel']}: no tensor-core instruction")
    return said


@cache
def commit() -> str:
    """Of the kernels that are compiled."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short=8", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def version_of(folder: Path) -> str:
    """The release that a folder holds."""
    (found,) = folder.glob("triton*.dist-info")
    return found.name.split("-")[1].removesuffix(".dist")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--archs", nargs="+", type=int, default=list(ARCHS))
    parser.add_argument("--at-a-time", type=int, default=1)
    parser.add_argument("--kernels", nargs="+", default=[], help="those that have changed, or all")
    parser.add_argument("--out", type=Path, required=True, help="what it holds of others stays")
    args = parser.parse_args()
    releases = json.loads(args.out.read_text())["releases"] if args.out.exists() else {}
    with ThreadPoolExecutor(args.at_a_time) as pool:
        asked = [
            (version_of(folder), pool.submit(ask, folder.resolve(), arch, args.kernels))
            for folder in args.folders
            for arch in args.archs
        ]
        for version, answer in asked:
            found = merged(releases.setdefault(version, []), answer.result())
            print(version, found["arch"], found["seconds"], found.get("failed", found["faults"]))
            write(args.out, releases)


def merged(known: list[dict], found: dict) -> dict:
    """Put an answer among those of its release, in the place of what it is about."""
    for before in [x for x in known if x["arch"] == found["arch"]]:
        known.remove(before)
        names = {kernel["kernel"] for kernel in found.get("kernels", ())}
        kept = [x for x in before.get("kernels", ()) if x["kernel"] not in names]
        found["kernels"] = kept + found.get("kernels", [])
        found["seconds"] = max(found["seconds"], before["seconds"])
    found["faults"] = faults(found.get("kernels", []))
    known.append(found)
    known.sort(key=lambda x: x["arch"])
    return found


def write(out: Path, releases: dict) -> None:
    """Keep what is known so far."""
    import torch

    out.write_text(
        json.dumps(
            {
                "what": "resources of every kernel, compiled without its card",
                "hardware": "none",
                "system": f"{platform.system()} {platform.machine()}",
                "python": platform.python_version(),
                "torch": torch.__version__,
                "date": datetime.now(timezone.utc).date().isoformat(),
                "command": "python tests/bench/bench_tritons.py FOLDER ... --out FILE",
                "releases": releases,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
