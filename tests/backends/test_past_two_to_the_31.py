"""Kernels whose lists, orders or masks have more than 2^31 elements, which 32-bit offsets do not reach.

Each is asked for all heads at once and for the last one alone, whose offsets are small, and both must
agree. The large case needs a GPU with 80 GB: `python run.py test --gpu` runs it.
"""

import pytest
import torch
from close import assert_within

from sparse_attn.block_mask import BlockMask
from tests.backends.implementations import implementations

PAST = 2**31
# heads, blocks of a row
SMALL, LARGE = (2, 5), (40, 7400)
SIZES = pytest.mark.parametrize(
    "size",
    [
        pytest.param(SMALL, id="small"),
        pytest.param(
            LARGE,
            id="past 2^31",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available()
                or torch.cuda.get_device_properties(0).total_memory < 78e9,
                reason="a GPU with 80 GB: python run.py test --gpu",
            ),
        ),
    ],
)
BLOCKS = {"block_q": 64, "block_k": 64}
# of a mass, as where one is compared with the truth
MASS_TOLERANCE = 1e-3


def kernels(operation, *folders):
    return pytest.mark.parametrize("kernel", implementations(operation, *folders))


def is_past(size, *tensors) -> bool:
    """Whether all tensors are as large as the case says."""
    return size == SMALL or all(x.numel() > PAST for x in tensors)


def qkv(size, head_dim, device):
    heads, blocks = size
    return [
        torch.randn(1, heads, 64 * blocks - 20, head_dim, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    ]


def random_bits(size, device) -> BlockMask:
    """A mask that keeps about one block in 16, and of each row the first."""
    heads, blocks = size
    shape = 1, heads, blocks, -(-blocks // 8)
    bits = torch.full(shape, 255, dtype=torch.uint8, device=device)
    for _ in range(4):
        bits &= torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    bits[..., 0] |= 1
    return BlockMask(bits, blocks, 64, 64)


def last_of(mask: BlockMask) -> BlockMask:
    return mask.with_bits(mask.bits[:, -1:].contiguous())


@SIZES
@kernels("unpack_mask", "triton")
def test_lists_of_a_mask(kernel, size, device):
    mask = random_bits(size, device)
    indices, counts = kernel(mask)
    assert is_past(size, indices)
    alone, few = kernel(last_of(mask))
    assert torch.equal(counts[:, -1:], few)
    listed = torch.arange(size[1], device=device) < few[..., None]
    assert listed.any()
    assert torch.equal(indices[:, -1:][listed], alone[listed])


@SIZES
@kernels("row_wise_top_k", "triton")
def test_the_best_blocks_of_every_row(kernel, size, device):
    heads, blocks = size
    scores = torch.randn(1, heads, blocks, blocks, device=device)
    budgets = torch.full((1, heads), max(1, blocks // 5), device=device)
    sinks = torch.zeros(2, blocks, dtype=torch.bool, device=device)
    sinks[:, 0] = True
    options = max(1, blocks // 5), *sinks
    keep, recall = kernel(scores, scores.abs(), budgets, *options)
    assert is_past(size, scores, keep)
    last = scores[:, -1:].contiguous()
    alone, held = kernel(last, last.abs(), budgets[:, -1:], *options)
    assert torch.equal(keep[:, -1:], alone) and alone.any()
    assert_within("recall", recall[:, -1:], held, 1e-5)


@SIZES
@kernels("permute", "triton")
def test_tokens_in_another_order(kernel, size, device):
    q, k, v = qkv(size, 128, device)
    order = torch.rand(q.shape[:3], device=device).argsort(-1).int()
    found = kernel(q, k, v, order)
    assert is_past(size, found.q, found.k, found.v)
    rows = order[0, -1].long()
    for x, moved in ((q, found.q), (k, found.k), (v, found.v)):
        assert torch.equal(moved[0, -1], x[0, -1][rows])


@SIZES
@kernels("attention_with_masses", "triton", "hopper")
def test_masses_measured_on_the_way(kernel, size, device):
    q, k, v = qkv(size, 64, device)
    lse = torch.full(q.shape[:3], 8.0, device=device)
    out, _, masses = kernel(q, k, v, scale=0.125, previous_lse=lse, **BLOCKS)
    assert is_past(size, masses)
    last = [x[:, -1:].contiguous() for x in (q, k, v)]
    alone, _, few = kernel(*last, scale=0.125, previous_lse=lse[:, -1:], **BLOCKS)
    assert_within("masses", masses[:, -1:], few, MASS_TOLERANCE)
    assert torch.equal(out[:, -1:], alone) and few.sum() > 0


@SIZES
@kernels("block_masses", "triton", "hopper")
def test_masses_of_a_later_search(kernel, size, device):
    q, k, _ = qkv(size, 64, device)
    lse = torch.full(q.shape[:3], 8.0, device=device)
    masses = kernel(q, k, lse, scale=0.125, **BLOCKS)
    assert is_past(size, masses)
    few = kernel(q[:, -1:].contiguous(), k[:, -1:].contiguous(), lse[:, -1:], scale=0.125, **BLOCKS)
    assert_within("masses", masses[:, -1:], few, MASS_TOLERANCE)
    assert few.sum() > 0


@SIZES
@kernels("pooled_masses", "triton")
def test_masses_of_means(kernel, size, device):
    blocks = size[1]
    q, k, _ = qkv(size, 64, device)
    means = k[:, :, :blocks].contiguous()
    lse = torch.full(q.shape[:3], 8.0, device=device)
    sizes = torch.full((1, blocks), 4.0, device=device)
    masses = kernel(q, means, sizes, lse, block_q=64, scale=0.125)
    assert is_past(size, masses)
    last = q[:, -1:].contiguous(), means[:, -1:].contiguous(), sizes, lse[:, -1:].contiguous()
    few = kernel(*last, block_q=64, scale=0.125)
    assert_within("masses", masses[:, -1:], few, MASS_TOLERANCE)
    assert few.sum() > 0


@SIZES
@kernels("attention", "triton", "hopper")
def test_attention_by_lists_in_an_order(kernel, size, device):
    q, k, v = qkv(size, 64, device)
    mask = random_bits(size, device)
    order = torch.rand(q.shape[:3], device=device).argsort(-1).int()
    # the kernels read lists, one entry for each bit
    assert size == SMALL or 8 * mask.bits.numel() > PAST
    out, _ = kernel(q, k, v, scale=0.125, mask=mask, order=order)
    last = [x[:, -1:].contiguous() for x in (q, k, v)]
    alone, _ = kernel(*last, scale=0.125, mask=last_of(mask), order=order[:, -1:].contiguous())
    assert torch.equal(out[:, -1:], alone) and torch.isfinite(alone).all()
