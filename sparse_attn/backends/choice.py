"""Who computes what: of every operation the fastest implementation that serves, and why not others.

Nobody else picks. An operation has one name and one signature in `torch`, `triton` and `hopper`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module

import torch

from . import tiles
from .torch import attention as torch_attention
from .torch import block_masses as torch_masses
from .torch import features as torch_features
from .torch import pca_tree as torch_pca_tree
from .torch import permute as torch_permute
from .torch import row_wise_top_k as torch_row_wise_top_k
from .torch import tail_error as torch_tail_error

OLDEST_TRITON = (3, 4)


@dataclass(frozen=True)
class Backend:
    """The implementation of every operation for tensors of one kind.

    Args:
        name: for people.
        one_pass_search: whether dense attention can measure masses on the way, where an earlier
            LSE is known.
        attention: attention(q, k, v, *, scale, key_bias=None, mask=None, pooled=None, order=None)
            -> (out, lse), dense without a mask.
        attention_with_masses: attention_with_masses(q, k, v, *, scale, previous_lse, block_q,
            block_k, key_bias=None) -> (out, lse, masses); None without `one_pass_search`.
        why_not_quantised: why_not_quantised(q, k, v, block_q, block_k) -> reason or None.
        quantised_attention: as `attention`, with INT8 scores; None where nothing serves.
        block_masses: block_masses(q, k, lse, *, block_q, block_k, scale, key_bias=None,
            renormalise=True, int8=False) -> masses [B, H, Nq, Nk].
        pooled_masses: pooled_masses(q, k_mean, log_sizes, lse, *, block_q, scale), the same of
            pooled keys.
        tail_error: tail_error(masses, pooled_masses, v, v_mean) -> scores; they take the place of
            the pooled masses.
        permute: permute(q, k, v, order, key_bias=None) -> `Permuted`.
        row_wise_top_k: row_wise_top_k(scores, masses, budgets, largest_budget, sink_k, sink_q) ->
            (keep, recall).
        features: features(q, k, centres, directions, places) -> [B, H, V, F].
        pca_tree: pca_tree(features [h, V, F]) -> order [h, V].
    """

    name: str
    one_pass_search: bool
    attention: Callable
    attention_with_masses: Callable | None
    why_not_quantised: Callable
    quantised_attention: Callable | None
    block_masses: Callable
    pooled_masses: Callable
    tail_error: Callable
    permute: Callable
    row_wise_top_k: Callable
    features: Callable
    pca_tree: Callable


class Backends:
    """The backends of a run, chosen once per kind of tensor.

    Args:
        block_q, block_k: tokens per query block and per key block.
    """

    def __init__(self, block_q: int, block_k: int):
        self.blocks = block_q, block_k
        self._chosen: dict[tuple, tuple[Backend | None, str]] = {}

    def of(self, q, k, v) -> tuple[Backend | None, str]:
        """Return what `choose` says of tensors like these."""
        key = q.device, q.dtype, k.dtype, v.dtype, q.shape[-1], k.shape[-1], v.shape[-1]
        if key not in self._chosen:
            self._chosen[key] = choose(q, k, v, *self.blocks)
        return self._chosen[key]


def choose(q, k, v, block_q: int, block_k: int) -> tuple[Backend | None, str]:
    """Return the first backend that can serve the call, and a line that says which and why.

    When none can, the backend is None and the line holds every reason.
    """
    reasons = []
    for why_not, backend in CANDIDATES:
        reason = why_not(q, k, v, block_q, block_k)
        if reason is None:
            chosen = backend(q.device)
            return chosen, f"{chosen.name} ({'; '.join(reasons)})" if reasons else chosen.name
        reasons.append(reason)
    return None, "; ".join(reasons)


@cache
def why_no_triton() -> str | None:
    """Reason why no kernel can run in this process, or None."""
    try:
        triton = import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(str(part) for part in OLDEST_TRITON)
        return f"needs Triton {oldest} or newer, got {triton.__version__}"
    return None


def _why_not_kernels(q, k, v, block_q: int, block_k: int) -> str | None:
    # under Triton's interpreter the kernels accept CPU tensors, for tests; nobody samples with it
    if q.device.type != "cuda":
        reason = f"needs a CUDA tensor, got {q.device.type}"
    else:
        reason = why_no_triton() or _kernel("launch").why_not(q, k, v, block_q, block_k)
    return None if reason is None else f"Triton kernels: {reason}"


def _why_not_torch(q, k, v, block_q: int, block_k: int) -> str | None:
    reason = torch_attention.why_not(q, k, v, block_q, block_k)
    return None if reason is None else f"plain torch: {reason}"


def _kernel(name: str, folder: str = "triton"):
    return import_module(f".{folder}.{name}", __package__)


@cache
def _has_gluon() -> bool:
    """Whether this Triton knows all of Gluon that the kernels for Hopper need."""
    try:
        for name in ("attention", "block_masses", "quantised_attention"):
            _kernel(name, "hopper")
    except (ImportError, AttributeError):
        # Gluon is younger than the oldest Triton served
        return False
    return True


def triton_kernels(device: torch.device | None = None) -> Backend:
    """The kernels for a device, or for the current one, and plain torch where they do not serve."""
    card = tiles.card_of(device)
    folder = "hopper" if card == tiles.HOPPER and _has_gluon() else "triton"
    attention, masses = _kernel("attention", folder), _kernel("block_masses", folder)
    said = tiles.in_use(card)[1]
    return Backend(
        name=f"Triton kernels ({said})" if said else "Triton kernels",
        one_pass_search=True,
        attention=attention.attention,
        attention_with_masses=attention.attention_with_masses,
        why_not_quantised=_kernel("quantised_attention").why_not_quantised,
        quantised_attention=_kernel("quantised_attention", folder).quantised_attention,
        block_masses=masses.block_masses,
        pooled_masses=_kernel("pooled_masses").pooled_masses,
        permute=_kernel("permute").permute,
        **_asked_at_every_call(),
    )


def compiling_kernels(card: tuple[int, int], claim: Callable, done: Callable) -> Backend:
    """The kernels for a card that need not be here, whose launches do nothing but compile.

    For a process that does nothing else; see `triton.compiling.only_compile`.
    """
    compiler().only_compile(card, claim, done)
    return _kernels_alone(card)


@contextmanager
def loading_kernels(card: tiles.Card) -> Iterator[Backend]:
    """The kernels for a card, whose launches by this thread do nothing but load their binaries.

    The thread does nothing else. Its tensors are of the CPU, and it takes no memory of the GPU.
    """
    backend = _kernels_alone(card)
    with compiler().only_load():
        yield backend


def _kernels_alone(card: tiles.Card) -> Backend:
    """The kernels for a card, for which this thread takes every device, and plain torch nowhere."""
    tiles.stand_for(card)
    alone = {name: getattr(_kernel(name), name) for name in _asked_at_every_call()}
    return replace(triton_kernels(), **alone)


def before_launches(device: torch.device, call: Callable) -> Callable:
    """Let call(key) come before every launch on a device; returns what takes that back.

    Args:
        call: gets `triton.compiling.launch_key` of the launch.
    """
    triton_kernels(device)
    for name in _asked_at_every_call():
        _kernel(name)
    return compiler().before_launches(call)


def compiler():
    """The module that knows of compiling without running; needs Triton."""
    return _kernel("compiling")


def plain_torch(device: torch.device | None = None) -> Backend:
    """Plain torch, and on a GPU kernels for what does not depend on the dtype of q, k and v."""
    return Backend(
        name="plain torch",
        # one pass over dense attention and masses took 0.88 s where two took 0.74 s: 4 heads x
        # 8,320 tokens x 64, float32, two cores of a 2.8 GHz Xeon
        one_pass_search=False,
        attention=torch_attention.attention,
        attention_with_masses=None,
        why_not_quantised=torch_attention.why_not_quantised,
        quantised_attention=None,
        block_masses=torch_masses.block_masses,
        pooled_masses=torch_masses.pooled_masses,
        permute=torch_permute.permute,
        **_asked_at_every_call(),
    )


def _asked_at_every_call() -> dict[str, Callable]:
    """Operations whose kernels serve some sizes and dtypes: each call goes where it can."""
    return {
        "tail_error": _where_it_serves("tail_error", torch_tail_error.tail_error),
        "row_wise_top_k": _where_it_serves("row_wise_top_k", torch_row_wise_top_k.row_wise_top_k),
        "features": _where_it_serves("features", torch_features.features),
        "pca_tree": _where_it_serves("pca_tree", torch_pca_tree.pca_tree),
    }


def _where_it_serves(name: str, plain: Callable) -> Callable:
    """The operation `name` by its kernel for the calls that this serves, else by `plain`."""

    def operation(*tensors):
        if tensors[0].device.type != "cuda" or why_no_triton():
            return plain(*tensors)
        kernel = _kernel(name)
        return (plain if kernel.why_not(*tensors) else getattr(kernel, name))(*tensors)

    return operation


# fastest first
CANDIDATES = ((_why_not_kernels, triton_kernels), (_why_not_torch, plain_torch))
