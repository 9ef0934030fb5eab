"""Figures of long runs, written beside what they were measured on."""

import json
import os
import subprocess
from pathlib import Path

from tests.bench.record import facts
from tests.tools.comfyui_source import version_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")


def write_results(name: str, rows: list[dict], **more) -> None:
    """Write `results/NAME.json`: rows, hardware, versions, date, command and commit."""
    found = facts()
    found["versions"]["ComfyUI"] = version_of(Path(os.environ["COMFYUI_PATH"]))
    found["command"] = f"python run.py test --long tests/host/test_{name}.py"
    found["commit"] = _git("rev-parse", "HEAD")
    if _git("status", "--porcelain", "--untracked-files=no"):
        found["commit"] += " with changes"
    RESULTS.mkdir(exist_ok=True)
    # a row a line, to be read and compared
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({**found, **more}, indent=1).removesuffix("\n}")
    text = f'{head},\n "rows": [\n{lines}\n ]\n}}\n'
    json.loads(text)
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def _git(*args: str) -> str:
    run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()
