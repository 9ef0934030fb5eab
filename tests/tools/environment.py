"""Prepares what a command needs, once: an interpreter with torch, test packages and a ComfyUI.

A virtual environment is made in `.adaspa/`. It borrows the packages of the interpreter that runs
`run.py` if the torch there works, and gets the rest as `locked/` pins it. Nothing is ever installed
outside `.adaspa/`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from . import comfyui_source, pins, requirements, torch_build
from .console import ExpectedFailure, say, seconds, size, step
from .installer import Installer, make_venv, python_of
from .lock import exclusive
from .probe import probe
from .stamps import ROOT, Environment, fingerprint, home_folder, read_stamp, write_stamp

# each level includes the ones before it, and names the packages an interpreter must have to serve
LEVELS = {"torch": (), "kernels": ("numpy", "pytest"), "comfyui": pins.TEST_PACKAGES}
COMFYUI_IMPORTS = ("torchvision", "torchaudio")
# measured size of a finished environment on Linux, and the room its downloads need
ROOM_CPU = 4e9
ROOM_CUDA = 12e9
BORROWED = "adaspa_borrowed.pth"


def prepare(level: str, root: Path = ROOT, env: Mapping[str, str] = os.environ) -> Environment:
    """Return an environment for `level`, setting it up where that was not done before."""
    home = home_folder(root, env)
    gpu = torch_build.has_nvidia_gpu()
    own_comfyui = comfyui_source.locate(root, env)
    named_torch = env.get("ADASPA_TORCH")
    expected = fingerprint(gpu, own_comfyui, named_torch)
    which = f"{sys.prefix} {gpu} {own_comfyui} {named_torch}"
    key = hashlib.sha256(which.encode()).hexdigest()[:8]
    # what serves a later level serves this one too
    later = list(LEVELS)[list(LEVELS).index(level) :]
    stamps = {name: home / "ready" / f"{name}-{key}.json" for name in later}

    def find() -> Environment | None:
        return next(filter(None, (read_stamp(stamps[name], expected) for name in later)), None)

    if ready := find():
        return ready
    with exclusive(home / "lock"):
        if ready := find():
            return ready
        say("Preparing the environment; this happens once.")
        started = time.monotonic()
        borrowed = _torch_here(gpu, named_torch)
        if borrowed and level != "comfyui" and borrowed["versions"].keys() >= set(LEVELS[level]):
            prepared = _environment(sys.executable, borrowed, home, None)
        else:
            level = "comfyui"
            folder = home / f"py{sys.version_info[0]}{sys.version_info[1]}-{key}"
            prepared = _made(folder, gpu, own_comfyui, borrowed, env)
        write_stamp(stamps[level], expected, prepared)
        say(f"Ready after {seconds(time.monotonic() - started)}.")
        return prepared


def _torch_here(gpu: bool, named_torch: str | None) -> dict | None:
    """What the running interpreter's torch can do, if it will do and no other one was named."""
    if named_torch or importlib.util.find_spec("torch") is None:
        return None
    with step("Looking at the torch of this Python"):
        facts = probe(sys.executable)
        if torch_build.usable(facts, gpu):
            say(f"    torch {facts['torch']} on {facts['device']} works and is used")
            return facts
        why = "does not reach the NVIDIA GPU" if facts["device"] else f"fails: {facts.get('error')}"
        say(f"    torch {facts['torch'] or ''} {why}, so another one is needed")
    return None


def _environment(python, facts: dict, home: Path, comfyui_root: Path | None) -> Environment:
    root = str(comfyui_root) if comfyui_root else None
    return Environment(str(python), facts["device"], facts["torch"], root, str(home))


def _made(
    folder: Path, gpu: bool, own_comfyui: Path | None, borrowed: dict | None, env: Mapping[str, str]
) -> Environment:
    """Make the virtual environment, afresh: what an interrupted set-up left is not to be trusted.

    Downloads are kept, by uv, pip and us.
    """
    home = folder.parent
    if borrowed is None and sys.version_info[:2] > pins.NEWEST_PYTHON:
        raise ExpectedFailure(
            f"Python {sys.version_info[0]}.{sys.version_info[1]} is newer than what torch is known"
            " to be built for; start again with Python 3.10 to 3.13 (--python PATH)."
        )
    require_room(home, gpu and borrowed is None)
    installer = Installer(home)
    root = own_comfyui
    if root:
        say(f"  ComfyUI is yours, {root}; nothing is installed into it or its Python.")
    else:
        with step(f"Fetching ComfyUI {pins.DEFAULT_COMFYUI}") as current:
            root = comfyui_source.unpack_pinned(pins.DEFAULT_COMFYUI, installer, current)
    make_venv(folder, installer.log)
    python = python_of(folder)
    if borrowed:
        _borrow(python, [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))])
    _fill(python, installer, gpu, root, borrowed, env)
    with step("Checking that everything imports"):
        facts = probe(str(python), COMFYUI_IMPORTS)
    failed = [f"{name}: {error}" for name, error in facts["imports"].items() if error]
    if facts["device"] is None or failed:
        raise ExpectedFailure(
            f"The prepared Python does not work ({facts.get('error') or '; '.join(failed)}); delete"
            f" {folder} and start again, or use --python with another Python."
        )
    return _environment(python, facts, home, root)


def require_room(home: Path, cuda: bool) -> None:
    needed = ROOM_CUDA if cuda else ROOM_CPU
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free < needed:
        raise ExpectedFailure(
            f"About {size(needed)} are needed in {home} and {size(free)} are free; make room or set"
            " ADASPA_HOME to a folder on a larger disk."
        )


def _site_of(python: Path | str) -> Path:
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())


def _borrow(python: Path, folders: list[str]) -> None:
    """Let a virtual environment see the packages in `folders` after its own."""
    lines = [f"import site; site.addsitedir({p!r})" for p in folders]
    (_site_of(python) / BORROWED).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _fill(
    python: Path,
    installer: Installer,
    gpu: bool,
    comfyui_root: Path,
    borrowed: dict | None,
    env: Mapping[str, str],
) -> None:
    """Install torch and what ComfyUI and the tests need beside it."""
    build = None
    if borrowed is None:
        with step("Fetching torch") as current:
            build = torch_build.fetch(installer, gpu, env, current)
            if build.named:
                installer.install(python, [str(build.file)], current)
                borrowed, build = probe(str(python)), None
    have = borrowed["versions"] if borrowed else {}
    device = borrowed["device"] if borrowed else "cpu"
    if gpu and build and build.has_cuda:
        device = "cuda"
    needs = comfyui_source.needs(comfyui_root)
    chosen = to_install(needs, have, build, device)
    with step("Installing the packages of ComfyUI and the tests") as current:
        if chosen:
            listed = python.parents[1] / "requirements.txt"
            listed.write_text("\n".join(r.text for r in chosen) + "\n", encoding="utf-8")
            # all that is needed is listed, so no other torch comes along
            installer.install(python, ["--no-deps", "-r", str(listed)], current)
        family = torch_build.matching_family(borrowed["torch"]) if borrowed else {}
        if lacking := [text for name, text in family.items() if name not in have]:
            installer.install(python, ["--no-deps", *lacking], current)
        # a ComfyUI of the user's may ask for what is not locked
        if rest := requirements.unmet(needs, {**have, **{r.name: r.version for r in chosen}}):
            installer.install_beside_torch(python, list(rest.values()), current)
    if device == "cpu":
        _mend_torchaudio(_site_of(python))
    shutil.rmtree(installer.home / "downloads" / "torch", ignore_errors=True)


def to_install(
    needs: list[tuple[str, str]],
    have: Mapping[str, str],
    build: torch_build.Build | None,
    device: str,
) -> list[requirements.Pinned]:
    """The locked releases to install; none where nothing lacks.

    Args:
        needs: what ComfyUI asks for, name and version specifier.
        have: packages that are there, name to version. They stay, but for exact versions needed.
        build: the wheel of torch to install; None if torch is there, with libraries of its own.
        device: where torch will run; on a CPU, kernels are interpreted.
    """
    lacking = requirements.unmet([*needs, *((name, "") for name in pins.TEST_PACKAGES)], have)
    left_out = ({"torch"} if build else pins.TORCH_FAMILY) | (have.keys() - lacking.keys())
    libraries = () if build and build.has_cuda else pins.CUDA_LIBRARIES
    chosen = [
        release
        for release in requirements.locked("packages")
        if lacking and not (release.name in left_out or release.name.startswith(libraries))
    ]
    if build:
        line = f"torch @ {build.file.resolve().as_uri()} --hash=sha256:{build.sha256}"
        chosen.append(requirements.Pinned("torch", build.version, line))
    chosen += [engine for engine in requirements.locked("engines") if engine.name not in have]
    if lacks_triton(device, have):
        chosen = [r for r in chosen if r.name != "triton"] + requirements.locked("triton")
    return chosen


def lacks_triton(device: str, have: Mapping[str, str]) -> bool:
    """Whether Triton's interpreter is needed and not there; on a GPU torch's own Triton serves."""
    needed = sys.platform == "linux" and device == "cpu"
    return needed and have.get("triton") != pins.triton(sys.version_info[:2])


def _mend_torchaudio(site: Path) -> None:
    """Move torchaudio's libraries, made for CUDA, out of its sight; it imports without them."""
    for lib in site.glob("torchaudio/lib"):
        aside = lib.with_name("lib_not_loadable")
        aside.mkdir(exist_ok=True)
        for file in [*lib.glob("*.so"), *lib.glob("*.pyd"), *lib.glob("*.dylib")]:
            os.replace(file, aside / file.name)


def with_comfyui(env: Environment, version: str) -> Environment:
    """The same packages with another pinned ComfyUI; those it pins to other versions come first."""
    if env.comfyui and comfyui_source.version_of(Path(env.comfyui)) == version:
        return env
    home = Path(env.home)
    lock = requirements.LOCKED / f"comfyui-{version}.txt"
    folder = Path(env.python).parents[1].with_name(f"{Path(env.python).parents[1].name}-{version}")
    python, stamp = python_of(folder), home / "ready" / f"{folder.name}.json"
    expected = {"lock": lock.read_text(encoding="utf-8"), "under": env.python}
    with exclusive(home / "lock"):
        if ready := read_stamp(stamp, expected):
            return ready
        installer = Installer(home)
        with step(f"Preparing ComfyUI {version}") as current:
            root = comfyui_source.unpack_pinned(version, installer, current)
            make_venv(folder, installer.log)
            _borrow(python, [str(_site_of(env.python))])
            installer.install(python, ["--no-deps", "-r", str(lock)], current)
        ready = replace(env, python=str(python), comfyui=str(root))
        write_stamp(stamp, expected, ready)
    return ready
