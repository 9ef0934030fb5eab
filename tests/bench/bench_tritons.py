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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.backends.test_tiles import ARCHS, NO_PRODUCTS, STACK_LIMIT  # noqa: E402

COMPILE = """
import json, sys
from tests.backends import test_tiles
arch = int(sys.argv[1])
if sys.argv[2] == "all":
    found = test_tiles.compile_all(arch, every=True)
else:
    stands = test_tiles.compile_only(arch)
    test_tiles.order_and_select(test_tiles.tensors(1, 2, 300, 128))
    found = test_tiles.resources(stands)
print(json.dumps(found))
"""


def ask(folder: Path, arch: int, part: str) -> dict:
    """What the kernels of one architecture take of a program's resources, by one release."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
        run = subprocess.run(
            [sys.executable, "-c", COMPILE, str(arch), part],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    found = {"arch": arch, "seconds": round(time.monotonic() - start, 1)}
    if run.returncode:
        return {**found, "failed": run.stderr.strip().splitlines()[-1:]}
    kernels = json.loads(run.stdout.splitlines()[-1])
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


def version_of(folder: Path) -> str:
    """The release that a folder holds."""
    (found,) = folder.glob("triton*.dist-info")
    return found.name.split("-")[1].removesuffix(".dist")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--archs", nargs="+", type=int, default=list(ARCHS))
    parser.add_argument("--at-a-time", type=int, default=1)
    parser.add_argument("--part", choices=("all", "order"), default="all", help="which kernels")
    parser.add_argument("--out", type=Path, required=True, help="what it holds of others stays")
    args = parser.parse_args()
    releases = json.loads(args.out.read_text())["releases"] if args.out.exists() else {}
    with ThreadPoolExecutor(args.at_a_time) as pool:
        asked = [
            (version_of(folder), pool.submit(ask, folder.resolve(), arch, args.part))
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
