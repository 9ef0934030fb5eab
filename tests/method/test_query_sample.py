from itertools import combinations

import torch

from sparse_attn.method.query_sample import query_sample

CPU = torch.device("cpu")


def test_a_quarter_of_a_cube_is_a_latin_square():
    """A block of 4 x 4 x 4 tokens: each frame, row and column, and each pair of them, counts alike."""
    sample = query_sample(256, 4, CPU).unflatten(0, (4, 16))
    assert (sample // 64 == torch.arange(4)[:, None]).all()
    axes = [sample // step % 4 for step in (1, 4, 16)]
    for one, other in combinations(axes, 2):
        assert all(len(set(pairs.tolist())) == 16 for pairs in one * 4 + other)


def test_every_block_has_its_share_and_no_place_is_past_the_end():
    for tokens, stride, block in (
        (1, 4, 64),
        (66, 4, 64),
        (131, 4, 64),
        (300, 4, 128),
        (70, 2, 64),
    ):
        sample = query_sample(tokens, stride, CPU)
        assert len(sample) == -(-tokens // stride) and sample.max() < tokens
        assert (sample.diff() > 0).all()
        # the sampled rows of a block are those of a block of block / stride rows of the sample
        own = torch.arange(len(sample)) // (block // stride)
        assert torch.equal(sample // block, own)
