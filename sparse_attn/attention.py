"""Which backend serves a call, and why the others do not."""

from types import ModuleType

from . import eager, triton_backend

# fastest first; each has `why_not`, `dense_attention`, `block_masses`, `unpack_mask`,
# `sparse_attention` and `ONE_PASS_SEARCH`
BACKENDS = {"Triton kernels": triton_backend, "plain torch": eager}


def choose(q, k, v, block_size: int) -> tuple[ModuleType | None, str]:
    """Return the first backend that can serve the call, and a line that says which and why.

    When none can, the module is None and the line holds every reason.
    """
    reasons = []
    for name, backend in BACKENDS.items():
        reason = backend.why_not(q, k, v, block_size, block_size)
        if reason is None:
            return backend, f"{name} ({'; '.join(reasons)})" if reasons else name
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)
