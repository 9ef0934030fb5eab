"""The archive that users get from the registry: what git tracks, without what .comfyignore names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def files(root: Path = ROOT) -> list[str]:
    """Paths in the archive, as comfy-cli's `node publish` chooses them.

    `.comfyignore` has the patterns of a .gitignore; `[tool.comfy] includes` is not used here.
    """
    listed = ["git", "ls-files", "-z", "--cached"]
    ignored = [*listed, "--ignored", "--exclude-from=.comfyignore"]
    return sorted(_run(listed, root) - _run(ignored, root))


def unpack(target: Path, root: Path = ROOT) -> Path:
    """Lay out what a user finds in `custom_nodes` once the archive is unpacked; returns `target`."""
    for name in files(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target / name)
    return target


def _run(command: list[str], root: Path) -> set[str]:
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return {name for name in run.stdout.split("\0") if name}
