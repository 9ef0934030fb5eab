"""Launches that only compile, for a card that need not be there, that only load, and that wait.

Triton looks a binary up by the kernel's source, the types and alignment of its arguments, its
constants and the card. A launch that only compiles is the same launch, so it leaves in Triton's cache
what the other one looks up.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from .. import tiles
from . import launch

OPTIONS = ("num_warps", "num_stages", "maxnreg")
# what Triton's cache calls a kernel that every run launches
ALWAYS = "_unpack_mask_kernel.json"


class _Card:
    """Stands for Triton's driver where no kernel runs."""

    def __init__(self, capability: tuple[int, int]):
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def serves(card: tiles.Card, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether kernels run on a card for heads of this kind, and can be compiled without it."""
    nvidia = not isinstance(card, str) and card >= tiles.ANY_CARD
    return nvidia and head_dim in launch.HEAD_DIMS and dtype in launch.DTYPES


def is_cold() -> bool:
    """Whether Triton's cache has nothing of ours, not even of an older version."""
    return next(Path(triton.knobs.cache.dir).glob(f"*/{ALWAYS}"), None) is None


def only_compile(capability: tuple[int, int], claim: Callable, done: Callable) -> None:
    """Let every later launch of this process compile for a card, and run nothing.

    Args:
        claim: claim(key) -> whether this process is to compile a launch that it meets first.
        done: done(key), once it is compiled, or cannot be.
    """
    met, run = set(), JITFunction.run
    triton.runtime.driver.set_active(_Card(capability))

    def compile_it(kernel, *args, grid, warmup, **kwargs):
        key = launch_key(kernel, args, kwargs)
        if key in met:
            return
        met.add(key)
        if claim(key):
            try:
                _with_launcher(run(kernel, *args, grid=grid, warmup=True, **kwargs))
            finally:
                done(key)

    JITFunction.run = compile_it


def _with_launcher(compiled) -> None:
    """Make what launches a binary, which Triton before 3.7 compiles for each."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        try:
            driver.CudaLauncher(compiled.src, compiled.metadata)
        except Exception:
            # without a C compiler or the card's driver; then the launch itself tells
            return


@contextmanager
def only_load() -> Iterator[None]:
    """Let the launches of this thread load their binary, and run nothing.

    Their tensors may be of the CPU: a binary goes by types and alignment. No memory of the GPU is taken
    by torch. Other threads launch as ever.
    """
    here, ours = threading.get_ident(), kernels()

    def loading(run):
        def load_it(*args, grid, warmup, **kwargs):
            if threading.get_ident() != here:
                return run(*args, grid=grid, warmup=warmup, **kwargs)
            compiled = run(*args, grid=grid, warmup=True, **kwargs)
            # what launches it, for which it is loaded
            return getattr(compiled, "run", None)

        return load_it

    for kernel in ours:
        kernel.run = loading(kernel.run)
    try:
        yield
    finally:
        for kernel in ours:
            del kernel.run


def launch_key(kernel, args: Iterable, kwargs: dict) -> str:
    """Tell launches apart that need binaries of their own, but for the alignment of arguments."""
    kinds = [str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__ for x in args]
    names = [*kernel.arg_names, *OPTIONS]
    named = [f"{name}={kwargs[name]}" for name in names if name in kwargs]
    return " ".join(
        [kernel.fn.__qualname__, *(kind.replace("torch.", "") for kind in kinds), *named]
    )


def kernels() -> list:
    """Every kernel of the pack that this process has imported."""
    above = __name__.removesuffix("triton.compiling")
    folders = above + "triton.", above + "hopper."
    return [
        kernel
        for name, module in list(sys.modules.items()) if name.startswith(folders)
        for kernel in vars(module).values()
        if hasattr(kernel, "pre_run_hooks") and kernel.fn.__module__ == name
    ]  # fmt: skip


def before_launches(call: Callable) -> Callable:
    """Let call(key) come before every launch; returns what takes that back."""
    hooks = []

    def hook_of(kernel):
        return lambda *args, **kwargs: call(launch_key(kernel, args, kwargs))

    for kernel in kernels():
        hooks.append((kernel, hook_of(kernel)))
        kernel.add_pre_run_hook(hooks[-1][1])

    def take_back():
        for kernel, hook in hooks:
            # a new list: another thread may be going through the old one
            kernel.pre_run_hooks = [x for x in kernel.pre_run_hooks if x is not hook]

    return take_back
