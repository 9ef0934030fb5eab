"""Which torch to use: the one at hand, the pinned one in the build that pip takes, or a named one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import pins, requirements
from .console import ExpectedFailure, Step, say
from .index_file import sha256_of
from .installer import Installer, download_in, progress

NO_CPU_BUILD = """\
    pip takes a torch with CUDA, about 3 GB to download with its libraries. To avoid that, stop with
    Ctrl-C and start again with --python and a Python that has torch, or name a CPU build in
    ADASPA_TORCH."""
NO_CUDA_BUILD = """\
    The package index has no torch with CUDA for this system, so the GPU stays unused. To use it,
    start run.py with the Python of your ComfyUI."""


def has_nvidia_gpu() -> bool:
    """Say whether a working NVIDIA driver lists a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return sys.platform == "linux" and Path("/dev/nvidia0").exists()
    try:
        run = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0 and "GPU " in run.stdout


def usable(facts: dict, gpu: bool) -> bool:
    """Whether a probed torch will do: it works, and it reaches the NVIDIA GPU if there is one."""
    return facts.get("device") is not None and (not gpu or facts["device"] == "cuda")


def matching_family(torch: str) -> dict[str, str]:
    """What to ask for beside a torch of that version: project to requirement.

    torchvision 0.(N + 15) goes with torch 2.N; torchaudio's releases ended before torch's.
    """
    found = re.match(r"2\.(\d+)\.", torch)
    vision, audio = (
        (f"==0.{int(found[1]) + 15}.*", f"<2.{int(found[1]) + 1}") if found else ("", "")
    )
    return {"torchvision": f"torchvision{vision}", "torchaudio": f"torchaudio{audio}"}


def known_hashes() -> set[str]:
    """SHA-256 of every build of the pinned torch that we know."""
    (release,) = [p for p in requirements.locked("packages") if p.name == "torch"]
    return release.hashes | set(pins.TORCH_CPU_BUILDS.values())


def has_cuda(wheel: str, platform: str = sys.platform) -> bool:
    """Tell by its name: the index's own Linux builds have CUDA; elsewhere, or marked, they say so."""
    version = wheel.split("-")[1]
    return "+cu" in version if "+" in version else platform == "linux"


@dataclass(frozen=True)
class Build:
    """A wheel of torch on this disk; one the user named need not have a hash that we know."""

    file: Path
    sha256: str
    named: bool

    @property
    def version(self) -> str:
        return self.file.name.split("-")[1]

    @property
    def has_cuda(self) -> bool:
        return has_cuda(self.file.name)


def wanted(gpu: bool, env: Mapping[str, str], platform: str = sys.platform) -> str:
    """What to ask pip for: ADASPA_TORCH, else the pinned release in the build that pip prefers.

    On a GPU `===` leaves out builds marked as of another make, such as `+cpu`: Linux's own has CUDA.
    """
    exactly = "===" if gpu and platform == "linux" else "=="
    return env.get("ADASPA_TORCH") or f"torch{exactly}{pins.TORCH}"


def fetch(installer: Installer, gpu: bool, env: Mapping[str, str], step: Step) -> Build:
    """Let pip download the torch it would install, and check it; nothing of it runs meanwhile."""
    folder = installer.home / "downloads" / "torch"
    shutil.rmtree(folder, ignore_errors=True)

    def show(line: str) -> None:
        download = download_in(line)
        if download and has_cuda(download[0]) and not gpu:
            say(NO_CPU_BUILD)
        progress(step)(line)

    args = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    installer.pip([*args, wanted(gpu, env)], show)
    file = next(folder.glob("*.whl"))
    build = Build(file, sha256_of(file), named=bool(env.get("ADASPA_TORCH")))
    if not build.named and build.sha256 not in known_hashes():
        shutil.rmtree(folder)
        raise ExpectedFailure(
            f"pip takes {file.name}, a build of torch whose hash this project does not know; set"
            f" ADASPA_TORCH=torch=={build.version} to use it all the same."
        )
    if gpu and not build.has_cuda:
        say(NO_CUDA_BUILD)
    return build
