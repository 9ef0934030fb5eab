"""Imports point one way: kernels <- algorithm <- host <- nodes <- the pack."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMFY = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "server"}
# lowest first: folder, what it may import beside the standard library and the layers below
LAYERS = {
    "sparse_attn/kernels": {"torch", "triton"},
    "sparse_attn": {"torch", "safetensors"},
    "sparse_attn/host": {"torch"} | COMFY,
    "nodes": {"torch", "numpy", "PIL"} | COMFY,
    ".": set(),
}
# nodes/ and sparse_attn/ at the top of the pack, and its own __init__.py
FILES = [ROOT / "__init__.py"]
FILES += [path for top in ("nodes", "sparse_attn") for path in sorted((ROOT / top).rglob("*.py"))]


def layer_of(path: Path) -> str:
    folder = path.parent
    while folder.relative_to(ROOT).as_posix() not in LAYERS:
        folder = folder.parent
    return folder.relative_to(ROOT).as_posix()


def imports_of(path: Path):
    """Yield (module of others, None) or (None, file of ours) for every import of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_only_what_lies_below(path):
    order, own = list(LAYERS), layer_of(path)
    for module, file in imports_of(path):
        if module is not None:
            top = module.split(".")[0]
            known = top in sys.stdlib_module_names or top in LAYERS[own]
            assert known, f"{own} must not import {module}"
        else:
            assert file.suffix == ".py", f"{file} does not exist"
            assert order.index(layer_of(file)) <= order.index(own), f"{file} lies above {own}"


def test_every_layer_is_looked_at():
    assert {layer_of(path) for path in FILES} == set(LAYERS)
    below = {file.name for _, file in imports_of(ROOT / "sparse_attn/run_state.py") if file}
    assert {"attention.py", "schedule.py", "selection.py"} <= below


IMPORT_ALL = """
import importlib, pathlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ImportError("imported " + name)

sys.meta_path.insert(0, Absent())
for path in sorted(pathlib.Path("sparse_attn").glob("*.py")):
    importlib.import_module("sparse_attn" if path.stem == "__init__" else "sparse_attn." + path.stem)
    importlib.import_module("sparse_attn.kernels")
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
