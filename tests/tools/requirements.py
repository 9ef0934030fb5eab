"""Requirements as text: what ComfyUI and the tests ask for, and what `locked/` pins by hash."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import pins

LOCKED = Path(__file__).resolve().parent / "locked"
_NAME = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*([^;#]*)")


def canonical(name: str) -> str:
    """A project name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(text: str) -> list[tuple[str, str]]:
    """The (name, version specifier) pairs of a requirements file that a server or a test needs."""
    found = [match.groups() for match in map(_NAME.match, text.splitlines()) if match]
    pairs = [(canonical(name), specifier.strip().replace(" ", "")) for name, specifier in found]
    return [pair for pair in pairs if pair[0] not in pins.NOT_NEEDED | pins.TORCH_FAMILY]


def unmet(wanted: Iterable[tuple[str, str]], installed: Mapping[str, str]) -> dict[str, str]:
    """Requirements that `installed` (name to version) lacks, by name; only `==` is judged."""
    lacking = {}
    for name, specifier in wanted:
        have = installed.get(name)
        exact = re.fullmatch(r"==([^,*]+)", specifier)
        if have is None or (exact and have.split("+")[0] != exact.group(1)):
            lacking[name] = name + specifier
    return lacking


@dataclass(frozen=True)
class Pinned:
    """One release of a lock file; `text` is its lines: name, version, where it applies, hashes."""

    name: str
    version: str
    text: str

    @property
    def hashes(self) -> set[str]:
        return set(re.findall(r"--hash=sha256:([0-9a-f]{64})", self.text))


def locked(name: str) -> list[Pinned]:
    """The releases that `locked/NAME.txt` pins; one project may have several, for other Pythons."""
    text = (LOCKED / f"{name}.txt").read_text(encoding="utf-8")
    blocks = re.findall(r"^(([a-z0-9-]+)==([^\s;\\]+).*(?:\n[ ].*)*)", text, re.MULTILINE)
    return [Pinned(project, version, block) for block, project, version in blocks]
