"""The Chromium of this machine, for tests of the pages in ComfyUI's own interface."""

from __future__ import annotations

import os
import shutil

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "msedge",
)
MISSING = (
    "no Chromium is on PATH or in PLAYWRIGHT_CHROMIUM_EXECUTABLE_PATH; install one (on Debian and"
    " Ubuntu: sudo apt install chromium)"
)
ARGUMENTS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-sync",
    "--no-first-run",
)


def chromium() -> str | None:
    """The program, or None if there is none."""
    named = os.environ.get("PLAYWRIGHT_CHROMIUM_EXECUTABLE_PATH")
    if named and os.access(named, os.X_OK):
        return named
    return next(filter(None, map(shutil.which, NAMES)), None)


def arguments() -> list[str]:
    """What it is started with; as root it has no sandbox."""
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    return [*ARGUMENTS, *(["--no-sandbox"] if as_root else [])]
