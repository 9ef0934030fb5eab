import pytest
import torch

from sparse_attn.block_mask import MAP_SIZE, MOST_PAIRS, BlockMask, mask_blocks


def random_keep(num_k, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 5, num_k, generator=generator) < density


@pytest.mark.parametrize("num_k", [1, 7, 8, 9, 16, 23, 130])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_bits_round_trip(num_k, density):
    keep = random_keep(num_k, density)
    mask = BlockMask.from_dense(keep, block_q=64, block_k=64)
    assert mask.bits.shape == (2, 3, 5, -(-num_k // 8)) and mask.bits.dtype == torch.uint8
    assert torch.equal(mask.to_dense(), keep)


def test_bit_j_of_byte_b_is_block_8b_plus_j():
    keep = torch.zeros(1, 1, 1, 11, dtype=torch.bool)
    keep[..., [0, 3, 9]] = True
    mask = BlockMask.from_dense(keep, block_q=64, block_k=128)
    assert mask.bits.flatten().tolist() == [0b1001, 0b10]
    assert (mask.num_k, mask.block_q, mask.block_k) == (11, 64, 128)


def test_density_is_the_kept_share_of_each_head():
    keep = torch.zeros(1, 2, 4, 10, dtype=torch.bool)
    keep[0, 1, 0, :4] = True
    mask = BlockMask.from_dense(keep, block_q=64, block_k=64)
    torch.testing.assert_close(mask.density(), torch.tensor([[0.0, 0.1]]))


@pytest.mark.parametrize("rows, each", [(1, 2), (2, 1), (2, 2), (3, 5)])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 700, 1024, 3210])
def test_large_blocks_come_apart(rows, each, tokens):
    num_q, num_k = -(-tokens // 64), -(-tokens // 32)
    shape = 2, 3, -(-tokens // (64 * rows)), -(-tokens // (32 * each))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    mask = BlockMask.from_dense(keep, block_q=64 * rows, block_k=32 * each)
    found = mask.of_blocks(tokens, block_q=64, block_k=32)
    wanted = keep.repeat_interleave(rows, -2).repeat_interleave(each, -1)[..., :num_q, :num_k]
    wanted = BlockMask.from_dense(wanted, block_q=64, block_k=32)
    assert torch.equal(found.bits, wanted.bits) and found.bits.is_contiguous()
    assert (found.num_k, found.block_q, found.block_k) == (num_k, 64, 32)
    assert wanted.of_blocks(tokens, block_q=64, block_k=32) is wanted


def test_a_mask_has_at_most_so_many_pairs():
    seconds = {119_056: (64, 64), 227_056: (64, 64), 349_456: (128, 64), 522_256: (128, 128)}
    for tokens, sizes in seconds.items():
        assert tuple(mask_blocks(tokens, block_q=64, block_k=64).values()) == sizes
    assert tuple(mask_blocks(522_256, block_q=128, block_k=64).values()) == (128, 128)
    for tokens in (1, 262_144, 262_145, 522_256, 3_000_000):
        for small in ((64, 64), (128, 64), (128, 128)):
            found = list(mask_blocks(tokens, *small).values())
            assert all(size % least == 0 for size, least in zip(found, small, strict=True))
            assert pairs(tokens, *found) <= MOST_PAIRS and max(found) <= 2 * min(found)
            # no larger than it takes
            for i, least in enumerate(small):
                finer = [size - least * (i == j) for j, size in enumerate(found)]
                assert not finer[i] or pairs(tokens, *finer) > MOST_PAIRS


def pairs(tokens, block_q, block_k):
    return -(-tokens // block_q) * -(-tokens // block_k)


@pytest.mark.parametrize("size, walked", [(64, 64), (128, 128), (192, 64), (256, 128)])
def test_attention_walks_the_largest_blocks_that_it_can(size, walked):
    tokens = 5 * size - 1
    keep = random_keep(-(-tokens // 64))
    mask = BlockMask.from_dense(keep, block_q=size, block_k=64)
    found = mask.as_walked(tokens)
    assert (found.block_q, found.block_k) == (walked, 64)
    rows = keep.repeat_interleave(size // walked, -2)
    assert torch.equal(found.to_dense(), rows[..., : found.bits.shape[-2], :])


def test_other_bits_keep_the_geometry():
    mask = BlockMask.from_dense(random_keep(9), block_q=64, block_k=128)
    other = mask.with_bits(torch.zeros_like(mask.bits))
    assert not other.to_dense().any() and other.to_dense().shape == mask.to_dense().shape
    assert (other.num_k, other.block_q, other.block_k) == (9, 64, 128)


def block_map(keep):
    return BlockMask.from_dense(keep, block_q=64, block_k=64).block_map()


def test_a_map_is_made_of_one_head_at_a_time(monkeypatch):
    """The pairs of all heads of a long video would be gigabytes."""
    seen, to_dense = [], BlockMask.to_dense

    def noted(self):
        found = to_dense(self)
        seen.append(tuple(found.shape))
        return found

    monkeypatch.setattr(BlockMask, "to_dense", noted)
    block_map(torch.rand(2, 3, 4, 5) < 0.5)
    assert seen == 3 * [(1, 1, 4, 5)]


def test_a_small_map_is_exact():
    keep = torch.rand(2, 2, 5, 5) < 0.5
    assert torch.equal(block_map(keep), keep[0].to(torch.uint8) * 255)


def test_a_map_of_tall_blocks_has_fewer_rows_than_columns():
    keep = torch.rand(2, 2, 3, 5) < 0.5
    assert torch.equal(block_map(keep), keep[0].to(torch.uint8) * 255)
    assert block_map(torch.ones(1, 1, 90, 180, dtype=torch.bool)).shape == (1, 90, MAP_SIZE)


def test_a_large_map_is_averaged():
    size = 2 * MAP_SIZE
    keep = torch.zeros(1, 1, size, size, dtype=torch.bool)
    keep[..., ::2, ::2] = True
    cells = block_map(keep)
    assert cells.shape == (1, MAP_SIZE, MAP_SIZE) and (cells == 64).all()
