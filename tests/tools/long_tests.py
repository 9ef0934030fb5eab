"""pytest's part of `run.py test --long`: tests marked `long` take longer than the others all together.

Elsewhere they are skipped, and the reason says what their latest run gave: its results are
committed, with the commit that it tested. A run of some of them leaves the results of the others.
"""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "long_results.json"
_reports: dict[str, list] = {}


def latest() -> dict:
    """The committed results by test: outcome, seconds, commit and machine."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests marked long, no others")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: runs only with `python run.py test --long`")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        others = [item for item in items if not item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("long")]
        return
    results = latest()
    for item in items:
        if item.get_closest_marker("long"):
            then = results.get(item.nodeid)
            said = f"{then['outcome']} at {then['commit'][:7]}" if then else "never run"
            reason = f"long, {said}: python run.py test --long"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report):
    if "long" in report.keywords:
        _reports.setdefault(report.nodeid, []).append(report)


def pytest_sessionfinish(session):
    config = session.config
    if not (config.getoption("--long") and _reports) or hasattr(config, "workerinput"):
        return
    import torch

    changed = _git("status", "--porcelain", "--untracked-files=no") != ""
    facts = {
        "commit": _git("rev-parse", "HEAD") + (" with changes" if changed else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    results = latest()
    for name, reports in _reports.items():
        results[name] = {
            # setup, call and teardown each say passed, failed or skipped
            "outcome": min((report.outcome for report in reports), key=_ORDER.index),
            "seconds": round(sum(report.duration for report in reports), 1),
            **facts,
        }
    text = json.dumps(dict(sorted(results.items())), indent=1)
    RESULTS.write_text(text + "\n", encoding="utf-8")


_ORDER = ("failed", "skipped", "passed")


def _git(*args: str) -> str:
    run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() or ("unknown" if run.returncode else "")
