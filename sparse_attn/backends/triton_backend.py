"""The backend of Triton kernels, for GPUs."""

from . import triton as kernels
from .permuted import Arranged, arranged

# the dense kernel writes masses in the same pass when it knows an earlier LSE
ONE_PASS_SEARCH = True


def why_not(q, k, v, block_q: int, block_k: int) -> str | None:
    """Say why the kernels cannot serve the call, or None when they can."""
    # under Triton's interpreter the kernels accept CPU tensors, for tests; nobody samples with it
    if q.device.type != "cuda":
        return f"needs a CUDA tensor, got {q.device.type}"
    return kernels.why_not(q, k, v, block_q, block_k)


def why_not_low_precision(q, k, v, block_q: int, block_k: int, precision: str) -> str | None:
    """Say why the kernels cannot serve the call in `precision`, or None when they can."""
    kernel = kernels.available()["quantised_attention"]
    if isinstance(kernel, str):
        return kernel
    return kernel.why_not(q, k, v, block_q, block_k, precision)


def low_precision_attention(q, k, v, **options):
    """(out, lse) of the whole sequence, or of the key blocks that `kv_indices` lists."""
    return kernels.available()["quantised_attention"].low_precision_attention(q, k, v, **options)


def dense_attention(q, k, v, **options):
    return kernels.available()["dense_attention"].dense_attention(q, k, v, **options)


def block_masses(q, k, lse, **options):
    return kernels.available()["block_masses"].block_masses(q, k, lse, **options)


def pooled_masses(q, k_mean, log_sizes, lse, **options):
    return kernels.available()["pooled_masses"].pooled_masses(q, k_mean, log_sizes, lse, **options)


def arrange(q, k, v, order, key_bias=None) -> Arranged:
    """Put tokens in `order` and the means of their blocks behind them."""
    kernel = kernels.available()["permute"]
    return arranged(q, k, v, order, key_bias, arrange=kernel.arrange)


def unpack_mask(bits, num_k: int, more: int = 0):
    return kernels.available()["unpack_mask"].unpack_mask(bits, num_k, more=more)


def sparse_attention(q, k, v, kv_indices, kv_num_blocks, **options):
    kernel = kernels.available()["attention"]
    return kernel.sparse_attention(q, k, v, kv_indices, kv_num_blocks, **options)
