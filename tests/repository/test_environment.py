"""The decisions of run.py's set-up, without setting anything up."""

import io
import json
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tools import comfyui_source, environment, pins, requirements, stamps, torch_build
from tests.tools.console import ExpectedFailure

ROOT = Path(__file__).resolve().parents[2]


# which torch


@pytest.mark.parametrize(
    ("wheel", "platform", "cuda"),
    [
        ("torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", "linux", False),
        ("torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl", "linux", True),
        ("torch-2.13.0-cp311-none-macosx_14_0_arm64.whl", "darwin", False),
        ("torch-2.13.0+cu130-cp311-cp311-win_amd64.whl", "win32", True),
    ],
)
def test_recognises_cuda_builds(wheel, platform, cuda):
    assert torch_build.has_cuda(wheel, platform) is cuda


@pytest.mark.parametrize(
    ("gpu", "env", "platform", "asks"),
    [
        (False, {}, "linux", f"torch=={pins.TORCH}"),  # whichever build pip prefers
        (True, {}, "linux", f"torch==={pins.TORCH}"),  # not one marked +cpu
        (True, {}, "win32", f"torch=={pins.TORCH}"),
        (True, {"ADASPA_TORCH": "torch==2.9.1+cu128"}, "linux", "torch==2.9.1+cu128"),
    ],
)
def test_asks_pip_for_the_pinned_torch_or_a_named_one(gpu, env, platform, asks):
    assert torch_build.wanted(gpu, env, platform) == asks


@pytest.mark.parametrize(
    ("device", "gpu", "usable"),
    [
        ("cpu", False, True),
        ("cpu", True, False),  # a CPU build beside a GPU
        ("cuda", True, True),
        ("mps", False, True),
        (None, False, False),  # torch that does not import
    ],
)
def test_borrows_torch_only_if_it_serves_the_machine(device, gpu, usable):
    assert torch_build.usable({"device": device}, gpu) is usable


@pytest.mark.parametrize(
    ("torch", "vision", "audio"),
    [
        ("2.13.0+cpu", "torchvision==0.28.*", "torchaudio<2.14"),
        ("2.5.1+cu124", "torchvision==0.20.*", "torchaudio<2.6"),
        ("3.0.0", "torchvision", "torchaudio"),  # no rule known
    ],
)
def test_matches_torch_and_its_family(torch, vision, audio):
    family = torch_build.matching_family(torch)
    assert family == {"torchvision": vision, "torchaudio": audio}


@pytest.mark.parametrize(
    ("device", "have", "lacks"),
    [
        ("cpu", {}, True),
        ("cpu", {"triton": "3.6.0"}, True),  # its interpreter fails with a new numpy
        ("cpu", {"triton": pins.triton(sys.version_info[:2])}, False),
        ("cuda", {"triton": "3.6.0"}, False),  # the one torch was built with
    ],
)
def test_asks_for_triton_where_kernels_are_interpreted(device, have, lacks, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert environment.lacks_triton(device, have) is lacks
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not environment.lacks_triton(device, have)


# what is installed

WHEEL = "torch-2.13.0{}-cp311-cp311-manylinux_2_28_x86_64.whl"


def build(mark=""):
    return torch_build.Build(Path(WHEEL.format(mark)), "0" * 64, named=False)


def names(needs=(), have=None, build=None, device="cpu"):
    return [r.name for r in environment.to_install(list(needs), have or {}, build, device)]


def test_a_cpu_build_comes_without_cuda_and_with_an_interpreter(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    got = names(build=build("+cpu"))
    assert not [n for n in got if n.startswith(("cuda-", "nvidia-"))]
    assert got.count("torch") == 1 and got.count("triton") == 2  # for older and newer Pythons
    assert {*pins.TEST_PACKAGES, "torchvision", "torchaudio"} <= set(got)


def test_a_cuda_build_brings_its_libraries_and_its_own_triton(monkeypatch):
    monkeypatch.setattr(torch_build, "has_cuda", lambda wheel: True)
    got = {r.name: r.text for r in environment.to_install([], {}, build(), "cuda")}
    assert "nvidia-cudnn-cu13" in got and "cuda-toolkit" in got
    in_lock = next(p for p in requirements.locked("packages") if p.name == "triton")
    assert got["triton"] == in_lock.text


def test_the_build_is_installed_from_its_file_by_its_hash(tmp_path):
    wheel = replace(build("+cpu"), file=tmp_path / WHEEL.format("+cpu"), sha256="a" * 64)
    chosen = environment.to_install([], {}, wheel, "cpu")
    (line,) = [release.text for release in chosen if release.name == "torch"]
    assert line == f"torch @ {wheel.file.as_uri()} --hash=sha256:{'a' * 64}"


def test_borrowed_packages_stay_but_for_exact_versions_that_comfyui_needs():
    have = {"torch": "2.9.1", "numpy": "1.26.4", "comfy-kitchen": "0.1.0", "scipy": "1.11"}
    got = names(have=have, device="cuda", needs=[("comfy-kitchen", "==0.2.26")])
    assert "comfy-kitchen" in got and "pytest" in got
    assert not {"torch", "torchvision", "torchaudio", "numpy", "scipy", "triton"} & set(got)


def test_nothing_is_installed_where_nothing_lacks():
    have = {"torch": "2.9.1", "comfy-kitchen": "0.2.26", **pins.ENGINES}
    have |= dict.fromkeys(pins.TEST_PACKAGES, "1")
    assert names(have=have, device="cuda", needs=[("comfy-kitchen", "==0.2.26")]) == []


@pytest.mark.parametrize("name", [file.stem for file in sorted(requirements.LOCKED.glob("*.txt"))])
def test_every_locked_release_has_hashes(name):
    releases = requirements.locked(name)
    text = (requirements.LOCKED / f"{name}.txt").read_text(encoding="utf-8")
    assert len(releases) == text.count("==") - text.count("== '")
    assert releases and all(release.hashes for release in releases)


def test_the_lock_holds_what_tests_and_every_pinned_comfyui_need():
    have = {release.name: release.version for release in requirements.locked("packages")}
    assert set(pins.TEST_PACKAGES) | pins.TORCH_FAMILY <= set(have)
    assert have["torch"] == pins.TORCH
    assert {r.version for r in requirements.locked("triton")} == {
        pins.triton(pins.OLDEST_PYTHON),
        pins.triton(pins.NEWEST_PYTHON),
    }
    assert {r.name: r.version for r in requirements.locked("engines")} == pins.ENGINES
    (uv,) = requirements.locked("uv")
    assert uv.version.startswith(f"{pins.UV_SERIES}.")
    root = os.environ.get("COMFYUI_PATH")
    version = comfyui_source.version_of(Path(root)) if root else None
    if version in pins.COMFYUI:
        have |= {r.name: r.version for r in requirements.locked(f"comfyui-{version}")}
        assert requirements.unmet(comfyui_source.needs(Path(root)), have) == {}


def test_known_builds_of_torch_are_the_locked_ones_and_those_pinned_beside():
    hashes = torch_build.known_hashes()
    assert set(pins.TORCH_CPU_BUILDS.values()) < hashes
    assert all(name.startswith(f"torch-{pins.TORCH}+cpu-") for name in pins.TORCH_CPU_BUILDS)
    assert all(len(bytes.fromhex(h)) == 32 for h in hashes)


# which ComfyUI


def test_comfyui_path_wins(bare_comfyui, tmp_path):
    pack = tmp_path / "other" / "custom_nodes" / "adaspa"
    assert comfyui_source.locate(pack, {"COMFYUI_PATH": str(bare_comfyui)}) == bare_comfyui


def test_wrong_comfyui_path_is_refused(tmp_path):
    with pytest.raises(ExpectedFailure, match=r"COMFYUI_PATH .* main\.py"):
        comfyui_source.locate(tmp_path, {"COMFYUI_PATH": str(tmp_path)})


def test_finds_the_comfyui_around_the_pack(bare_comfyui):
    assert comfyui_source.locate(bare_comfyui / "custom_nodes" / "adaspa", {}) == bare_comfyui


@pytest.mark.skipif(os.name == "nt", reason="links need special rights on Windows")
def test_finds_the_comfyui_around_a_linked_pack(bare_comfyui, tmp_path):
    (tmp_path / "pack").mkdir()
    link = bare_comfyui / "custom_nodes" / "adaspa"
    link.symlink_to(tmp_path / "pack")
    assert comfyui_source.locate(link, {}) == bare_comfyui


def test_a_custom_nodes_folder_alone_is_no_comfyui(tmp_path):
    assert comfyui_source.locate(tmp_path / "custom_nodes" / "adaspa", {}) is None


def test_reads_the_version(bare_comfyui, tmp_path):
    assert comfyui_source.version_of(bare_comfyui) == "0.30.0"
    assert comfyui_source.version_of(tmp_path) == "unknown"


REQUIREMENTS = """\
comfyui-frontend-package==1.47.12
comfyui_workflow_templates==0.11.27
torch
torchvision
torchaudio
torchsde
numpy>=1.25.0
SQLAlchemy>=2.0.0  # database

#non essential dependencies:
pydantic~=2.0
PyOpenGL>=3.1.8
"""


def test_leaves_out_torch_and_what_no_server_needs():
    names = [name for name, _ in requirements.parse(REQUIREMENTS)]
    assert names == ["comfyui-frontend-package", "torchsde", "numpy", "sqlalchemy", "pydantic"]


def test_lists_missing_packages_and_other_exact_versions():
    wanted = requirements.parse(REQUIREMENTS)
    have = {"comfyui-frontend-package": "1.45.15", "numpy": "1.20", "torchsde": "0.2.6"}
    assert requirements.unmet(wanted, have) == {
        "comfyui-frontend-package": "comfyui-frontend-package==1.47.12",
        "sqlalchemy": "sqlalchemy>=2.0.0",
        "pydantic": "pydantic~=2.0",
    }


def test_unpacks_the_folder_asked_for(tmp_path):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("top/vendor/ComfyUI/main.py", "top/setup.py"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    for _ in range(2):
        comfyui_source.unpack_folder(archive, "vendor/ComfyUI", tmp_path / "out")
        files = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
        assert sorted(files) == ["a.tar.gz", "out/main.py"]


def test_every_pin_carries_a_whole_hash():
    assert pins.DEFAULT_COMFYUI in pins.COMFYUI
    for pin in pins.COMFYUI.values():
        assert len(bytes.fromhex(pin.sha256)) == 32
    assert len({pin.sha256 for pin in pins.COMFYUI.values()}) == len(pins.COMFYUI)


# stamps


def test_a_stamp_vouches_only_for_the_same_make(tmp_path, bare_comfyui):
    file = tmp_path / "ready" / "stamp.json"
    env = stamps.Environment(sys.executable, "cpu", "2.13.0", str(bare_comfyui), str(tmp_path))
    assert stamps.read_stamp(file, {"recipe": 1}) is None
    stamps.write_stamp(file, {"recipe": 1}, env)
    assert stamps.read_stamp(file, {"recipe": 1}) == env
    assert stamps.read_stamp(file, {"recipe": 2}) is None


@pytest.mark.parametrize("gone", ["python", "comfyui", "half a stamp"])
def test_a_stamp_does_not_vouch_for_what_is_gone(tmp_path, bare_comfyui, gone):
    file = tmp_path / "stamp.json"
    python = tmp_path / "python"
    python.touch()
    stamps.write_stamp(
        file, {}, stamps.Environment(str(python), "cpu", "2.13.0", str(bare_comfyui))
    )
    assert stamps.read_stamp(file, {}) is not None
    if gone == "python":
        python.unlink()
    elif gone == "comfyui":
        (bare_comfyui / "main.py").unlink()
    else:
        file.write_text(file.read_text()[:40])
    assert stamps.read_stamp(file, {}) is None


def test_fingerprint_changes_with_machine_and_comfyui(bare_comfyui):
    (bare_comfyui / "requirements.txt").write_text("numpy\n")
    one = stamps.fingerprint(False, bare_comfyui, None)
    assert json.loads(json.dumps(one)) == one
    assert stamps.fingerprint(True, bare_comfyui, None) != one
    assert stamps.fingerprint(False, bare_comfyui, "torch==2.9.1") != one
    (bare_comfyui / "requirements.txt").write_text("numpy\nscipy\n")
    assert stamps.fingerprint(False, bare_comfyui, None) != one


def test_the_recipe_covers_files_that_exist():
    assert all((stamps.TOOLS / f"{name}.py").is_file() for name in stamps.RECIPE)


def test_home_is_hidden_in_the_project_or_where_it_was_asked_for(tmp_path):
    assert stamps.home_folder(tmp_path, {}) == tmp_path / ".adaspa"
    asked = {"ADASPA_HOME": str(tmp_path / "x")}
    assert stamps.home_folder(tmp_path, asked) == tmp_path / "x"


def test_home_leaves_a_project_that_cannot_be_written(tmp_path):
    file = tmp_path / "not-a-folder"
    file.touch()
    assert stamps.home_folder(file, {}) == Path.home() / ".cache" / "adaspa"


def test_commands_see_the_project_before_other_paths():
    env = stamps.Environment("python", "cpu", "2.13.0", "/comfy", "/home")
    got = env.variables({"PYTHONPATH": "/mine", "PATH": "p"})
    assert got["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(ROOT / "tests"), "/mine"]
    assert (got["COMFYUI_PATH"], got["ADASPA_DEVICE"], got["PATH"]) == ("/comfy", "cpu", "p")
