"""What stands beside every measured figure: hardware, versions, date and the command."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def facts() -> dict:
    """Hardware, versions, date and a command that can be repeated elsewhere."""
    cuda = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    versions = {}
    for name in ("torch", "triton", "comfy-kitchen"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "hardware": hardware if cuda else f"{hardware}, {os.cpu_count()} cores",
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(_portable(word) for word in sys.argv),
    }


def keep(path: Path, result: dict):
    """Write what has been measured so far."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def _portable(word: str) -> str:
    """Leave out where this machine keeps its files."""
    path = Path(word)
    if path.is_absolute():
        inside = path.is_relative_to(ROOT)
        return path.relative_to(ROOT).as_posix() if inside else path.name
    return f'"{word}"' if " " in word else word
