"""The decisions of run.py's set-up, without setting anything up."""

import ast
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tools import comfyui_source, commands, environment, pins, stamps, torch_plan, virtual_env
from tests.tools.comfy_client import ServerFailed, _raise_if_failed, _refusal
from tests.tools.comfy_server import ComfyServer, PromptFailed, free_port, port_is_free
from tests.tools.console import ExpectedFailure, seconds, size
from tests.tools.lock import Held
from tests.tools.mounts import link_pack
from tests.tools.pip_runner import announced_download, explain

ROOT = Path(__file__).resolve().parents[2]
CUDA_NEEDS = ['nvidia-cudnn-cu13==9.20; platform_system == "Linux"', "filelock"]


def torch_item(version, needs=("filelock",)):
    return {"name": "torch", "version": version, "requires": needs and list(needs)}


CPU = torch_item("2.13.0+cpu")
INDEX = torch_item("2.13.0", CUDA_NEEDS)
NEWEST = torch_item("2.15.0", CUDA_NEEDS)


@pytest.fixture
def comfyui(tmp_path):
    """A folder with what makes a ComfyUI recognisable."""
    root = tmp_path / "ComfyUI"
    (root / "comfy").mkdir(parents=True)
    (root / "comfy" / "sd.py").touch()
    (root / "main.py").touch()
    (root / "custom_nodes").mkdir()
    (root / "comfyui_version.py").write_text('# written by a tool\n__version__ = "0.30.0"\n')
    return root


# which torch


@pytest.mark.parametrize(
    ("item", "platform", "cuda"),
    [
        (CPU, "linux", False),  # marked
        (INDEX, "linux", True),  # the index's build for Linux
        (INDEX, "darwin", False),  # its CUDA needs hold on Linux only
        (torch_item("2.13.0+cu130", CUDA_NEEDS), "win32", True),  # marked, on any system
        (torch_item("2.13.0"), "linux", False),  # an Arm build without CUDA
        (torch_item("2.13.0", None), "linux", True),  # the index does not tell its needs
    ],
)
def test_recognises_cuda_builds(item, platform, cuda):
    assert torch_plan.is_cuda_build(item, platform) is cuda


@pytest.mark.parametrize(
    ("found", "gpu", "version", "suits"),
    [
        ([CPU], False, "2.13.0+cpu", True),
        ([INDEX, CPU], False, "2.13.0+cpu", True),  # a CPU build further down wins
        ([INDEX, NEWEST], False, "2.13.0", False),  # none: the first, and say so
        ([CPU, NEWEST], True, "2.15.0", True),  # a GPU wants CUDA
        ([CPU], True, "2.13.0+cpu", False),
    ],
)
def test_chooses_the_torch_that_suits(found, gpu, version, suits):
    item, good = torch_plan.choose(found, gpu, "linux")
    assert (item["version"], good) == (version, suits)


def test_chooses_nothing_from_nothing():
    assert torch_plan.choose([], False) is None


def test_tries_the_pinned_torch_then_marked_cpu_builds_then_any():
    tried = torch_plan.candidates(False, ["2.15.0", "2.14.0+cpu", "2.13.0+cpu", "2.13.0"])
    assert tried == [f"torch=={pins.TORCH}", "torch==2.14.0+cpu", "torch"]
    assert torch_plan.candidates(True, ["2.14.0+cpu"]) == [f"torch=={pins.TORCH}", "torch"]


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
    assert torch_plan.usable({"device": device}, gpu) is usable


@pytest.mark.parametrize(
    ("level", "device", "have", "lacks"),
    [
        ("tests", "cpu", {}, True),
        ("tests", "cpu", {"triton": "3.6.0"}, True),  # its interpreter fails with a new numpy
        ("tests", "cpu", {"triton": pins.triton(sys.version_info[:2]).replace("*", "0")}, False),
        ("tests", "cuda", {"triton": "3.6.0"}, False),  # the one torch was built with
        ("torch", "cpu", {}, False),  # doctor alone needs none
    ],
)
def test_asks_for_triton_where_kernels_are_interpreted(level, device, have, lacks, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert environment.lacks_triton(level, device, have) is lacks
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not environment.lacks_triton(level, device, have)


@pytest.mark.parametrize(
    ("torch", "vision", "audio"),
    [
        ("2.13.0+cpu", "torchvision==0.28.*", "torchaudio<2.14"),
        ("2.5.1+cu124", "torchvision==0.20.*", "torchaudio<2.6"),
        ("3.0.0", "torchvision", "torchaudio"),  # no rule known
    ],
)
def test_matches_torch_and_its_family(torch, vision, audio):
    assert comfyui_source.matching_torchvision(torch) == vision
    assert comfyui_source.matching_torchaudio(torch) == audio


# which ComfyUI


def test_comfyui_path_wins(comfyui, tmp_path):
    pack = tmp_path / "other" / "custom_nodes" / "adaspa"
    assert comfyui_source.locate(pack, {"COMFYUI_PATH": str(comfyui)}) == comfyui


def test_wrong_comfyui_path_is_refused(tmp_path):
    with pytest.raises(ExpectedFailure, match=r"COMFYUI_PATH .* main\.py"):
        comfyui_source.locate(tmp_path, {"COMFYUI_PATH": str(tmp_path)})


def test_finds_the_comfyui_around_the_pack(comfyui):
    assert comfyui_source.locate(comfyui / "custom_nodes" / "adaspa", {}) == comfyui


@pytest.mark.skipif(os.name == "nt", reason="links need special rights on Windows")
def test_finds_the_comfyui_around_a_linked_pack(comfyui, tmp_path):
    (tmp_path / "pack").mkdir()
    link = comfyui / "custom_nodes" / "adaspa"
    link.symlink_to(tmp_path / "pack")
    assert comfyui_source.locate(link, {}) == comfyui


def test_a_custom_nodes_folder_alone_is_no_comfyui(tmp_path):
    assert comfyui_source.locate(tmp_path / "custom_nodes" / "adaspa", {}) is None


def test_reads_the_version(comfyui, tmp_path):
    assert comfyui_source.version_of(comfyui) == "0.30.0"
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
    names = [name for name, _ in comfyui_source.requirements(REQUIREMENTS)]
    assert names == ["comfyui-frontend-package", "torchsde", "numpy", "sqlalchemy", "pydantic"]


def test_lists_missing_packages_and_other_exact_versions():
    wanted = comfyui_source.requirements(REQUIREMENTS)
    have = {"comfyui-frontend-package": "1.45.15", "numpy": "1.20", "torchsde": "0.2.6"}
    assert comfyui_source.unmet(wanted, have) == [
        "comfyui-frontend-package==1.47.12",
        "sqlalchemy>=2.0.0",
        "pydantic~=2.0",
    ]


def test_unpacks_only_the_folder_asked_for(tmp_path):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("top/vendor/ComfyUI/main.py", "top/setup.py", "top/vendor/ComfyUI/../../evil"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    comfyui_source.unpack_folder(archive, "vendor/ComfyUI", tmp_path / "out")
    files = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(files) == ["a.tar.gz", "out/main.py"]
    with pytest.raises(ExpectedFailure, match="holds no vendor/Other"):
        comfyui_source.unpack_folder(archive, "vendor/Other", tmp_path / "out")


def test_a_changed_archive_is_not_verified(tmp_path):
    file = tmp_path / "a.tar.gz"
    file.write_bytes(b"content")
    expected = hashlib.sha256(b"content").hexdigest()
    assert comfyui_source.verified(file, expected)
    file.write_bytes(b"Content")
    assert not comfyui_source.verified(file, expected)
    assert not comfyui_source.verified(tmp_path / "missing", expected)


def test_every_pin_carries_a_whole_hash():
    assert pins.DEFAULT_COMFYUI in pins.COMFYUI
    for pin in pins.COMFYUI.values():
        assert len(bytes.fromhex(pin.sha256)) == 32
    assert len({pin.sha256 for pin in pins.COMFYUI.values()}) == len(pins.COMFYUI)


# stamps


def test_a_stamp_vouches_only_for_the_same_make(tmp_path, comfyui):
    file = tmp_path / "ready" / "stamp.json"
    env = stamps.Environment(sys.executable, "cpu", "2.13.0", str(comfyui), str(tmp_path))
    assert stamps.read_stamp(file, {"recipe": 1}) is None
    stamps.write_stamp(file, {"recipe": 1}, env)
    assert stamps.read_stamp(file, {"recipe": 1}) == env
    assert stamps.read_stamp(file, {"recipe": 2}) is None


@pytest.mark.parametrize("gone", ["python", "comfyui", "half a stamp"])
def test_a_stamp_does_not_vouch_for_what_is_gone(tmp_path, comfyui, gone):
    file = tmp_path / "stamp.json"
    python = tmp_path / "python"
    python.touch()
    stamps.write_stamp(file, {}, stamps.Environment(str(python), "cpu", "2.13.0", str(comfyui)))
    assert stamps.read_stamp(file, {}) is not None
    if gone == "python":
        python.unlink()
    elif gone == "comfyui":
        (comfyui / "main.py").unlink()
    else:
        file.write_text(file.read_text()[:40])
    assert stamps.read_stamp(file, {}) is None


def test_fingerprint_changes_with_machine_and_comfyui(comfyui):
    (comfyui / "requirements.txt").write_text("numpy\n")
    one = stamps.fingerprint("comfyui", False, comfyui)
    assert json.loads(json.dumps(one)) == one
    assert stamps.fingerprint("comfyui", True, comfyui) != one
    assert stamps.fingerprint("tests", False, comfyui) != one
    (comfyui / "requirements.txt").write_text("numpy\nscipy\n")
    assert stamps.fingerprint("comfyui", False, comfyui) != one


def test_the_recipe_covers_files_that_exist():
    assert all((stamps.TOOLS / f"{name}.py").is_file() for name in stamps.RECIPE)


def test_home_is_hidden_in_the_project_or_where_it_was_asked_for(tmp_path):
    assert stamps.home_folder(tmp_path, {}) == tmp_path / ".adaspa"
    asked = {"ADASPA_HOME": str(tmp_path / "x")}
    assert stamps.home_folder(tmp_path, asked) == tmp_path / "x"


def test_home_leaves_a_project_that_cannot_be_written(tmp_path):
    file = tmp_path / "not-a-folder"
    file.touch()
    env = {"XDG_CACHE_HOME": str(tmp_path / "c"), "LOCALAPPDATA": str(tmp_path / "c")}
    assert file not in stamps.home_folder(file, env).parents


def test_environments_that_differ_get_folders_that_differ():
    names = {
        virtual_env.venv_name((3, 11), False, None),
        virtual_env.venv_name((3, 12), False, None),
        virtual_env.venv_name((3, 11), True, None),
        virtual_env.venv_name((3, 11), False, "/a"),
        virtual_env.venv_name((3, 11), False, "/b"),
    }
    assert len(names) == 5


def test_commands_see_the_project_before_other_paths():
    env = stamps.Environment("python", "cpu", "2.13.0", "/comfy", "/home")
    got = env.variables({"PYTHONPATH": "/mine", "PATH": "p"})
    assert got["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(ROOT / "tests"), "/mine"]
    assert (got["COMFYUI_PATH"], got["ADASPA_DEVICE"], got["PATH"]) == ("/comfy", "cpu", "p")


# locks


def test_a_second_process_does_not_get_the_lock(tmp_path):
    held = Held(tmp_path / "lock")
    assert held.acquire()
    ask = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from tools.lock import Held; sys.exit(0 if Held(Path(sys.argv[2])).acquire() else 7)"
    )
    command = [sys.executable, "-c", ask, str(ROOT / "tests"), str(tmp_path / "lock")]
    assert subprocess.run(command, check=False).returncode == 7
    held.release()
    assert subprocess.run(command, check=False).returncode == 0


# what is said


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("NewConnectionError('<HTTPSConnection>: Failed to establish', )", "cannot be reached"),
        ("SSLError(SSLCertVerificationError(1, 'CERTIFICATE_VERIFY_FAILED'))", "certificate"),
        ("ERROR: No matching distribution found for torch==2.13.0\n", "no torch==2.13.0 for this"),
        ("ERROR: Could not find x (from versions: none)", "check the network and pip's index"),
        ("Collecting x\nERROR: broken thing\n\n", "broken thing"),
    ],
)
def test_pip_failures_become_one_sentence(output, says):
    sentence = explain(output)
    assert says in sentence
    assert "\n" not in sentence


def test_reads_the_size_of_a_download():
    assert announced_download("  Downloading a-1.whl (526.6 MB)") == ("a-1.whl", 526.6e6)
    assert announced_download("  Downloading a-1.whl.metadata (31 kB)") is None
    assert announced_download("Collecting a") is None


def test_formats_sizes_and_durations():
    assert [size(n) for n in (2.63e9, 11_897_382, 800)] == ["2.6 GB", "12 MB", "1 kB"]
    assert [seconds(s) for s in (4.21, 65)] == ["4.2 s", "1 min 05 s"]


def test_unknown_commands_and_versions_are_one_line(capsys, monkeypatch):
    assert commands.main(["sevre"], ROOT) == 2
    assert "choose one of demo, test" in capsys.readouterr().out
    assert commands.main(["serve", "--comfyui", "9.9"], ROOT) == 1
    assert "no pinned ComfyUI 9.9" in capsys.readouterr().out


def test_the_oldest_comfyui_is_the_one_the_pack_promises():
    assert f'requires-comfyui = ">={pins.OLDEST_COMFYUI}"' in (ROOT / "pyproject.toml").read_text()
    assert pins.OLDEST_COMFYUI in pins.COMFYUI and pins.DEFAULT_COMFYUI in pins.COMFYUI


@pytest.mark.parametrize(
    ("wanted", "extra", "own", "both"),
    [
        (None, [], False, True),
        ("0.27.0", [], False, False),
        (None, ["-k", "pair"], False, False),
        (None, [], True, False),
    ],
)
def test_all_tests_of_a_pinned_comfyui_run_on_the_oldest_too(
    comfyui, tmp_path, monkeypatch, wanted, extra, own, both
):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    root = comfyui / "custom_nodes" / "adaspa" if own else tmp_path
    options = SimpleNamespace(comfyui=wanted, root=root)
    assert commands.runs_oldest(options, extra) == both


def test_tests_of_the_host_are_found_by_their_names():
    """What needs a ComfyUI runs on both, but for our graphs and our model, made for one of them."""
    tests = ROOT / "tests"
    named = {Path(file) for file in commands.host_tests()}
    asks = re.compile(r"def \w+\([^)]*\b(comfyui|load|comfy_server|model_paths)\b")
    need = {file for file in tests.rglob("test_*.py") if asks.search(file.read_text("utf-8"))}
    own = {tests / "tiny_model" / "test_procedural_video.py", Path(__file__)}
    assert {file for file in need - named if file.parent.name != "workflows"} <= own
    assert len(named) > 15 and all(file in need for file in named)


def test_a_program_beside_speaks_when_asked_and_ends_with_its_context(tmp_path, capsys):
    env = stamps.Environment(sys.executable, "cpu", "2.13.0", None, str(tmp_path))
    with commands.Beside(env, ["-c", "print('late'); raise SystemExit(3)"]) as beside:
        assert beside.result() == 3
    assert "late" in capsys.readouterr().out
    with commands.Beside(env, ["-c", "import time; time.sleep(60)"]) as beside:
        assert beside.process.poll() is None
    assert beside.process.poll() is not None


def test_help_names_every_command(capsys):
    assert commands.main(["--help"], ROOT) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in commands.COMMANDS)


def test_an_old_python_can_still_read_run_py():
    source = (ROOT / "run.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 5))
    assert 'f"' not in source


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests" / "tools").glob("*.py")), ids=lambda f: f.name
)
def test_tools_parse_on_the_oldest_python(file):
    ast.parse(file.read_text(encoding="utf-8"), feature_version=pins.OLDEST_PYTHON)


# the server, as far as it needs no ComfyUI


def test_a_port_in_use_is_noticed(comfyui, tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        assert not port_is_free(port)
        with pytest.raises(ServerFailed, match=f"Port {port} is in use; .* --port"):
            ComfyServer(comfyui, tmp_path / "base", port=port, cpu=True).start()
    assert port_is_free(free_port())


def test_a_server_that_ends_at_once_shows_its_log(comfyui, tmp_path):
    (comfyui / "main.py").write_text("raise SystemExit('no such flag')")
    with pytest.raises(ServerFailed, match=r"exit code 1(.|\n)*no such flag"):
        ComfyServer(comfyui, tmp_path / "base", cpu=True).start()


def test_the_mounted_pack_is_what_users_install(tmp_path):
    source = tmp_path / "source"
    for name in ("nodes", "tests", ".adaspa", "web"):
        (source / name).mkdir(parents=True)
    for name in ("__init__.py", "run.py", ".gitignore"):
        (source / name).touch()
    mounted = link_pack(tmp_path / "custom_nodes", source)
    assert sorted(p.name for p in mounted.iterdir()) == ["__init__.py", "nodes", "web"]
    link_pack(tmp_path / "custom_nodes", source)
    assert (source / "__init__.py").exists()


def test_refusals_name_node_and_reason():
    text = json.dumps(
        {
            "error": {"message": "Prompt outputs failed validation"},
            "node_errors": {
                "4": {
                    "class_type": "AdaSpaAttention",
                    "errors": [{"message": "Value too big", "details": "sparsity"}],
                }
            },
        }
    )
    assert "node 4 (AdaSpaAttention): Value too big: sparsity" in _refusal(text)
    assert "502" in _refusal("502 Bad Gateway")


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (
            {
                "status_str": "error",
                "messages": [
                    ["execution_start", {}],
                    [
                        "execution_error",
                        {
                            "node_id": "6",
                            "node_type": "KSampler",
                            "exception_type": "ValueError",
                            "exception_message": "no frames\n",
                        },
                    ],
                ],
            },
            r"node 6 \(KSampler\) failed with ValueError: no frames$",
        ),
        (
            {"status_str": "error", "messages": [["execution_interrupted", {}]]},
            "interrupted",
        ),
        ({"status_str": "error", "messages": []}, "ended as error"),
    ],
)
def test_failed_prompts_say_where(status, says):
    with pytest.raises(PromptFailed, match=says):
        _raise_if_failed({"status": status})
    _raise_if_failed({"status": {"status_str": "success"}})
