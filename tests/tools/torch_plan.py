"""Which torch to use: the one at hand, or which one to install."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from . import pins
from .console import Step, say, size
from .pip_runner import Pip

# 2.13.0 to 2.15.0 for Linux, with the CUDA libraries they need
CUDA_DOWNLOAD_GUESS = "about 3 GB"


def has_nvidia_gpu() -> bool:
    """Say whether a working NVIDIA driver lists a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return sys.platform == "linux" and Path("/dev/nvidia0").exists()
    try:
        run = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0 and "GPU " in run.stdout


def usable(facts: dict, gpu: bool) -> bool:
    """Whether a probed torch will do: it works, and it reaches the NVIDIA GPU if there is one."""
    return facts.get("device") is not None and (not gpu or facts["device"] == "cuda")


def candidates(gpu: bool, available: list[str]) -> list[str]:
    """Requirements to try, best first.

    Args:
        gpu: whether an NVIDIA GPU is there.
        available: versions the index offers, newest first; a CPU build may be marked `+cpu`.
    """
    pinned = f"torch=={pins.TORCH}"
    if gpu:
        return [pinned, "torch"]
    marked = [f"torch=={v}" for v in available if v.endswith("+cpu")]
    tried = [pinned, *(m for m in marked if m != f"{pinned}+cpu"), "torch"]
    return list(dict.fromkeys(tried))


def is_cuda_build(item: dict, platform: str = sys.platform) -> bool:
    """Whether a torch on the index is a build with CUDA.

    Args:
        item: `version` and `requires`, which is None if the index does not tell. Off Linux the
            index carries builds without CUDA.
    """
    if "+" in item["version"]:
        return "+cu" in item["version"]
    if platform != "linux":
        return False
    if item["requires"] is None:
        return True
    return any(re.match(r"(nvidia-|cuda-)", need) for need in item["requires"])


def choose(found: list[dict], gpu: bool, platform: str = sys.platform):
    """Pick from what the index has: the first that suits the machine, else the first there is.

    Returns:
        (item, whether it suits), or None.
    """
    for item in found:
        if is_cuda_build(item, platform) == gpu:
            return item, True
    return (found[0], False) if found else None


def install(pip: Pip, gpu: bool, step: Step) -> None:
    """Install the torch that suits this machine, saying what a large download costs."""
    first, *others = candidates(gpu, [])
    answer = pip.ask_index("look_up", first) or {"items": [], "versions": []}
    found = [item for item in answer["items"] if item]
    chosen = choose(found, gpu)
    if not (chosen and chosen[1]):
        others = [c for c in candidates(gpu, answer["versions"]) if c != first]
        answer = pip.ask_index("look_up", *others) or {"items": []}
        chosen = choose(found + [item for item in answer["items"] if item], gpu)
    requirement = first
    if chosen:
        item, suits = chosen
        requirement = f"torch=={item['version']}"
        _announce(pip, requirement, is_cuda_build(item), gpu, suits)
    pip.run(["install", "--no-compile", requirement], step)


def _announce(pip: Pip, requirement: str, cuda: bool, gpu: bool, suits: bool) -> None:
    total = pip.ask_index("download_size", requirement)
    how_much = size(total) if total else (CUDA_DOWNLOAD_GUESS if cuda else "a few hundred MB")
    say(f"    {requirement}, {'with CUDA' if cuda else 'CPU build'}: {how_much} to download")
    if not gpu and not suits:
        say(
            "    The package index has no CPU build of torch for this Python. To avoid the large"
            " download, stop\n    with Ctrl-C and start again with --python and a Python that has"
            " torch, or one with a CPU build."
        )
    if gpu and not suits:
        say(
            "    The package index has no torch with CUDA for this system, so the GPU stays"
            " unused. To use it,\n    start run.py with the Python of your ComfyUI."
        )
