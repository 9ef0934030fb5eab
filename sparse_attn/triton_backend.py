"""The backend of Triton kernels, for GPUs."""

from . import kernels

# the dense kernel writes masses in the same pass when it knows an earlier LSE
ONE_PASS_SEARCH = True


def why_not(q, k, v, block_q: int, block_k: int) -> str | None:
    """Say why the kernels cannot serve the call, or None when they can."""
    # under Triton's interpreter the kernels accept CPU tensors, for tests; nobody samples with it
    if q.device.type != "cuda":
        return f"needs a CUDA tensor, got {q.device.type}"
    return kernels.why_not(q, k, v, block_q, block_k)


def dense_attention(q, k, v, **options):
    return kernels.available()["dense_attention"].dense_attention(q, k, v, **options)


def block_masses(q, k, lse, **options):
    return kernels.available()["block_masses"].block_masses(q, k, lse, **options)


def unpack_mask(bits, num_k: int):
    return kernels.available()["unpack_mask"].unpack_mask(bits, num_k)


def sparse_attention(q, k, v, kv_indices, kv_num_blocks, **options):
    kernel = kernels.available()["sparse_attention"]
    return kernel.sparse_attention(q, k, v, kv_indices, kv_num_blocks, **options)
