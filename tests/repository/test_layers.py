"""Imports point one way, from what stands below to what stands above; see FOLDERS."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMFY = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "server"}
# lowest first: folder, what it may import beside the standard library, itself and what stands above
FOLDERS = {
    "sparse_attn": {"torch"},
    "sparse_attn/backends/torch": {"torch"},
    "sparse_attn/backends/triton": {"torch", "triton"},
    "sparse_attn/backends/hopper": {"torch", "triton"},
    "sparse_attn/backends": {"torch"},
    "sparse_attn/orders": {"torch"},
    "sparse_attn/method": {"torch"},
    "sparse_attn/patterns": {"torch", "safetensors"},
    "sparse_attn/forecast": {"torch"},
    "sparse_attn/run": {"torch"},
    "sparse_attn/host": {"torch", "ray"} | COMFY,
    "nodes": {"torch", "numpy", "PIL"} | COMFY,
    ".": set(),
}
# what the implementations of an operation share, and what none of them may know
SHARED = {"permuted.py", "tiles.py", "cudnn.py"}
FILES = [ROOT / "__init__.py"]
FILES += [path for top in ("nodes", "sparse_attn") for path in sorted((ROOT / top).rglob("*.py"))]


def folder_of(path: Path) -> str:
    folder = path.parent
    while folder.relative_to(ROOT).as_posix() not in FOLDERS:
        folder = folder.parent
    return folder.relative_to(ROOT).as_posix()


def imports_of(path: Path, text: str | None = None):
    """Yield (module of others, None) or (None, file of ours) for every import of a file."""
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module, None
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                names = [base / alias.name, base]
                found = [x for n in names for x in (n.with_suffix(".py"), n / "__init__.py")]
                yield None, next((x for x in found if x.exists()), base)


def violations(path: Path, text: str | None = None) -> list[str]:
    """What a file imports and must not."""
    order, own, found = list(FOLDERS), folder_of(path), []
    for module, file in imports_of(path, text):
        if module is not None:
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top not in FOLDERS[own]:
                found.append(f"{own} must not import {module}")
            continue
        if file.suffix != ".py":
            found.append(f"{file} does not exist")
            continue
        other = folder_of(file)
        if other == own or (other == "sparse_attn/backends" and file.name in SHARED):
            continue
        if order.index(other) > order.index(own) or (
            own in ("sparse_attn/backends/triton", "sparse_attn/orders")
            and other.endswith("/torch")
        ):
            found.append(f"{own} must not import {other}")
        elif not own.startswith("sparse_attn/backends") and other.startswith(
            "sparse_attn/backends/"
        ):
            found.append(f"{own} must not import {other}: backends/choice.py alone picks")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_only_what_stands_above(path):
    assert not violations(path)


@pytest.mark.parametrize(
    ("path", "planted"),
    [
        ("sparse_attn/schedule.py", "from .run import state"),
        ("sparse_attn/backends/torch/attention.py", "from ..triton import attention"),
        ("sparse_attn/backends/torch/attention.py", "import triton"),
        ("sparse_attn/backends/triton/attention.py", "from ..hopper import attention"),
        ("sparse_attn/backends/triton/attention.py", "from ..choice import Backends"),
        ("sparse_attn/backends/hopper/attention.py", "from ...method import selection"),
        ("sparse_attn/backends/choice.py", "from ..orders import position"),
        ("sparse_attn/orders/position.py", "from ..method import recall"),
        ("sparse_attn/method/selection.py", "from ..backends.triton import attention"),
        ("sparse_attn/method/selection.py", "from ..run import cache"),
        ("sparse_attn/patterns/pattern.py", "from ..run import layers"),
        ("sparse_attn/forecast/plan.py", "from ..run import report"),
        ("sparse_attn/run/state.py", "import comfy.sd"),
        ("sparse_attn/run/state.py", "from ..host import override"),
        ("sparse_attn/host/override.py", "from ...nodes import settings"),
        ("nodes/settings.py", "import scipy"),
        ("sparse_attn/config.py", "from .nowhere import x"),
    ],
)
def test_a_planted_violation_is_found(path, planted):
    assert violations(ROOT / path, planted)


def test_every_folder_is_looked_at_and_says_its_job():
    assert {folder_of(path) for path in FILES} == set(FOLDERS)
    for folder in FOLDERS:
        if folder not in (".", "nodes"):
            said = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
            assert said and "\n" not in said, folder


IMPORT_ALL = """
import importlib, pathlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ImportError("imported " + name)

sys.meta_path.insert(0, Absent())
for path in sorted(pathlib.Path("sparse_attn").rglob("*.py")):
    if not {"host", "triton", "hopper"} & set(path.parts):
        name = path.with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        importlib.import_module(name)
"""


def test_the_algorithm_needs_neither_comfyui_nor_triton():
    """A module that tried to, also within `try`, would be seen: a failed import leaves no trace."""
    code = IMPORT_ALL.replace("{absent}", repr(COMFY | {"triton"})).replace(
        "raise ImportError(", "raise SystemExit("
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_package_alone_imports_not_even_torch():
    code = (
        "import sys, sparse_attn; sys.exit(bool({'torch', 'triton', 'comfy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_pack_can_be_imported_without_comfyui():
    """pytest imports the top folder's __init__.py; anything at its top would break every test."""
    module = ast.parse((ROOT / "__init__.py").read_text())
    assert not [n for n in module.body if isinstance(n, ast.Import | ast.ImportFrom)]
