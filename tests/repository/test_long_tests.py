"""Tests marked `long`: skipped with a reason, run when asked, and their result written down."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import long_tests

ROOT = Path(__file__).resolve().parents[2]
FILE = """\
import pytest

@pytest.mark.long
def test_slow():
    pass

@pytest.mark.long
def test_broken():
    raise ValueError

def test_quick():
    pass
"""
CONFTEST = """\
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.tools import long_tests
long_tests.RESULTS = Path({results!r})
pytest_plugins = ["tests.tools.long_tests"]
"""


@pytest.fixture
def run(tmp_path):
    """Run pytest on the file above, with results written beside it; returns what it printed."""
    (tmp_path / "test_some.py").write_text(FILE)
    (tmp_path / "conftest.py").write_text(
        CONFTEST.format(root=str(ROOT), results=str(tmp_path / "results.json"))
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra -p no:cacheprovider\n")

    def run(*args: str) -> str:
        command = [sys.executable, "-m", "pytest", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout

    return run


def test_long_tests_are_skipped_with_a_reason_and_run_when_asked(run, tmp_path):
    said = run()
    assert "1 passed, 2 skipped" in said
    assert "long, never run: python run.py test --long" in said
    said = run("--long")
    assert "1 failed, 1 passed, 1 deselected" in said
    found = json.loads((tmp_path / "results.json").read_text())
    outcomes = {name.partition("::")[2]: test["outcome"] for name, test in found.items()}
    assert outcomes == {"test_slow": "passed", "test_broken": "failed"}
    commit = found["test_some.py::test_slow"]["commit"]
    assert re.match(r"[0-9a-f]{40}|unknown", commit)
    assert f"passed at {commit[:7]}" in run()
    # some of them again: the others keep theirs
    (tmp_path / "test_some.py").write_text(FILE.replace("raise ValueError", "pass"))
    run("--long", "-k", "broken")
    found = json.loads((tmp_path / "results.json").read_text())
    assert [test["outcome"] for test in found.values()] == ["passed", "passed"]


def test_every_file_with_a_test_marked_long_has_a_committed_result_that_passed():
    mark = "pytest.mark." + "long"
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if file != Path(__file__)]
    marked = {str(f.relative_to(ROOT).as_posix()) for f in files if mark in f.read_text("utf-8")}
    results = long_tests.latest()
    assert {name.partition("::")[0] for name in results} == marked
    assert all(test["outcome"] == "passed" for test in results.values())
