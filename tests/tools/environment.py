"""Prepares what a command needs, once: an interpreter with torch, test packages and a ComfyUI.

The interpreter that runs `run.py` serves as it is when it has everything. Otherwise a virtual
environment is made in `.adaspa/`, which borrows that interpreter's torch if it works. Nothing is
ever installed outside `.adaspa/`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from . import comfyui_source, pins, torch_plan
from .console import ExpectedFailure, say, seconds, step
from .lock import exclusive
from .pip_runner import Pip
from .probe import probe
from .stamps import (
    ROOT,
    Environment,
    fingerprint,
    home_folder,
    installed_here,
    read_stamp,
    write_stamp,
)
from .virtual_env import make_venv, require_room, venv_name

# each level includes the ones before it
LEVELS = ("torch", "tests", "comfyui")
COMFYUI_IMPORTS = ("torchvision", "torchaudio")


def prepare(level: str, root: Path = ROOT, env: Mapping[str, str] = os.environ) -> Environment:
    """Return an environment for `level`, setting it up where that was not done before."""
    home = home_folder(root, env)
    gpu = torch_plan.has_nvidia_gpu()
    own_comfyui = comfyui_source.locate(root, env) if level == "comfyui" else None
    expected = fingerprint(level, gpu, own_comfyui)
    key = hashlib.sha256(f"{sys.prefix} {gpu} {own_comfyui}".encode()).hexdigest()[:8]

    def find() -> Environment | None:
        # what serves a later level serves this one too
        for name in LEVELS[LEVELS.index(level) :]:
            ready = read_stamp(home / "ready" / f"{name}-{key}.json", {**expected, "level": name})
            if ready:
                return ready
        return None

    ready = find()
    if ready:
        return ready
    with exclusive(home / "lock"):
        ready = find()
        if ready:
            return ready
        say("Preparing the environment; this happens once.")
        started = time.monotonic()
        prepared = _set_up(level, home, gpu, own_comfyui)
        write_stamp(home / "ready" / f"{level}-{key}.json", expected, prepared)
        say(f"Ready after {seconds(time.monotonic() - started)}.")
        return prepared


def _set_up(level: str, home: Path, gpu: bool, own_comfyui: Path | None) -> Environment:
    log = home / "setup.log"
    borrow = False
    own_comfyui_root = own_comfyui
    if importlib.util.find_spec("torch"):
        with step("Looking at the torch of this Python"):
            facts = probe(sys.executable)
            borrow = torch_plan.usable(facts, gpu)
            say(f"    {_torch_in_words(facts, gpu)}")
    if borrow and level == "comfyui" and own_comfyui is None and importlib.util.find_spec("pip"):
        with step(f"Fetching ComfyUI {pins.DEFAULT_COMFYUI}") as current:
            own_comfyui_root = comfyui_source.unpack_pinned(
                home, pins.DEFAULT_COMFYUI, Pip(sys.executable, log), current
            )
    if borrow and (level != "comfyui" or own_comfyui_root):
        env = _as_it_is(level, home, own_comfyui_root)
        if env:
            return env
    if own_comfyui:
        say(f"  ComfyUI is yours, {own_comfyui}; nothing is installed into it or its Python.")
    return _in_venv(level, home, gpu, borrow, own_comfyui, log)


def _torch_in_words(facts: dict, gpu: bool) -> str:
    if facts["device"] is None:
        return f"it does not work ({facts.get('error')}), so another one is needed"
    if torch_plan.usable(facts, gpu):
        return f"torch {facts['torch']} on {facts['device']} works and is used"
    return f"torch {facts['torch']} does not reach the NVIDIA GPU, so another one is needed"


def _lacking(level: str, have: Mapping[str, str], comfyui_root: Path | None) -> list[str]:
    """Requirements of `level` that `have` does not meet; torch and its family aside."""
    wanted = []
    if level != "torch":
        wanted += comfyui_source.requirements("\n".join(pins.TEST_PACKAGES))
    if level == "comfyui":
        wanted += comfyui_source.needs(comfyui_root)
    return list(dict.fromkeys(comfyui_source.unmet(wanted, have)))


def lacks_triton(level: str, device: str, have: Mapping[str, str]) -> bool:
    """Whether Triton's interpreter is needed and not there; on a GPU torch's own Triton serves."""
    if level == "torch" or sys.platform != "linux" or device != "cpu":
        return False
    return not have.get("triton", "").startswith(_triton().rstrip("*"))


def _triton() -> str:
    return pins.triton(sys.version_info[:2])


def _as_it_is(level: str, home: Path, comfyui_root: Path | None) -> Environment | None:
    """The running interpreter, if it lacks nothing."""
    have = installed_here()
    if _lacking(level, have, comfyui_root):
        return None
    imports = COMFYUI_IMPORTS if level == "comfyui" else ()
    facts = probe(sys.executable, imports)
    if any(facts["imports"].values()) or lacks_triton(level, facts["device"], have):
        return None
    say(f"  This Python has everything: {sys.executable}")
    return _environment(sys.executable, facts, home, comfyui_root)


def _environment(python, facts: dict, home: Path, comfyui_root: Path | None) -> Environment:
    root = str(comfyui_root) if comfyui_root else None
    return Environment(str(python), facts["device"], facts["torch"], root, str(home))


def _in_venv(
    level: str, home: Path, gpu: bool, borrow: bool, own_comfyui: Path | None, log: Path
) -> Environment:
    if not borrow and sys.version_info[:2] > pins.NEWEST_PYTHON:
        raise ExpectedFailure(
            f"Python {sys.version_info[0]}.{sys.version_info[1]} is newer than what torch is known"
            " to be built for; start again with Python 3.10 to 3.13 (--python PATH)."
        )
    name = venv_name(sys.version_info[:2], gpu, sys.prefix if borrow else None)
    folder = home / name
    require_room(home, gpu and not borrow)
    unfinished = folder / "setting-up"
    if unfinished.exists():
        say("  An earlier set-up was interrupted; starting it afresh.")
        shutil.rmtree(folder, ignore_errors=True)
    python = make_venv(folder, borrow, log)
    unfinished.touch()
    try:
        pip = Pip(str(python), log)
        # older ones download whole wheels only to resolve
        if pip.version() < (24,):
            pip.attempt(["install", "--upgrade", "pip"])
        comfyui_root = _fill(level, home, python, pip, gpu, own_comfyui)
    except ExpectedFailure:
        # pip undid its own work, so what is there can be built upon
        unfinished.unlink(missing_ok=True)
        raise
    facts = _verified(python, level, folder, pip)
    unfinished.unlink()
    return _environment(python, facts, home, comfyui_root)


def _fill(level: str, home: Path, python: Path, pip: Pip, gpu: bool, own_comfyui) -> Path | None:
    """Install what is missing into the virtual environment; returns ComfyUI's root."""
    facts = probe(str(python))
    if facts["device"] is None:
        with step("Installing torch") as current:
            torch_plan.install(pip, gpu, current)
        facts = probe(str(python))
    if facts["device"] is None:
        raise ExpectedFailure(
            f"torch is installed but does not work here ({facts.get('error')}); delete"
            f" {python.parents[1]} and start again, or use --python with another Python."
        )
    comfyui_root = own_comfyui
    if level == "comfyui":
        with step("Preparing ComfyUI") as current:
            if own_comfyui is None:
                comfyui_root = comfyui_source.unpack_pinned(
                    home, pins.DEFAULT_COMFYUI, pip, current
                )
            _install_torch_family(pip, facts, current)
    if lacks_triton(level, facts["device"], facts["versions"]):
        with step("Installing Triton, whose interpreter runs the kernels in tests") as current:
            # without its place in torch's own requirements, which name one release
            pip.run(["install", "--no-compile", "--no-deps", f"triton=={_triton()}"], current)
    lacking = _lacking(level, facts["versions"], comfyui_root)
    if lacking:
        constraints = home / "constraints.txt"
        # pip compares the version of the package, which need not name the build as torch does
        torch = facts["versions"].get("torch", facts["torch"])
        constraints.write_text(f"torch=={torch}\n", encoding="utf-8")
        what = "the packages of ComfyUI and the tests" if level == "comfyui" else "packages"
        much = ", about 200 MB to download" if len(lacking) > 20 else ""
        with step(f"Installing {what}: {len(lacking)} and what they need{much}") as current:
            pip.run(
                ["install", "--no-compile", "--constraint", str(constraints), *lacking], current
            )
    return comfyui_root


def _install_torch_family(pip: Pip, facts: dict, current) -> None:
    wanted = []
    if "torchvision" not in facts["versions"]:
        wanted.append(comfyui_source.matching_torchvision(facts["torch"]))
    if "torchaudio" not in facts["versions"]:
        wanted.append(comfyui_source.matching_torchaudio(facts["torch"]))
    if wanted:
        # without their own requirements, which would replace torch
        pip.run(["install", "--no-compile", "--no-deps", *wanted], current)


def _verified(python: Path, level: str, folder: Path, pip: Pip) -> dict:
    """Import what ComfyUI imports; where only torchaudio's compiled part fails, take it out."""
    imports = COMFYUI_IMPORTS if level == "comfyui" else ()
    with step("Checking that everything imports"):
        facts = probe(str(python), imports)
        if facts["imports"].get("torchaudio"):
            _mend_torchaudio(folder, pip, facts)
            facts = probe(str(python), imports)
    failed = {name: error for name, error in facts["imports"].items() if error}
    if facts["device"] is None or failed:
        reason = facts.get("error") or "; ".join(f"{n}: {e}" for n, e in failed.items())
        raise ExpectedFailure(
            f"The prepared Python does not work ({reason}); delete {folder} and start again, or use"
            " --python with another Python."
        )
    return facts


def _mend_torchaudio(folder: Path, pip: Pip, facts: dict) -> None:
    """Move torchaudio's libraries, made for CUDA, out of its sight; it imports without them."""
    site = "Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages"
    if not any(folder.glob(f"{site}/torchaudio")):
        # a borrowed one is not ours to change
        wanted = comfyui_source.matching_torchaudio(facts["torch"])
        pip.run(["install", "--no-compile", "--no-deps", "--ignore-installed", wanted])
    for lib in folder.glob(f"{site}/torchaudio/lib"):
        aside = lib.with_name("lib_not_loadable")
        aside.mkdir(exist_ok=True)
        for file in [*lib.glob("*.so"), *lib.glob("*.pyd"), *lib.glob("*.dylib")]:
            os.replace(file, aside / file.name)


# further ComfyUI versions


def comfyui(version: str = pins.DEFAULT_COMFYUI, python: str = sys.executable) -> Path:
    """A pinned ComfyUI of that version, set up beside the default one.

    Packages it pins to other versions are put into a folder of their own, which `ComfyServer` and
    `comfy_inprocess` place before the others.

    Returns:
        The folder that holds its `main.py`.
    """
    home = home_folder(ROOT)
    pip = Pip(python, home / "setup.log")
    with exclusive(home / "lock"):
        root = comfyui_source.pinned_folder(home, version)
        note = root.parent / "packages.json"
        if note.is_file() and comfyui_source.is_comfyui(root):
            return root
        with step(f"Preparing ComfyUI {version}") as current:
            root = comfyui_source.unpack_pinned(home, version, pip, current)
            have = probe(python)["versions"]
            lacking = comfyui_source.unmet(comfyui_source.needs(root), have)
            packages = root.parent / "packages"
            shutil.rmtree(packages, ignore_errors=True)
            if lacking:
                pip.run(["install", "--no-deps", "--target", str(packages), *lacking], current)
            note.write_text(json.dumps(lacking), encoding="utf-8")
        return root
