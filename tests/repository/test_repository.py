"""What a reader of the repository may rely on: names, places, metadata."""

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.tools import commands
from tests.tools.requirements import locked

try:
    import tomllib
except ModuleNotFoundError:
    # Python 3.10; pytest itself brings it there
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TOP = {
    "__init__.py", "nodes", "sparse_attn", "web", "workflows", "tests", "pyproject.toml",
    "README.md", "run.py", "LICENSE", "CHANGELOG.md", "locales",
    "subgraphs",
}  # fmt: skip
# what commands leave behind, all of it in .gitignore
LEFT_BEHIND = {"__pycache__", "demo_output", "node_modules"}
TEXT = {".py", ".md", ".toml", ".json", ".js", ".mjs", ".txt", ".yml", ".yaml", ".cfg", ""}


def text_files(*tops):
    for top in tops:
        path = ROOT / top
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(ROOT).parts)
            if file.is_file() and file.suffix in TEXT and not hidden:
                yield file


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_top_folder_holds_exactly_what_was_agreed():
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert names - LEFT_BEHIND == TOP


def test_what_commands_leave_behind_is_ignored():
    ignored = (ROOT / ".gitignore").read_text()
    assert all(name in ignored for name in LEFT_BEHIND)


# a home, a temporary or a root folder of one machine; the lookbehind lets URLs' paths be
MACHINE = re.compile(r"(?<![\w.:/>}])(/(root|tmp|mnt|work|home/\w+)/\w|[A-Z]:\\\\?Users)")
# the words are joined here so that this file does not hold what it forbids
HOSTS = ("python" + "hosted", "py" + "pi", "download." + "pytorch", "registry." + "npm" + "js")
REGISTRY = re.compile("|".join(rf"\b{re.escape(host)}\." for host in HOSTS))


@pytest.mark.parametrize("pattern", [MACHINE, REGISTRY], ids=["machine", "registry"])
def test_no_file_names_a_place_on_one_machine_or_a_package_registry(pattern):
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in text_files(*TOP & {path.name for path in ROOT.iterdir()})
        if file != Path(__file__)
        for match in [pattern.search(file.read_text(encoding="utf-8"))]
        if match
    ]
    assert found == []


@pytest.mark.parametrize(
    "text, found",
    [
        ("see /" + "root/x", True),
        ('"/' + 'tmp/a"', True),
        ("/" + "home/ann/b", True),
        ("C:" + "\\Users\\ann", True),
        ("https://example.org/" + "root/x", False),
        ("output/" + "tmp/a", False),
    ],
)
def test_the_search_for_machine_paths_can_fail(text, found):
    assert bool(MACHINE.search(text)) == found


# nouns of the published method -> the file in which a reader looks for them
NOUNS = [
    ("fused online search", "sparse_attn/method/fused_online_search.py"),
    ("LSE-cached search", "sparse_attn/method/lse_cached_search.py"),
    ("row-wise top-k", "sparse_attn/backends/torch/row_wise_top_k.py"),
    ("text sink", "sparse_attn/method/text_sink.py"),
    ("head-adaptive", "sparse_attn/method/head_adaptive.py"),
    ("recall", "sparse_attn/method/recall.py"),
    ("block mask", "sparse_attn/block_mask.py"),
    ("block masses", "sparse_attn/backends/triton/block_masses.py"),
    ("dense attention", "sparse_attn/backends/triton/attention.py"),
    ("sparse attention", "sparse_attn/backends/triton/attention.py"),
    ("token layout", "sparse_attn/token_layout.py"),
    ("selection", "sparse_attn/method/selection.py"),
    ("schedule", "sparse_attn/schedule.py"),
    # no file of their own: the first line of the file that decides them says so
    ("warm-up", "sparse_attn/schedule.py"),
    ("search", "sparse_attn/schedule.py"),
    ("memory", "sparse_attn/run/cache.py"),
]


@pytest.mark.parametrize("noun, path", NOUNS, ids=[noun for noun, _ in NOUNS])
def test_a_noun_of_the_method_is_found_by_file_name(noun, path):
    first_line = (ROOT / path).read_text().split("\n")[0]
    plain = noun.lower().replace(" ", "_").replace("-", "_")
    assert plain == Path(path).stem or noun in first_line.lower()


def test_every_function_of_the_method_has_a_reference():
    text = (ROOT / "tests/method/truth.py").read_text()
    for name in ("recall", "head_sparsities", "sink_blocks"):
        assert f"def {name}(" in text


def test_every_module_opens_with_a_sentence():
    for file in text_files("sparse_attn", "nodes", "__init__.py"):
        if file.suffix == ".py":
            assert file.read_text().startswith('"""'), file


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and len(text) > 10_000
    assert (
        "License :: OSI Approved :: Apache Software License"
        in (pyproject()["project"]["classifiers"])
    )


def test_the_pack_has_what_the_registry_asks_for():
    project, comfy = pyproject()["project"], pyproject()["tool"]["comfy"]
    assert project["name"] == "adaspa" and comfy["DisplayName"] == "AdaSpa"
    assert comfy["PublisherId"] and project["description"] and project["urls"]["Repository"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    # WEB_DIRECTORY alone: with both, every script is loaded twice
    assert "web" not in comfy
    classifiers = project["classifiers"]
    assert sum(name.startswith("Operating System ::") for name in classifiers) == 3
    assert "Environment :: GPU :: NVIDIA CUDA" in classifiers


def test_nothing_is_installed_when_comfyui_starts():
    assert pyproject()["project"]["dependencies"] == []
    assert not (ROOT / "requirements.txt").exists() and not (ROOT / "install.py").exists()


def test_the_changelog_knows_the_version():
    version = pyproject()["project"]["version"]
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_is_the_command_a_developer_runs():
    ci = (ROOT / ".ci/run").read_text()
    assert "run.py test" in ci


def test_hooks_run_the_locked_ruff():
    (ruff,) = [p for p in locked("packages") if p.name == "ruff"]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==([\d.]+)", hooks)) == {ruff.version}


def test_pages_name_files_that_exist():
    pages = (".github/CONTRIBUTING.md", "sparse_attn/README.md")
    tops = "sparse_attn|nodes|web|workflows|tests"
    for page in pages:
        named = re.findall(rf"`((?:{tops})/[\w./]*)`", (ROOT / page).read_text())
        lost = [path for path in named if "OPERATION" not in path and not (ROOT / path).exists()]
        assert named and lost == [], page


def test_doctor_names_the_placeholder_for_the_owner(tmp_path):
    assert "README.md stands for the account" in commands._placeholder(ROOT)[0][1]
    for name in ("pyproject.toml", "README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text.count("OWNER/adaspa") >= 1
        (tmp_path / name).write_text(text.replace("OWNER", "someone"), encoding="utf-8")
    assert commands._placeholder(tmp_path) == []


def test_the_readme_is_short_and_its_links_lead_somewhere_in_the_archive():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = re.sub(r"\]\([^)]*\)|[|`*#-]+", " ", text).split()
    assert len(words) < 640
    left_out = [
        line for line in (ROOT / ".comfyignore").read_text().splitlines() if line[-1:] == "/"
    ]
    for page in ("README.md", "tests/bench/README.md"):
        folder = (ROOT / page).parent
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                path = (folder / target).resolve()
                assert path.exists(), (page, target)
                inside = f"{path.relative_to(ROOT).as_posix()}"
                assert not any(inside.startswith(folder) for folder in left_out), (page, target)


def test_the_registry_gets_an_icon_and_a_banner():
    comfy = pyproject()["tool"]["comfy"]
    for key, shape in (("Icon", (400, 400)), ("Banner", (1260, 540))):
        (name,) = re.findall(r"/main/(.+)$", comfy[key])
        with Image.open(ROOT / name) as image:
            assert image.size == shape and image.format == "PNG"


def test_the_workflow_runs_the_readmes_command():
    command = "python run.py test"
    assert command in (ROOT / "README.md").read_text()
    assert f"- run: {command}\n" in (ROOT / ".github/workflows/test.yml").read_text()
