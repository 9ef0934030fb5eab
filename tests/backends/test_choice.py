from types import SimpleNamespace

import pytest
import torch

from sparse_attn.backends import choice as attention
from sparse_attn.backends import triton_backend
from sparse_attn.backends.torch import attention as eager

NEEDED = {
    "why_not", "dense_attention", "block_masses", "unpack_mask", "sparse_attention",
    "why_not_low_precision",
}  # fmt: skip


def qkv(dtype=torch.float32):
    return torch.zeros(3, 1, 1, 64, 64).to(dtype).unbind(0)


def test_on_a_cpu_plain_torch_serves_and_says_why_the_kernels_do_not():
    backend, line = attention.choose(*qkv(), 64, 64)
    assert backend is eager
    assert line == "plain torch (Triton kernels: needs a CUDA tensor, got cpu)"


def test_the_first_backend_that_can_is_taken_without_excuses(monkeypatch):
    def serves(*args):
        asked.append(args[3:])

    asked = []
    fast = SimpleNamespace(why_not=serves)
    monkeypatch.setattr(attention, "BACKENDS", {"fast": fast, "slow": eager})
    assert attention.choose(*qkv(), 128, 64) == (fast, "fast")
    assert asked == [(128, 64)]


def test_when_nobody_can_the_line_holds_every_reason(monkeypatch):
    backends = {name: SimpleNamespace(why_not=lambda *a, n=name: f"no {n}") for name in "ab"}
    monkeypatch.setattr(attention, "BACKENDS", backends)
    assert attention.choose(*qkv(), 64, 64) == (None, "a: no a; b: no b")


def test_a_run_chooses_once_for_tensors_of_a_kind(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "choose", lambda *args: asked.append(args[3:]) or (eager, ""))
    backends = attention.Backends(128, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert backends.of(*qkv(dtype)) == (eager, "")
    # another length is the same kind
    backends.of(*(x[:, :, :7] for x in qkv()))
    assert asked == 2 * [(128, 64)]


def test_integers_are_served_by_nobody():
    backend, line = attention.choose(*qkv(torch.int32), 64, 64)
    assert backend is None and "needs floating point tensors, got torch.int32" in line


@pytest.mark.parametrize("backend", [triton_backend, eager], ids=lambda m: m.__name__)
def test_every_backend_has_what_a_run_calls(backend):
    assert not NEEDED - set(dir(backend))
    assert isinstance(backend.ONE_PASS_SEARCH, bool)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_kernels_serve_half_precision(device):
    backend, line = attention.choose(*(x.to(device, torch.bfloat16) for x in qkv()), 64, 64)
    assert backend is triton_backend and line == "Triton kernels"
