import pytest

from sparse_attn.token_layout import TokenLayout


def test_counts_text_and_video():
    layout = TokenLayout(before=256, frames=33, height=45, width=80, after=7)
    assert layout.video == 118_800
    assert layout.tokens == 119_063


@pytest.mark.parametrize("tokens, blocks", [(1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_a_ragged_last_block_counts(tokens, blocks):
    assert TokenLayout(0, 1, 1, tokens).num_blocks(64) == blocks


def test_describes_itself_for_people():
    assert TokenLayout(0, 9, 20, 48).describe() == "8,640 tokens (9x20x48 video)"
    assert TokenLayout(20, 2, 3, 4, 6).describe() == "50 tokens (2x3x4 video, 26 other)"
