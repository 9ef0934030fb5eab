"""The emulated roundings of attention in eight bits."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "lab"), str(TESTS / "tiny_model")]

from close import assert_within  # noqa: E402
from eight_bits import Roundings  # noqa: E402

from sparse_attn.backends import reference  # noqa: E402
from sparse_attn.backends.permuted import Pooled  # noqa: E402
from sparse_attn.block_mask import BlockMask  # noqa: E402


@pytest.fixture
def call():
    """Tensors and options of a sparse call: five blocks, the last one short."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 64, generator=generator).bfloat16().unbind(0)
    order = torch.stack([torch.randperm(300, generator=generator) for _ in range(2)])[None].int()
    found = reference.permute(q, k, v, order)
    keep = torch.rand(1, 2, 5, 5, generator=generator) < 0.5
    mask = BlockMask.from_dense(keep, block_q=64, block_k=64)
    options = {"scale": 0.25, "mask": mask, "pooled": found.pooled, "order": order}
    return (found.q, found.k, found.v), options


def exact(qkv, options):
    pooled = Pooled(*(x.double() for x in vars(options["pooled"]).values()))
    return reference.attention(*(x.double() for x in qkv), **{**options, "pooled": pooled})[0]


def apart(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def test_without_roundings_it_is_attention(call):
    qkv, options = call
    assert_within("out", Roundings().attention(*qkv, **options)[0], exact(*call), 1e-2)


def test_it_rounds_as_the_kernel_does(call):
    from sparse_attn.backends.triton.quantised_attention import quantised_attention

    qkv, options = call
    kernel, _ = quantised_attention(*qkv, **options)
    # what the kernel errs by beside it are its rounded values
    alike, _ = Roundings(scores=True, weights="before").attention(*qkv, **options)
    assert apart(kernel, alike) < 0.6 * apart(kernel, exact(*call))
    assert apart(alike, exact(*call)) > 0.003
