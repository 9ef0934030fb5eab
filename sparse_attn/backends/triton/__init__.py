"""Triton kernels; the one place that knows Triton is optional."""

from functools import cache
from importlib import import_module

NAMES = (
    "attention", "dense_attention", "block_masses", "unpack_mask", "quantised_attention",
    "permute", "pooled_masses", "row_wise_top_k", "features", "pca_tree", "tail_error",
)  # fmt: skip


@cache
def _modules():
    """{name: module}, or the reason why there are none."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 4):
        return f"needs Triton 3.4 or newer, got {triton.__version__}"
    return {name: import_module(f".{name}", __name__) for name in NAMES}


def available() -> dict:
    """{kernel name: its module, or the reason (str) why it cannot run here}."""
    modules = _modules()
    return dict.fromkeys(NAMES, modules) if isinstance(modules, str) else dict(modules)


def kernel_for(name: str, *tensors):
    """The module of a kernel if it serves these tensors, or None."""
    # under Triton's interpreter kernels accept CPU tensors, for tests alone
    if tensors[0].device.type != "cuda":
        return None
    kernel = available()[name]
    return None if isinstance(kernel, str) or kernel.why_not(*tensors) else kernel


def why_not(q, k, v, block_q: int, block_k: int) -> str | None:
    """Reason why the kernels cannot serve this attention call, or None."""
    modules = _modules()
    if isinstance(modules, str):
        return modules
    return modules["attention"].why_not(q, k, v, block_q, block_k)
