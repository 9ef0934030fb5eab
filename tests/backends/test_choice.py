"""Who is picked for which operation, and what is said of the others."""

import inspect
from dataclasses import fields
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from sparse_attn.backends import choice, doctor, reference
from tests.backends.implementations import file_of

OPERATIONS = [field.name for field in fields(choice.Backend) if "Callable" in str(field.type)]


def qkv(dtype=torch.float32):
    return torch.zeros(3, 1, 1, 64, 64).to(dtype).unbind(0)


def test_on_a_cpu_plain_torch_serves_and_says_why_the_kernels_do_not():
    backend, line = choice.choose(*qkv(), 64, 64)
    assert backend.name == "plain torch" and not backend.one_pass_search
    assert line == "plain torch (Triton kernels: needs a CUDA tensor, got cpu)"


def test_the_first_backend_that_can_is_taken_without_excuses(monkeypatch):
    def serves(*args):
        asked.append(args[3:])

    asked, fast = [], SimpleNamespace(name="fast")
    slow = (lambda *args: 1 / 0), choice.plain_torch
    monkeypatch.setattr(choice, "CANDIDATES", ((serves, lambda device: fast), slow))
    assert choice.choose(*qkv(), 128, 64) == (fast, "fast")
    assert asked == [(128, 64)]


def test_when_nobody_can_the_line_holds_every_reason(monkeypatch):
    candidates = [(lambda *args, n=name: f"{n}: no", None) for name in "ab"]
    monkeypatch.setattr(choice, "CANDIDATES", candidates)
    assert choice.choose(*qkv(), 64, 64) == (None, "a: no; b: no")


def test_a_run_chooses_once_for_tensors_of_a_kind(monkeypatch):
    asked = []
    monkeypatch.setattr(choice, "choose", lambda *args: asked.append(args[3:]) or ("it", ""))
    backends = choice.Backends(128, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert backends.of(*qkv(dtype)) == ("it", "")
    # another length is the same kind
    backends.of(*(x[:, :, :7] for x in qkv()))
    assert asked == 2 * [(128, 64)]


def test_integers_are_served_by_nobody():
    backend, line = choice.choose(*qkv(torch.int32), 64, 64)
    assert backend is None and "plain torch: needs floating point tensors, got torch.int32" in line


def test_head_dims_that_differ_are_served_by_nobody():
    q, k, v = qkv()
    backend, line = choice.choose(q, k, v[..., :32], 64, 64)
    assert backend is None and "one head_dim, got 64, 64 and 32" in line


def test_plain_torch_has_no_eight_bits_and_says_so():
    backend = choice.plain_torch()
    assert backend.quantised_attention is None
    assert backend.why_not_quantised(*qkv(), 64, 64) == "plain torch computes in float32"


FOLDERS = {
    "features": ("torch", "triton"),
    "pca_tree": ("torch", "triton"),
    "permute": ("torch", "triton"),
    "pooled_masses": ("torch", "triton"),
    "row_wise_top_k": ("torch", "triton"),
    "tail_error": ("torch", "triton"),
    "attention": ("torch", "triton", "hopper"),
    "block_masses": ("torch", "triton", "hopper"),
    "attention_with_masses": ("triton", "hopper"),
    "quantised_attention": ("triton", "hopper"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_has_one_signature_and_a_truth(operation):
    pytest.importorskip("triton")
    if operation == "why_not_quantised":
        modules = [import_module(f"sparse_attn.backends.{x}") for x in (
            "torch.attention", "triton.quantised_attention",
        )]  # fmt: skip
    else:
        files = [(folder, file_of(operation, folder)) for folder in FOLDERS[operation]]
        modules = [import_module(f"sparse_attn.backends.{x}.{y}") for x, y in files]
        modules.append(reference)
    signatures = [inspect.signature(getattr(module, operation)) for module in modules]
    asked = {tuple((x.name, x.kind, x.default) for x in s.parameters.values()) for s in signatures}
    assert len(asked) == 1, signatures


def test_no_operation_is_implemented_and_not_picked():
    assert set(FOLDERS) | {"why_not_quantised"} == set(OPERATIONS)


def test_what_a_kernel_does_not_serve_goes_to_plain_torch():
    """The kernels would take half precision alone; under the interpreter too."""
    features = choice.triton_kernels().pca_tree(torch.randn(1, 100, 8))
    assert features.sort(-1).values[0].tolist() == list(range(100))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_kernels_serve_half_precision(device):
    backend, line = choice.choose(*(x.to(device, torch.bfloat16) for x in qkv()), 64, 64)
    assert backend.name == line == "Triton kernels"


@pytest.mark.parametrize(
    ("card", "said"),
    [((9, 0), ""), ((8, 9), "(sm_89)"), ((12, 0), "(sm_120)"), ("gfx942", "(gfx942)")],
)
def test_the_doctor_warns_of_tiles_that_were_never_measured_on_a_card(monkeypatch, card, said):
    monkeypatch.setattr(doctor.tiles, "card_of", lambda device: card)
    monkeypatch.setattr(choice, "why_no_triton", lambda: None)
    found = doctor.tiles_of(torch.device("cuda"))
    assert f"never measured on a card of this kind {said}" in found if said else not found
    # without kernels no tile is in use
    assert not doctor.tiles_of(torch.device("cpu"))
    monkeypatch.setattr(choice, "why_no_triton", lambda: "Triton is not installed")
    assert not doctor.tiles_of(torch.device("cuda"))
