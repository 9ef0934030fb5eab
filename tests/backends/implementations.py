"""The implementations of an operation, as parameters of a test; the reference has its truth."""

from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from sparse_attn.backends import choice

FILES = {
    "attention_with_masses": "attention",
    "pooled_masses": {"torch": "block_masses", "triton": "pooled_masses"},
}


def file_of(operation, folder):
    """The file of a folder that implements an operation."""
    file = FILES.get(operation, operation)
    return file if isinstance(file, str) else file[folder]


def call(operation, folder, *args, **options):
    """Run the operation as one folder implements it."""
    module = import_module(f"sparse_attn.backends.{folder}.{file_of(operation, folder)}")
    return getattr(module, operation)(*args, **options)


def implementations(operation, *folders):
    """A function for each of the folders; kernels for Hopper where there is such a card."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    skipped = {
        "torch": False,
        "triton": find_spec("triton") is None,
        "hopper": find_spec("triton") is None or not hopper,
    }
    return [
        pytest.param(
            partial(call, operation, folder),
            id=folder,
            marks=pytest.mark.skipif(skipped[folder], reason=f"needs what {folder} runs on"),
        )
        for folder in folders
    ]


def kernels_alone() -> choice.Backend:
    """The kernels, also for what plain torch does where there is no GPU."""
    names = ("tail_error", "row_wise_top_k", "features", "pca_tree")
    alone = {name: getattr(choice._kernel(name), name) for name in names}
    return replace(choice.triton_kernels(), **alone)
