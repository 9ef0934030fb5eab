"""Runs pip with the user's own configuration, shows what it does, and explains its failures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from .console import ExpectedFailure, Step

INDEX = Path(__file__).resolve().with_name("pip_index.py")
SHOW_FROM_BYTES = 5e6
_DOWNLOADING = re.compile(r"Downloading (\S+?)(?:\.metadata)? \(([\d.]+) ([kMG]?B)\)")
_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}

# text in pip's output -> what happened and what to do next
_CAUSES = (
    (
        ("No space left on device", "Errno 28", "not enough space on the disk"),
        "The disk is full; free some space and start again, it goes on where it stopped.",
    ),
    (
        (
            "NewConnectionError",
            "Failed to establish a new connection",
            "Temporary failure in name resolution",
            "getaddrinfo failed",
            "ConnectTimeoutError",
            "ReadTimeoutError",
            "Read timed out",
            "ConnectionResetError",
            "ProxyError",
            "Network is unreachable",
            "Connection refused",
        ),
        "The package index cannot be reached; check the network or pip's proxy and index settings,"
        " then start again.",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED", "SSLError"),
        "The package index's certificate is not trusted here; set pip's `cert` to your"
        " certificate file, then start again.",
    ),
    (
        ("Permission denied", "Access is denied"),
        "A file could not be written; close programs that use the folder or set ADASPA_HOME to a"
        " folder you may write to, then start again.",
    ),
)
_NO_MATCH = re.compile(r"No matching distribution found for (\S+)")


def cause(output: str) -> str | None:
    """One sentence for a failure that has nothing to do with what was asked for."""
    for marks, sentence in _CAUSES:
        if any(mark in output for mark in marks):
            return sentence
    return None


def explain(output: str) -> str:
    """One sentence for a failed pip run: what happened and what to do next."""
    known = cause(output)
    if known:
        return known
    if "(from versions: none)" in output:
        return (
            "The package index knows none of the versions; check the network and pip's index"
            " settings, or start again with another Python from 3.10 to 3.13 (--python PATH)."
        )
    missing = _NO_MATCH.search(output)
    if missing:
        return (
            f"The package index has no {missing.group(1)} for this Python and system; start again"
            " with another Python from 3.10 to 3.13 (--python PATH)."
        )
    last = [line for line in output.strip().splitlines() if line.strip()][-1:] or ["no output"]
    return f"pip failed with: {last[0].strip()}; its whole output is in the set-up log."


def announced_download(line: str) -> tuple[str, float] | None:
    """Read pip's `Downloading NAME (SIZE UNIT)`; metadata files do not count."""
    found = _DOWNLOADING.search(line)
    if not found or ".metadata (" in line:
        return None
    return found.group(1), float(found.group(2)) * _UNITS[found.group(3)]


class Pip:
    """pip of one interpreter, with a log file of all it ever printed."""

    def __init__(self, python: str, log: Path):
        self.python = str(python)
        self.log = log

    def run(self, args: Sequence[str], step: Step | None = None) -> str:
        """Run `pip ARGS` and return its output; fail with one sentence."""
        code, output = self.attempt(args, step)
        if code:
            raise ExpectedFailure(f"{explain(output)} (log: {self.log})")
        return output

    def attempt(self, args: Sequence[str], step: Step | None = None) -> tuple[int, str]:
        """Run `pip ARGS` and return its exit code and output."""
        return self._run(["-m", "pip", *args], step)

    def script(self, args: Sequence[str]) -> tuple[int, str]:
        """Run a script beside pip and return its exit code and output."""
        return self._run(args, None)

    def _run(self, args: Sequence[str], step: Step | None) -> tuple[int, str]:
        command = [self.python, *args]
        env = {
            **os.environ,
            "PIP_PROGRESS_BAR": "off",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INPUT": "1",
            "PIP_USER": "0",
            "PYTHONIOENCODING": "utf-8",
        }
        # pip would count what PYTHONPATH adds as installed
        env.pop("PYTHONPATH", None)
        lines: list[str] = []
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n")
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=env,
            )
            try:
                for line in process.stdout:
                    log.write(line)
                    lines.append(line)
                    _show(line, step)
                code = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        return code, "".join(lines)

    def version(self) -> tuple[int, ...]:
        code, output = self.attempt(["--version"])
        found = re.search(r"pip (\d+)\.(\d+)", output)
        return tuple(map(int, found.groups())) if not code and found else ()

    def ask_index(self, *question: str):
        """Ask pip_index.py; None if pip's insides do not answer."""
        code, output = self.script([str(INDEX), *question])
        found = re.search(r"ANSWER(.+)", output)
        if code and cause(output):
            raise ExpectedFailure(f"{cause(output)} (log: {self.log})")
        return None if code or not found else json.loads(found.group(1))


def _show(line: str, step: Step | None) -> None:
    if step is None:
        return
    download = announced_download(line)
    if download:
        name, num_bytes = download
        if num_bytes >= SHOW_FROM_BYTES:
            step.note(line.strip())
        else:
            step.doing = f"downloading {name}"
    elif line.startswith("Installing collected packages"):
        count = line.count(",") + 1
        step.note(f"Installing {count} package{'s' if count > 1 else ''}")
