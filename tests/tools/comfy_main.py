"""Start ComfyUI's `main.py`: `python comfy_main.py COMFYUI_FOLDER [arguments of main.py]`.

Runs inside the prepared environment. Adds what a CPU machine needs to import ComfyUI, and ends with
the process that started it, so that no server outlives a killed test run.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent


def end_with_parent() -> None:
    """Exit when the starter closes our standard input, which its death does too."""

    def wait() -> None:
        # not through sys.stdin: its lock would be held when the interpreter shuts down
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    sys.path.insert(0, str(HERE))
    import torchvision_shim

    sys.path.remove(str(HERE))
    comfyui = Path(sys.argv[1]).resolve()
    if os.environ.pop("ADASPA_END_WITH_PARENT", None):
        end_with_parent()
    torchvision_shim.install()
    sys.argv = [str(comfyui / "main.py"), *sys.argv[2:]]
    os.chdir(comfyui)
    # this folder came first on the path as the script's own; ComfyUI expects its root there
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != HERE]
    sys.path.insert(0, str(comfyui))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
