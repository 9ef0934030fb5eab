"""Shows the pack, node folders and model files to a server, without touching the originals."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACK_NAME = "adaspa"
NOT_PART_OF_THE_PACK = {"tests", "run.py", "demo_output", "__pycache__", "node_modules"}


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` show `source`; a copy on Windows, where links need special rights."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.name != "nt":
        target.symlink_to(source)
    elif source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    else:
        shutil.copy2(source, target)


def link_pack(custom_nodes: Path, root: Path = ROOT) -> Path:
    """Show the pack in `custom_nodes` as users install it: without hidden files and tests.

    The folder is real and its entries are links, since a link to the root would contain itself
    when the base directory lies inside the project.
    """
    target = custom_nodes / PACK_NAME
    if target.is_symlink():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for entry in sorted(root.iterdir()):
        if not entry.name.startswith(".") and entry.name not in NOT_PART_OF_THE_PACK:
            link_or_copy(entry, target / entry.name)
    return target
