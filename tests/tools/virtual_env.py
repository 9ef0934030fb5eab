"""Makes the virtual environment, which may borrow the packages of the interpreter that runs us."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .console import ExpectedFailure, size, step
from .pip_runner import Pip

# measured size of a finished environment on Linux, and the room pip needs while it unpacks
ROOM_CPU = 4e9
ROOM_CUDA = 12e9
BORROWED = "adaspa_borrowed.pth"


def venv_python(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def venv_name(version: tuple[int, ...], gpu: bool, borrowed_prefix: str | None) -> str:
    """A folder name per Python version and kind of torch, and per interpreter whose torch it borrows."""
    name = f"py{version[0]}{version[1]}-{'gpu' if gpu else 'cpu'}"
    if borrowed_prefix is None:
        return name
    return f"{name}-{hashlib.sha256(borrowed_prefix.encode()).hexdigest()[:8]}"


def require_room(home: Path, cuda: bool) -> None:
    needed = ROOM_CUDA if cuda else ROOM_CPU
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free < needed:
        raise ExpectedFailure(
            f"About {size(needed)} are needed in {home} and {size(free)} are free; make room or set"
            " ADASPA_HOME to a folder on a larger disk."
        )


def make_venv(folder: Path, borrow: bool, log: Path) -> Path:
    python = venv_python(folder)
    if not (python.exists() and Pip(str(python), log).version()):
        with step(f"Creating {folder.name} with Python {sys.version.split()[0]}"):
            shutil.rmtree(folder, ignore_errors=True)
            _create_venv(folder, log)
    if borrow:
        site = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        lines = [f"import site; site.addsitedir({p!r})" for p in site]
        target = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        Path(target, BORROWED).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return python


def _create_venv(folder: Path, log: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode == 0:
        return
    with open(log, "a", encoding="utf-8") as file:
        file.write(made.stdout + made.stderr)
    # Debian keeps ensurepip in a package of its own; a pip that is there can fill in
    bare = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)],
        capture_output=True,
        check=False,
    )
    if bare.returncode == 0 and importlib.util.find_spec("pip"):
        args = ["--python", str(venv_python(folder)), "install", "pip"]
        if Pip(sys.executable, log).attempt(args)[0] == 0:
            return
    shutil.rmtree(folder, ignore_errors=True)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    raise ExpectedFailure(
        "This Python cannot create virtual environments; install its venv part (on Debian and"
        f" Ubuntu: sudo apt install python{version}-venv) and start again."
    )
