"""A block mask as lists."""

import pytest
import torch

from sparse_attn.backends import tiles
from sparse_attn.block_mask import BlockMask
from tests.backends import inputs
from tests.backends.implementations import implementations

UNPACK = pytest.mark.parametrize("unpack_mask", implementations("unpack_mask", "torch", "triton"))
CHUNK = tiles.UNPACK_MASK.tile_k
# B, H, Nq, Nk, density
CASES = [
    (1, 1, 1, 1, 1.0),  # one block
    (2, 3, 5, 70, 0.2),  # a last byte that is not full
    (1, 2, 3, CHUNK, 1.0),  # every bit of exactly one chunk
    (1, 1, 4, 2 * CHUNK + 77, 0.3),  # the count carries over chunks
    (1, 1, 3, 100, 0.0),  # nothing kept
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-Nq{}-Nk{}-d{}".format(*c))
@UNPACK
def test_lists_are_ascending_and_packed_left(unpack_mask, case, device):
    B, H, Nq, Nk, density = case
    keep = torch.rand(B, H, Nq, Nk) < density
    indices, counts = unpack_mask(inputs.mask_of(keep, device))
    assert indices.shape == (B, H, Nq, Nk) and indices.dtype == counts.dtype == torch.int32
    assert torch.equal(counts.cpu(), keep.sum(-1, dtype=torch.int32))
    rows = (x.flatten(0, 2).cpu() for x in (keep, indices))
    for row, listed, count in zip(*rows, counts.flatten().tolist(), strict=True):
        assert listed[:count].tolist() == row.nonzero()[:, 0].tolist()


@UNPACK
def test_set_bits_past_the_last_block_are_ignored(unpack_mask, device):
    bits = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8, device=device)
    _, counts = unpack_mask(BlockMask(bits, 11, 64, 64))
    assert counts.tolist() == [[[11, 11]]]
