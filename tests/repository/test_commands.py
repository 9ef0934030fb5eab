"""run.py's commands and what they print, locks, and servers as far as they need no ComfyUI."""

import ast
import json
import lzma
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tools import commands, pins, stamps
from tests.tools.comfy_client import ServerFailed, _raise_if_failed, _refusal
from tests.tools.comfy_server import ComfyServer, PromptFailed, free_port, port_is_free
from tests.tools.console import seconds, size
from tests.tools.lock import Held
from tests.tools.mounts import link_pack

ROOT = Path(__file__).resolve().parents[2]


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


def test_formats_sizes_and_durations():
    assert [size(n) for n in (2.63e9, 11_897_382, 800)] == ["2.6 GB", "12 MB", "1 kB"]
    assert [seconds(s) for s in (4.21, 65)] == ["4.2 s", "1 min 05 s"]


def test_unknown_commands_and_versions_are_one_line(capsys, monkeypatch):
    assert commands.main(["sevre"], ROOT) == 2
    assert "choose one of demo, test" in capsys.readouterr().out
    assert commands.main(["serve", "--comfyui", "9.9"], ROOT) == 1
    assert "no pinned ComfyUI 9.9" in capsys.readouterr().out


def test_wrong_arguments_are_told_at_once(capsys):
    assert commands.main(["doctor", "--nope"], ROOT) == 2
    assert "doctor knows no --nope" in capsys.readouterr().out
    for port in ("0", "99999"):
        with pytest.raises(SystemExit):
            commands.main(["serve", "--port", port], ROOT)
        assert f"{port} is no port; choose one from 1 to 65535" in capsys.readouterr().err
    called = [sys.executable, ROOT / "run.py", "demo", "--python"]
    ended = subprocess.run(called, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "--python needs the path of a Python behind it.\n"


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
    bare_comfyui, tmp_path, monkeypatch, wanted, extra, own, both
):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    root = bare_comfyui / "custom_nodes" / "adaspa" if own else tmp_path
    options = SimpleNamespace(comfyui=wanted, long=False, root=root)
    assert commands.runs_oldest(options, extra) == both


def test_tests_of_the_host_are_found_by_their_names():
    """What needs a ComfyUI runs on both, but for our graphs and our model, made for one of them."""
    tests = ROOT / "tests"
    named = {Path(file) for file in commands.host_tests()}
    asks = re.compile(r"def \w+\([^)]*\b(comfyui|load|comfy_server|model_paths|page)\b")
    need = {
        file
        for file in tests.rglob("test_*.py")
        for where in (file, file.with_name("conftest.py"))
        if where.is_file() and asks.search(where.read_text("utf-8"))
    }
    own = {
        Path(__file__),
        Path(__file__).with_name("test_environment.py"),
        Path(__file__).with_name("test_archive.py"),
        tests / "tiny_model" / "test_procedural_video.py",
        tests / "lab" / "test_lab.py",
        tests / "lab" / "test_natural.py",
    }
    assert {file for file in need - named if file.parent.name != "workflows"} <= own
    assert len(named) > 15 and all(file in need for file in named)


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


def test_a_port_in_use_is_noticed(bare_comfyui, tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        assert not port_is_free(port)
        with pytest.raises(ServerFailed, match=f"Port {port} is in use; .* --port"):
            ComfyServer(bare_comfyui, tmp_path / "base", port=port, cpu=True).start()
    assert port_is_free(free_port())


def test_a_server_that_ends_at_once_shows_its_log(bare_comfyui, tmp_path):
    (bare_comfyui / "main.py").write_text("raise SystemExit('no such flag')")
    with pytest.raises(ServerFailed, match=r"exit code 1(.|\n)*no such flag"):
        ComfyServer(bare_comfyui, tmp_path / "base", cpu=True).start()


def test_a_packed_model_file_is_unpacked_and_what_was_linked_before_is_left_alone(tmp_path):
    (packed := tmp_path / "w.safetensors.xz").write_bytes(lzma.compress(b"weights"))
    (other := tmp_path / "other").write_bytes(b"not ours")
    place = tmp_path / "base" / "models" / "diffusion_models" / "w.safetensors"
    place.parent.mkdir(parents=True)
    place.symlink_to(other)
    ComfyServer(tmp_path, tmp_path / "base", model_files=[packed], pack=tmp_path / "base").prepare()
    assert place.read_bytes() == b"weights" and other.read_bytes() == b"not ours"
    assert [path.name for path in place.parent.iterdir()] == [place.name]


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


def test_gpu_tests_are_refused_in_a_sentence_where_there_is_no_gpu(capsys, monkeypatch, tmp_path):
    env = stamps.Environment(sys.executable, "cpu", "2.13.0", None, str(tmp_path))
    monkeypatch.setattr(commands.environment, "prepare", lambda *args: env)
    assert commands.main(["test", "--gpu"], ROOT) == 1
    assert "--gpu needs an NVIDIA GPU" in capsys.readouterr().out


def test_serve_names_the_graph_that_needs_no_model(monkeypatch, tmp_path, capsys):
    class Server(nullcontext):
        started_in, address, log_path = 1.0, "there", "log"

        def is_alive(self):
            raise KeyboardInterrupt

    env = SimpleNamespace(device="cpu", home=str(tmp_path), comfyui="comfyui", python="python")
    for name in ("ADASPA_DEVICE", "ADASPA_HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(commands, "prepared", lambda *asked: env)
    monkeypatch.setattr(commands, "ComfyServer", lambda *where, **how: Server())
    assert commands.serve(SimpleNamespace(port=None, listen=""), []) == 0
    (graph,) = (tmp_path / "serve" / "user" / "default" / "workflows").glob("*.json")
    assert f"Workflows in the sidebar, {graph.stem}, Run" in capsys.readouterr().out


@pytest.mark.parametrize("program", [None, "/usr/bin/chromium"])
def test_the_last_line_names_browser_tests_that_did_not_run(monkeypatch, capsys, program):
    env = SimpleNamespace(device="cpu", home="home", comfyui="comfyui", python="python")
    monkeypatch.setattr(commands, "prepared", lambda *asked: env)
    monkeypatch.setattr(commands, "run_in", lambda *command: 0)
    monkeypatch.setattr(commands, "runs_oldest", lambda *asked: False)
    monkeypatch.setattr(commands.browser, "chromium", lambda: program)
    assert commands.test(SimpleNamespace(gpu=False, long=False), []) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("All passed in ")
    assert ("browser tests did not run: no Chromium is on PATH" in last) is (program is None)
