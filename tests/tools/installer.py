"""Installs packages with uv where it can, with pip elsewhere, and explains their failures.

Both read the same locked requirements, and uv is given pip's whole configuration. What asks an
index for the first time, uv itself and torch, comes through pip's public commands.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import pins, pip_config, requirements
from .console import ExpectedFailure, Step, say

SHOW_FROM_BYTES = 5e6
PIP_VARIABLES = {
    "COLUMNS": "1000",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "PIP_PROGRESS_BAR": "off",
    "PIP_REQUIRE_VIRTUALENV": "0",
    "PIP_USER": "0",
    "PYTHONIOENCODING": "utf-8",
}
# pip: "Downloading NAME (1.2 MB)" or "Using cached ..."; uv: "Downloading NAME (1.2MiB)"
_DOWNLOADING = re.compile(r"(?:Downloading|Using cached) (\S+) \(([\d.]+) ?([kKMG]?i?B)\)")
_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

# in the output of pip or uv -> what happened and what to do next
_NO_MATCH = (
    r"(?:No matching distribution found for|Because there is no version of) +(\S+)|"
    r"Because (\S+) (?:was not found|has no usable wheels)"
)
_CAUSES = {
    r"No space left on device|Errno 28|not enough space on the disk": (
        "The disk is full; free some space and start again, it goes on where it stopped."
    ),
    r"CERTIFICATE_VERIFY_FAILED|SSLError|invalid peer certificate": (
        "The package index's certificate is not trusted here; set pip's `cert` to your certificate"
        " file, then start again."
    ),
    r"NewConnectionError|Failed to establish a new connection|name resolution|getaddrinfo failed|"
    r"ConnectTimeoutError|Read ?[Tt]imed ?[Oo]ut|ConnectionResetError|ProxyError|"
    r"Network is unreachable|Connection refused|error sending request|operation timed out": (
        "The package index cannot be reached; check the network or pip's proxy and index settings,"
        " then start again."
    ),
    r"Permission denied|Access is denied": (
        "A file could not be written; close programs that use the folder or set ADASPA_HOME to a"
        " folder you may write to, then start again."
    ),
    r"DO NOT MATCH THE HASHES|Hash mismatch for": (
        "The package index sent a file that is not the one this project knows; check which index"
        " pip uses, then start again."
    ),
    _NO_MATCH: (
        "The package index has no {} for this Python and system; check pip's index settings, or"
        " start again with another Python from 3.10 to 3.13 (--python PATH)."
    ),
    r"([^\n]*\S)\s*\Z": "Installing failed with: {}; its whole output is in the set-up log.",
}


def explain(output: str) -> str:
    """One sentence for a failed run of pip or uv: what happened and what to do next."""
    for mark, sentence in _CAUSES.items():
        found = re.search(mark, output)
        if found:
            return sentence.format(*filter(None, found.groups()))
    return "Installing failed without a word; see the set-up log."


def download_in(line: str) -> tuple[str, float] | None:
    """Read a line that announces a download: name and bytes; metadata files do not count."""
    found = _DOWNLOADING.search(line)
    if not found or found.group(1).endswith(".metadata"):
        return None
    return found.group(1), float(found.group(2)) * _UNITS[found.group(3)]


def progress(step: Step) -> Callable[[str], None]:
    """Shows what pip or uv prints: large downloads as lines, small ones to the heartbeat."""

    def show(line: str) -> None:
        name, num_bytes = download_in(line) or ("", 0)
        if num_bytes >= SHOW_FROM_BYTES:
            step.note(line.strip())
        elif name:
            step.doing = f"downloading {name}"

    return show


def run_logged(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str],
    on_line: Callable[[str], None] = lambda line: None,
) -> tuple[int, str]:
    """Run a program, with all it prints in `log`; returns its exit code and output."""
    lines: list[str] = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n")
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, encoding="utf-8", errors="replace", env=env,
        )  # fmt: skip
        try:
            for line in process.stdout or ():
                file.write(line)
                lines.append(line)
                on_line(line)
            return process.wait(), "".join(lines)
        except BaseException:
            process.terminate()
            process.wait()
            raise


class Installer:
    """pip as the running Python is configured, and a uv that sees what this pip sees."""

    def __init__(self, home: Path):
        self.home = home
        self.log = home / "setup.log"
        self._pip = [str(self._python_with_pip()), "-m", "pip"]
        self.config = pip_config.parse(self.pip(["config", "list"]))
        self.uv = self._find_uv()

    def attempt(self, args: Sequence[str], on_line=lambda line: None) -> tuple[int, str]:
        """Run `pip ARGS`; returns its exit code and output."""
        env = {**os.environ, **PIP_VARIABLES}
        # pip would count what PYTHONPATH adds as installed
        env.pop("PYTHONPATH", None)
        return run_logged([*self._pip, *args], self.log, env, on_line)

    def pip(self, args: Sequence[str], on_line=lambda line: None) -> str:
        """Run `pip ARGS` and return its output; fail with one sentence."""
        return self._checked(self.attempt(args, on_line))

    def _checked(self, ended: tuple[int, str]) -> str:
        code, output = ended
        if code:
            raise ExpectedFailure(f"{explain(output)} (log: {self.log})")
        return output

    def install(self, python: Path | str, args: Sequence[str], step: Step) -> None:
        """Install wheels for `python`, with arguments that uv and pip share.

        Nothing is ever built, so no package's code runs before it is there with the right hash.
        """
        args = ["install", "--only-binary", ":all:", *args]
        if self.uv is None:
            self.pip(["--python", str(python), *args, "--no-compile"], progress(step))
            return
        command = [self.uv, "pip", *args, "--python", str(python), *pip_config.for_uv(self.config)]
        env = pip_config.uv_environment(self.config)
        self._checked(run_logged(command, self.log, env, progress(step)))

    def install_beside_torch(self, python: Path, wanted: Sequence[str], step: Step) -> None:
        """Install requirements that are not locked; torch and its family stay what they are."""
        more = []
        if self.uv:
            # uv does not see borrowed packages, so it is not to look for these
            file = self.home / "beside_torch.txt"
            file.write_text("\n".join([*pins.TORCH_FAMILY, "triton"]) + "\n", encoding="utf-8")
            more = ["--excludes", str(file)]
        self.install(python, [*more, *wanted], step)

    def _python_with_pip(self) -> Path:
        """The running Python, whose pip's configuration counts; else one of our own."""
        if importlib.util.find_spec("pip"):
            return Path(sys.executable)
        folder = self.home / "pip"
        if not python_of(folder).exists():
            make_venv(folder, self.log, "with_pip")
        return python_of(folder)

    def _find_uv(self) -> str | None:
        """The user's uv if it is of the tested series, else our own; None where there is none."""
        (release,) = requirements.locked("uv")
        folder = self.home / f"uv-{release.version}"
        ours = ("bin/uv", "bin/uv.exe", "Scripts/uv.exe")
        for program in (shutil.which("uv"), *(str(folder / name) for name in ours)):
            if program and _uv_series(program) == pins.UV_SERIES:
                return program
        shutil.rmtree(folder, ignore_errors=True)
        args = ["install", "--only-binary", ":all:", "--no-deps", "--target", str(folder)]
        ended = self.attempt([*args, "-r", str(requirements.LOCKED / "uv.txt")])
        if ended[0] and re.search(_NO_MATCH, ended[1]):
            say("  There is no uv for this system; pip installs instead, which takes longer.")
            return None
        self._checked(ended)
        return next(str(folder / name) for name in ours if (folder / name).is_file())


def _uv_series(program: str) -> str | None:
    """MAJOR.MINOR of a uv, or None if it does not run here."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    found = re.match(r"uv (\d+\.\d+)\.", said.stdout)
    return found.group(1) if found else None


def python_of(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(folder: Path, log: Path, kind: str = "without_pip") -> None:
    """Make a virtual environment of the running Python afresh."""
    shutil.rmtree(folder, ignore_errors=True)
    more = ["--without-pip"] if kind == "without_pip" else []
    command = [sys.executable, "-m", "venv", *more, str(folder)]
    if run_logged(command, log, os.environ)[0]:
        shutil.rmtree(folder, ignore_errors=True)
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise ExpectedFailure(
            "This Python has no pip or cannot create virtual environments; install what is missing"
            f" (on Debian and Ubuntu: sudo apt install python3-pip python{version}-venv) and start"
            " again."
        )
