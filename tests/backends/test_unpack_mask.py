import pytest
import torch

pytest.importorskip("triton")

from sparse_attn.backends.triton.unpack_mask import CHUNK, unpack_mask


def pack(keep):
    """[.., Nk] bool as bits, least significant first."""
    keep = torch.nn.functional.pad(keep, (0, -keep.shape[-1] % 8))
    keep = keep.unflatten(-1, (-1, 8)).to(torch.uint8)
    powers = 2 ** torch.arange(8, device=keep.device, dtype=torch.uint8)
    return (keep * powers).sum(-1, dtype=torch.uint8)


# B, H, Nq, Nk, density
CASES = [
    (1, 1, 1, 1, 1.0),  # one block
    (2, 3, 5, 70, 0.2),  # a last byte that is not full
    (1, 2, 3, CHUNK, 1.0),  # every bit of exactly one chunk
    (1, 1, 4, 2 * CHUNK + 77, 0.3),  # the count carries over chunks
    (1, 1, 3, 100, 0.0),  # nothing kept
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-H{}-Nq{}-Nk{}-d{}".format(*c))
def test_gives_back_the_kept_blocks_in_order(case, device):
    B, H, Nq, Nk, density = case
    keep = torch.rand(B, H, Nq, Nk, generator=torch.Generator().manual_seed(0)) < density
    indices, counts = unpack_mask(pack(keep).to(device), Nk)
    assert indices.shape == (B, H, Nq, Nk) and indices.dtype == counts.dtype == torch.int32
    assert torch.equal(counts.cpu(), keep.sum(-1, dtype=torch.int32))
    for b in range(B):
        for h in range(H):
            for i in range(Nq):
                expected = keep[b, h, i].nonzero()[:, 0].int()
                assert torch.equal(indices[b, h, i, : len(expected)].cpu(), expected)


def test_set_bits_past_the_last_block_are_ignored(device):
    bits = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8, device=device)
    _, counts = unpack_mask(bits, 11)
    assert counts.tolist() == [[[11, 11]]]


def test_narrow_lists_stay_in_bounds(device):
    bits = torch.full((1, 1, 3, 8), 255, dtype=torch.uint8, device=device)
    indices, counts = unpack_mask(bits, 64, max_blocks=20)
    assert indices.shape == (1, 1, 3, 20) and counts.tolist() == [[[20, 20, 20]]]
    assert torch.equal(indices[0, 0, 2].cpu(), torch.arange(20, dtype=torch.int32))


def test_refuses_bits_of_another_width(device):
    bits = torch.zeros(1, 1, 1, 3, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="needs 4 bytes for 25 key blocks, got 3"):
        unpack_mask(bits, 25)


def test_more_blocks_end_every_list(device):
    keep = torch.rand(1, 2, 3, 70, generator=torch.Generator().manual_seed(0)) < 0.3
    indices, counts = unpack_mask(pack(keep).to(device), 70, more=3)
    assert indices.shape == (1, 2, 3, 73)
    assert torch.equal(counts.cpu(), keep.sum(-1, dtype=torch.int32) + 3)
    expected = [*keep[0, 1, 2].nonzero()[:, 0].tolist(), 70, 71, 72]
    assert indices[0, 1, 2, : len(expected)].tolist() == expected
