"""What a prepared environment is, where it lies, and when it can be reused."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from . import comfyui_source, pins, requirements

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(__file__).resolve().parent
# files that decide what a prepared environment contains, beside the locked requirements
RECIPE = ("comfyui_source", "environment", "pins", "probe", "requirements", "torch_build")


@dataclass(frozen=True)
class Environment:
    """A prepared interpreter.

    Args:
        device: cuda, xpu, mps or cpu.
        comfyui: ComfyUI's root, or None if the command needs none.
    """

    python: str
    device: str
    torch: str
    comfyui: str | None = None
    home: str = ""

    def variables(self, env: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The process environment in which commands run."""
        paths = [str(ROOT), str(ROOT / "tests"), *env.get("PYTHONPATH", "").split(os.pathsep)]
        more = {
            "ADASPA_DEVICE": self.device,
            "ADASPA_HOME": self.home,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(p for p in paths if p)),
        }
        if self.comfyui:
            more["COMFYUI_PATH"] = self.comfyui
        return {**env, **more}


def home_folder(root: Path, env: Mapping[str, str] = os.environ) -> Path:
    """Where prepared things lie: ADASPA_HOME, else `.adaspa` in the project, else a user cache."""
    if env.get("ADASPA_HOME"):
        return Path(env["ADASPA_HOME"]).expanduser().resolve()
    inside = root / ".adaspa"
    try:
        inside.mkdir(exist_ok=True)
        if os.access(inside, os.W_OK):
            return inside
    except OSError:
        pass
    return Path.home() / ".cache" / "adaspa"


def installed_here() -> dict[str, str]:
    """Every project the running interpreter sees, with its version."""
    found: dict[str, str] = {}
    for dist in importlib.metadata.distributions():
        if name := dist.metadata["Name"]:
            found.setdefault(requirements.canonical(name), dist.version)
    return found


def fingerprint(gpu: bool, own_comfyui: Path | None, torch: str | None) -> dict:
    """Everything on which a prepared environment depends; equal means it can be reused.

    Args:
        torch: the build that was asked for by name.
    """
    recipe = [TOOLS / f"{name}.py" for name in RECIPE] + sorted(requirements.LOCKED.glob("*.txt"))
    own_torch = importlib.util.find_spec("torch") is not None
    listed = {
        "recipe": [file.read_text(encoding="utf-8") for file in recipe],
        "packages": installed_here() if own_torch else None,
        "requirements": comfyui_source.needs(own_comfyui) if own_comfyui else None,
    }
    return {
        "python": sys.version,
        "prefix": sys.prefix,
        "gpu": gpu,
        "torch": torch,
        "comfyui": str(own_comfyui) if own_comfyui else pins.DEFAULT_COMFYUI,
        **{
            name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
            for name, value in listed.items()
        },
    }


def read_stamp(file: Path, expected: dict) -> Environment | None:
    """The environment a stamp vouches for, or None if it is missing, of another make, or gone."""
    try:
        stamp = json.loads(file.read_text(encoding="utf-8"))
        env = Environment(**stamp["environment"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    there = Path(env.python).exists() and (
        env.comfyui is None or comfyui_source.is_comfyui(Path(env.comfyui))
    )
    return env if there and stamp.get("fingerprint") == expected else None


def write_stamp(file: Path, expected: dict, env: Environment) -> None:
    """Vouch for an environment; a reader sees the whole stamp or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    text = json.dumps({"fingerprint": expected, "environment": asdict(env)}, indent=1)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
