"""Runs what needs Node.js, with the one that Playwright brings: `python node_programs.py NAME`.

types    pyright, with this interpreter's packages
web      the tests of web/ that need no browser
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import playwright
import pyright

ROOT = Path(__file__).resolve().parents[2]
NODE = Path(playwright.__file__).parent / "driver" / ("node.exe" if os.name == "nt" else "node")
PYRIGHT = Path(pyright.__file__).parent / "dist" / "index.js"

if __name__ == "__main__":
    command = {
        "types": [PYRIGHT, "--pythonpath", sys.executable],
        # one line per test, also into a pipe
        "web": ["--test", "--test-reporter=spec", *sorted(ROOT.glob("tests/web/*.test.mjs"))],
    }[sys.argv[1]]
    sys.exit(subprocess.call([NODE, *command], cwd=ROOT))
