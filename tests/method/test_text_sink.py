import pytest

from sparse_attn.method.text_sink import count_sinks, sink_blocks
from sparse_attn.token_layout import TokenLayout
from tests.method import truth

LAYOUTS = [
    # before, video, after, block
    (0, 640, 0, 64),  # no text, no sink
    (64, 640, 0, 64),  # text fills exactly one block
    (65, 640, 0, 64),  # one text token in a video block
    (1, 639, 0, 64),
    (0, 640, 1, 64),  # the last token is text
    (0, 640, 64, 64),
    (0, 600, 100, 64),  # text starts inside a video block
    (70, 500, 33, 64),  # text at both ends, ragged
    (70, 10, 100, 64),  # both ends meet in one block
    (10, 4, 10, 64),  # one block holds everything
    (256, 1000, 0, 128),
    (3, 1000, 5, 128),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_marks_exactly_the_blocks_with_a_token_outside_the_video(case):
    before, video, after, block = case
    layout = TokenLayout(before, 1, 1, video, after)
    expected = truth.sink_blocks(layout, block)
    assert sink_blocks(layout, block).tolist() == expected
    assert count_sinks(layout, block) == sum(expected)
