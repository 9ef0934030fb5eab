"""ComfyUI and our pack inside this process, for tests that call ComfyUI's functions directly.

Used as:

    comfy_inprocess.start()
    pack = comfy_inprocess.load_pack()
    nodes = comfy_inprocess.nodes_of(pack)      # node id -> class
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from . import torchvision_shim

ROOT = Path(__file__).resolve().parents[2]


def start(comfyui_path=None, args: tuple[str, ...] | None = None) -> Path:
    """Make `import comfy`, `import nodes` and `import folder_paths` mean ComfyUI's.

    Args:
        comfyui_path: None reads COMFYUI_PATH.
        args: as on the command line of ComfyUI's `main.py`; None is `--cpu` without an accelerator.
    """
    comfyui = Path(comfyui_path or os.environ["COMFYUI_PATH"]).resolve()
    loaded = sys.modules.get("comfy.cli_args")
    if loaded is not None and loaded.__file__:
        return Path(loaded.__file__).parents[1]
    for name in ("nodes", "server", "execution"):
        if name in sys.modules:
            raise RuntimeError(f"`{name}` was imported before ComfyUI; start ComfyUI first.")
    torchvision_shim.install()
    if args is None:
        import torch

        on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
        args = ("--cpu", "--use-pytorch-cross-attention") if on_cpu else ()
    sys.path.insert(0, str(comfyui))
    import comfy.options

    comfy.options.enable_args_parsing()
    argv, sys.argv = sys.argv, ["main.py", *args]
    try:
        import comfy.cli_args  # reads sys.argv while it is imported
    finally:
        sys.argv = argv
    return comfyui


def load_pack(folder=ROOT, name: str = "custom_nodes_x_adaspa") -> ModuleType:
    """Import a node folder the way ComfyUI does: by path, under a name of its own."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def nodes_of(pack: ModuleType) -> dict[str, type]:
    """Every node class a V3 pack offers, by node id."""

    async def ask():
        extension = await pack.comfy_entrypoint()
        return await extension.get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(ask())}
