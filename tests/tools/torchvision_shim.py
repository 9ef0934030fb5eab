"""Lets ComfyUI import a torchvision whose compiled part does not fit the installed torch.

ComfyUI imports torchvision at start but samples video without any of its operators. The package
index carries a torchvision for CUDA only; beside a CPU build of torch its compiled part does not
load, and the import fails because the two operators it wants to describe were never declared.
Declaring their signatures is enough for the import. It happens only after the plain import failed,
so a torchvision that works is never touched.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys

NMS_LIKE = ("nms", "qnms")
_declared = []


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in NMS_LIKE:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # torch forgets the declarations when the library object is collected
    _declared.append(library)


def _forget_half_imported() -> None:
    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]


def import_torchvision() -> bool:
    """Import torchvision, with declared operators where the plain import fails.

    Returns:
        True if the operators had to be declared.
    """
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    _forget_half_imported()
    _declare_operators()
    importlib.import_module("torchvision")
    return True


class _OnFirstImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Runs `import_torchvision` when somebody first imports torchvision, and then steps aside."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        import_torchvision()
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec):
        self._spec = sys.modules[spec.name].__spec__
        return sys.modules[spec.name]

    def exec_module(self, module):
        module.__spec__ = self._spec


def install() -> None:
    """Prepare the next `import torchvision`, without importing torch now."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _OnFirstImport())
