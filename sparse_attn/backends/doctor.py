"""Checks this machine: who would serve a call and why, whether the results are right, how fast."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..block_mask import BlockMask
from . import choice, reference, tiles, tuned
from .cudnn import cudnn_serves, torch_cudnn

# a kernel may err this many times as much as torch does in the same dtype
FACTOR = 4.0


def report(user_directory: str | None = None) -> bool:
    """Print the checks; True when every result is right.

    Args:
        user_directory: of ComfyUI, where tuned tiles may lie.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    right, said = True, tiles_of(device, user_directory)
    for head_dim, dtype in _cases(device):
        q, k, v = _inputs(device, dtype, 2, 500, head_dim)
        backend, why = choice.choose(q, k, v, 64, 64)
        name = f"head_dim {head_dim}, {str(dtype).removeprefix('torch.')}"
        if backend is None:
            print(f"backend    {name}: none, {why}")
            right = False
            continue
        print(f"backend    {name}: {why}")
        for check, passed, detail in _check(backend, q, k, v):
            right &= passed
            print(f"check      {check}: {'right' if passed else 'WRONG'}, {detail}")
    if said:
        print(f"tiles      {said}")
    _speed(device)
    print("result     " + ("all checks passed" if right else "some checks failed; see above"))
    return right


def tiles_of(device: torch.device, user_directory: str | None = None) -> str:
    """What to say of the kernels' tiles: tuned, or never measured on a card of this kind."""
    card = tiles.card_of(device)
    if device.type != "cuda" or choice.why_no_triton():
        return ""
    said = tuned.use(Path(user_directory) / tuned.FILE, card) if user_directory else ""
    if said == tuned.USED or card in tiles.MEASURED:
        return said
    name = card if isinstance(card, str) else "sm_{}{}".format(*card)
    return f"{said}; " * bool(said) + (
        f"never measured on a card of this kind ({name}): they are right, and may be slow; "
        "`python run.py bench` measures them, and its line helps to choose better ones; with "
        "--tune it tries others here"
    )


def _cases(device):
    if device.type == "cuda":
        return [(128, torch.bfloat16), (64, torch.bfloat16), (128, torch.float16)]
    return [(128, torch.float32), (64, torch.bfloat16)]


def _inputs(device, dtype, heads, tokens, head_dim):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, tokens, heads, head_dim)
    return torch.randn(shape, generator=generator).to(device, dtype).transpose(2, 3)


def _check(backend, q, k, v):
    """Yield (name, passed, detail) for every part of the method, against float64."""
    scale = q.shape[-1] ** -0.5
    exact_q, exact_k, exact_v = exact_inputs = [x.double().cpu() for x in (q, k, v)]
    out, lse = backend.attention(q, k, v, scale=scale)
    exact, exact_lse = reference.attention(exact_q, exact_k, exact_v, scale=scale)
    torch_out, _ = reference.attention(q, k, v, scale=scale)
    yield _compare("dense attention", out, exact, torch_out)

    masses = backend.block_masses(q, k, lse, scale=scale, block_q=64, block_k=64)
    exact_masses = reference.block_masses(
        exact_q, exact_k, exact_lse, scale=scale, block_q=64, block_k=64
    )
    error = (masses.double().cpu() - exact_masses).abs().max().item() / 64
    yield "block masses", error < 1e-2, f"largest error {error:.1e} of a row"

    keep = torch.rand(masses.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    keep[..., 0] = True
    mask = BlockMask.from_dense(keep, block_q=64, block_k=64)
    on_device = mask.with_bits(mask.bits.to(q.device))
    # heads in different orders, as `similarity` finds them
    orders = torch.rand(q.shape[:3], generator=torch.Generator().manual_seed(2)).argsort(-1).int()
    for name, order in (("sparse attention", None), ("sparse attention with a tail", orders)):
        exact = _sparse(reference, exact_inputs, scale, mask, order)
        order = None if order is None else order.to(q.device)
        out, same = (_sparse(x, (q, k, v), scale, on_device, order) for x in (backend, reference))
        yield _compare(name, out, exact, same)


def _sparse(operations, qkv, scale, mask, order):
    """Sparse attention by a backend or the reference, pooled where there is an order."""
    if order is None:
        return operations.attention(*qkv, scale=scale, mask=mask)[0]
    moved = operations.permute(*qkv, order)
    return operations.attention(
        moved.q, moved.k, moved.v, scale=scale, mask=mask, pooled=moved.pooled, order=order
    )[0]


def _compare(name, out, exact, same_dtype):
    error = (out.double().cpu() - exact).abs().max().item()
    usual = (same_dtype.double().cpu() - exact).abs().max().item()
    return name, error <= FACTOR * usual + 1e-6, f"error {error:.1e}, torch's own {usual:.1e}"


def _speed(device):
    """Time one call of a long video against the dense attention that torch would run."""
    heads, tokens, head_dim = (24, 32_768, 128) if device.type == "cuda" else (4, 4_096, 64)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = _inputs(device, dtype, heads, tokens, head_dim)
    backend, _ = choice.choose(q, k, v, 64, 64)
    if backend is None:
        return
    scale = head_dim**-0.5
    blocks = tokens // 64
    keep = torch.zeros(1, heads, blocks, blocks, dtype=torch.bool, device=device)
    order = torch.rand(keep.shape, device=device).argsort(-1)
    keep.scatter_(-1, order[..., : round(0.2 * blocks)], True)
    mask = BlockMask.from_dense(keep, block_q=64, block_k=64)
    dense: dict[str, Callable] = {
        "torch": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    }
    if cudnn_serves(q):
        dense["torch's cuDNN"] = lambda: torch_cudnn(q, k, v, scale)
    sparse = _time(device, lambda: backend.attention(q, k, v, scale=scale, mask=mask))
    shape = f"{heads} heads x {tokens:,} tokens x {head_dim}"
    print(f"speed      {shape}: sparse at density 0.20 {sparse * 1e3:.1f} ms")
    for name, run in dense.items():
        seconds = _time(device, run)
        ratio = seconds / sparse
        print(f"speed      dense by {name} {seconds * 1e3:.1f} ms, sparse is {ratio:.1f}x as fast")


def _time(device, run) -> float:
    """Median seconds of five calls after two."""
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[2:])[2]
