"""Triton's compiler in processes of its own, and the record of what it said of every kernel.

A kernel is on record under a hash of all that the answer depends on: its source with all that it
calls, its arguments' types and constants, tile and options, the architecture, and Triton's release.
What is not in `compiled.json` is compiled at every run of the tests, until
`python run.py test --long tests/backends/test_tiles.py` has put it there.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("compiled.json")


def on_record() -> dict[str, dict]:
    """Rows by key."""
    return {row["key"]: row for row in json.loads(RECORD.read_text(encoding="utf-8"))}


def write(rows: dict) -> None:
    """Put rows by architecture on record."""
    lines = [json.dumps({"arch": arch, **row}) for arch in rows for row in rows[arch]]
    RECORD.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def note_keys(arch, left_out) -> list[str]:
    """Let Triton leave out every kernel of whose key `left_out` says so.

    Returns:
        A list that gets the key of every kernel that would be compiled.
    """
    import triton

    asked = []

    def hook(*, key, fn, **more):
        parts = triton.__version__, arch, fn.jit_function.cache_key, key
        asked.append(hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:24])
        return left_out(asked[-1])

    triton.knobs.runtime.jit_cache_hook = hook
    return asked


class Processes:
    """All that a program is asked about the compiler, a process for each part of the questions."""

    def __init__(self, program: str, parts: list[list[str]]):
        self.program, self.parts = program, parts
        self.pool = None
        self.running = set()
        self.ended = False
        self.answers = []  # a future for each part

    def begin(self, at_a_time: int) -> None:
        if self.pool is not None:
            return
        self.pool = ThreadPoolExecutor(at_a_time)
        self.answers = [self.pool.submit(self._run, part) for part in self.parts]

    def answer(self, question: str):
        """What the program says to one of the questions."""
        self.begin(at_a_time=2)
        (number,) = (i for i, part in enumerate(self.parts) if question in part)
        return self.answers[number].result()[question]

    def _run(self, questions: list[str]) -> dict:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        with tempfile.TemporaryDirectory() as cache:
            env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
            process = subprocess.Popen(
                [sys.executable, self.program, *questions], env=env, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            self.running.add(process)
            if self.ended:
                process.kill()
            stdout, stderr = process.communicate(json.dumps(on_record()))
            self.running.discard(process)
        assert process.returncode == 0, stderr[-3000:]
        return json.loads(stdout.splitlines()[-1])

    def end(self) -> None:
        self.ended = True
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self.running):
                process.kill()
