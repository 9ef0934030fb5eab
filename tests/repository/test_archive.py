"""The archive that users get: it is whole, a server loads it, and it does what its pages say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import archive
from tests.tools.comfy_server import ComfyServer

MOST_BYTES = 20 * 2**20
# a sampler run of a second, with blocks enough to skip some
SMALL = {"width": 208, "height": 160, "length": 13, "steps": 4}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    return archive.unpack(tmp_path_factory.mktemp("custom_nodes") / "adaspa")


def pages(root: Path) -> list[Path]:
    return sorted(root.rglob("*.md"))


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def lost_links(root: Path) -> list[str]:
    """Links of the archive's pages that lead to nothing inside it."""
    lost = []
    for page in pages(root):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            inside = target.is_relative_to(root.resolve()) and target.exists()
            if not inside or (anchor and anchor not in headings(target)):
                lost.append(f"{page.relative_to(root)}: {link}")
    return lost


def test_every_link_of_its_pages_leads_to_something_inside_it(unpacked):
    assert lost_links(unpacked) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A word, more\n")
    text = (
        "[a](there.md) [b](there.md#a-word-more) [c](gone.md) [d](there.md#no) [e](https://x.org)"
    )
    (tmp_path / "README.md").write_text(text)
    assert lost_links(tmp_path) == ["README.md: gone.md", "README.md: there.md#no"]


def test_every_script_that_its_readme_names_is_inside_it(unpacked):
    named = re.findall(r"python ([\w./]+\.py)", (unpacked / "README.md").read_text("utf-8"))
    assert "run.py" in named
    assert [name for name in named if not (unpacked / name).is_file()] == []


def test_it_holds_the_pack_and_no_tests(unpacked):
    names = archive.files()
    assert {"__init__.py", "pyproject.toml", "LICENSE", "run.py", "README.md"} <= {*names}
    tests = [name for name in names if re.search(r"(^|/)(test_\w+|conftest)\.py$", name)]
    assert tests == []
    for folder in ("sparse_attn", "nodes", "web", "workflows", "locales", "subgraphs"):
        assert any(name.startswith(f"{folder}/") for name in names), folder
    assert sum((unpacked / name).stat().st_size for name in names) < MOST_BYTES


def run(unpacked, *args: str) -> subprocess.CompletedProcess:
    """A command in the archive, with the Python and nothing else of these tests."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=unpacked, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def test_doctor_says_that_all_is_right(unpacked):
    found = run(unpacked, "run.py", "doctor")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "torch" in found.stdout


def test_test_says_that_it_has_none(unpacked):
    found = run(unpacked, "run.py", "test")
    assert found.returncode == 1
    assert "The registry's copy of the pack has no tests; get the repository." in found.stdout


@pytest.mark.parametrize("script", [
    "tests/demo/run_demo.py", "tests/bench/bench_eager.py", "tests/lab/compare_presets.py",
])  # fmt: skip
def test_what_a_user_may_start_has_all_that_it_imports(unpacked, comfyui, script):
    found = run(unpacked, script, "--help")
    assert found.returncode == 0 and "usage" in found.stdout, found.stderr


def test_a_server_loads_it_and_samples_its_own_model(unpacked, comfyui, tmp_path, monkeypatch):
    tiny = unpacked / "tests" / "tiny_model"
    server = ComfyServer(
        comfyui,
        tmp_path,
        pack=unpacked,
        extra_custom_nodes=[("adaspa_tiny_model", tiny)],
        model_files=sorted(tiny.glob("*.safetensors.xz")),
        env={"OMP_NUM_THREADS": "1"},
    )
    monkeypatch.syspath_prepend(str(unpacked / "tests" / "demo"))
    sys.modules.pop("graph", None)
    import graph

    assert Path(graph.__file__).is_relative_to(unpacked)
    prompt = graph.graph(preset="Fast", enabled=True, **SMALL)
    prompt["adaspa"]["inputs"]["min_tokens"] = 0
    with server:
        entry = server.post(prompt)
        loaded = {name: info["python_module"] for name, info in server.object_info().items()}
        graph_file = tmp_path / "graph_api.json"
        graph_file.write_text(json.dumps(prompt))
        words = [graph_file, "--server", server.address, "--seeds", 1, "--presets", "Fast"]
        words += ["--out", tmp_path / "compared"]
        compared = run(unpacked, "tests/lab/compare_presets.py", *map(str, words))
        # what the pack offers beside nodes
        assert server.get("/workflow_templates")["adaspa"]
        assert any("/adaspa/" in path for path in server.get("/extensions"))
    ours = {name for name in loaded if loaded[name] == "custom_nodes.adaspa"}
    assert len(ours) >= 6 and "AdaSpaAttention" in ours
    assert compared.returncode == 0, compared.stdout + compared.stderr
    table = (tmp_path / "compared" / "presets.md").read_text()
    assert "| preset | PSNR dB | SSIM |" in table and "\n| Fast | " in table
    (text,) = entry["outputs"]["report"]["text"]
    assert "density 0." in text and entry["outputs"]["save"]["images"]
    assert not [x for x in server.log.splitlines() if "IMPORT FAILED" in x and "adaspa" in x]
