"""Writes `locked/`: every release that run.py installs, with the hash of every wheel of it.

    python tests/tools/lock_packages.py

uv resolves for all systems and for Python 3.10 to 3.13 at once; of an existing file it keeps the
releases that still fit. Delete a file first to take the newest ones.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import comfyui_source, pins, requirements, stamps
from tools.console import say, step
from tools.installer import Installer

HEADER = "# written by tests/tools/lock_packages.py\n"
TORCH = (f"torch=={pins.TORCH}", "torchvision", "torchaudio")


def write(uv: str, name: str, wanted: list[str], *more: str) -> None:
    """Lock `wanted` as `locked/NAME.txt`, from uv's own index: local ones list few wheels."""
    file = requirements.LOCKED / f"{name}.txt"
    oldest = ".".join(map(str, pins.OLDEST_PYTHON))
    command = [uv, "pip", "compile", "--no-config", "--universal", "--python-version", oldest]
    command += ["--generate-hashes", "--no-annotate", "--no-header", "--quiet", *more]
    subprocess.run([*command, "-", "-o", str(file)], input="\n".join(wanted), text=True, check=True)
    file.write_text(HEADER + file.read_text(encoding="utf-8"), encoding="utf-8")
    say(f"{file.name}: {len(requirements.locked(name))} releases")


def main() -> None:
    installer = Installer(stamps.home_folder(stamps.ROOT))
    if installer.uv is None:
        raise SystemExit("There is no uv for this system; write the lock files on another one.")
    for version in pins.COMFYUI:
        with step(f"ComfyUI {version}") as current:
            root = comfyui_source.unpack_pinned(version, installer, current)
        needs = [name + specifier for name, specifier in comfyui_source.needs(root)]
        exact = [text for text in needs if "==" in text]
        write(installer.uv, f"comfyui-{version}", exact, "--no-deps")
        if version == pins.DEFAULT_COMFYUI:
            write(installer.uv, "packages", [*needs, *pins.TEST_PACKAGES, *TORCH])
    older, newer = pins.triton(pins.OLDEST_PYTHON), pins.triton(pins.NEWEST_PYTHON)
    triton = (
        f"triton=={older} ; python_version < '3.11'",
        f"triton=={newer} ; python_version >= '3.11'",
    )
    write(installer.uv, "triton", list(triton), "--no-deps")
    engines = [f"{name}=={version}" for name, version in pins.ENGINES.items()]
    write(installer.uv, "engines", engines, "--no-deps")
    write(installer.uv, "uv", [f"uv=={pins.UV_SERIES}.*"])


if __name__ == "__main__":
    main()
