"""What is said before a run, against counting by hand."""

import pytest

from sparse_attn.config import AdaSpaConfig
from sparse_attn.run.cache import predict
from sparse_attn.run.estimate import estimate, kept_share, too_short
from sparse_attn.schedule import Schedule, StepKind
from sparse_attn.token_layout import TokenLayout

KINDS = {"D": StepKind.DENSE, "S": StepKind.SEARCH, "s": StepKind.SPARSE}
# 21 x 45 x 80 = 75,600 tokens: 1,182 blocks, of which 0.2 are 236
WAN_720P = TokenLayout(0, 21, 45, 80)
MODEL = {"layers": 40, "batch": 1, "heads": 40}


def of(kinds, layout=WAN_720P, one_pass=True, carried=False, windows=False, **config):
    sigmas = tuple(float(x) for x in range(len(kinds), 0, -1))
    schedule = Schedule(tuple(KINDS[k] for k in kinds), 0, len(kinds), sigmas)
    settings = AdaSpaConfig(**{"tail": "none", **config})
    return estimate(
        layout, schedule, settings, one_pass=one_pass, carried=carried, windows=windows, **MODEL
    )


@pytest.mark.parametrize(
    "kinds, one_pass, carried, spent",
    [
        # spent: whole dense passes, and sparse ones
        ("DDSs", True, False, (3, 1)),  # the search is its dense pass
        ("DDSs", False, False, (3.5, 1)),  # and half a pass more
        ("Ssss", True, False, (1.5, 3)),  # no LSE before it
        ("SsSs", True, False, (2, 3)),  # a later search, then sparse
        ("DSss", True, True, (1, 3)),  # no search
        ("DSsS", True, True, (1.5, 3)),  # the second search is one
    ],
)
def test_blocks_are_counted_step_by_step(kinds, one_pass, carried, spent):
    dense, sparse = spent
    expected = 1 - (dense + sparse * 236 / 1182) / len(kinds)
    found = of(kinds, one_pass=one_pass, carried=carried)
    assert found.skipped == pytest.approx(expected)


def test_dense_layers_skip_nothing():
    whole = of("DSss").skipped
    # -40 is layer 0 again, and 99 none
    assert of("DSss", dense_layers=(0, -1, -40, 99)).skipped == pytest.approx(whole * 38 / 40)


def test_text_keeps_its_rows_and_columns():
    # 128 of 1,280 tokens are text: 2 of 20 blocks; 4 of 20 kept in the other rows
    layout = TokenLayout(128, 8, 12, 12)
    share = kept_share(layout, AdaSpaConfig(sparsity=0.8, tail="none"))
    assert share == pytest.approx((18 * 4 + 2 * 20) / 400)


def test_text_keeps_rows_and_columns_of_their_own_sizes():
    # 100 tokens of text: 1 of 11 query blocks, 2 of 22 key blocks; 4 of 22 in the other rows
    layout = TokenLayout(100, 8, 12, 13)
    config = AdaSpaConfig(sparsity=0.8, block_size="128x64", tail="none")
    assert kept_share(layout, config) == pytest.approx((10 * 4 + 1 * 22) / (11 * 22))


def test_averages_of_skipped_blocks_count_as_blocks():
    # text lies behind the video: 100 of 1,348 tokens in 3 of 22 blocks; one block of averages
    layout = TokenLayout(100, 8, 12, 13)
    share = kept_share(layout, AdaSpaConfig(sparsity=0.8))
    assert share == pytest.approx((19 * (4 + 1) + 3 * 22) / (22 * 22))
    # 19 blocks of averages for 1,182 of tokens
    assert kept_share(WAN_720P, AdaSpaConfig()) == pytest.approx((236 + 19) / 1182)
    assert kept_share(WAN_720P, AdaSpaConfig(block_size="128")) == pytest.approx(118 / 591)
    assert kept_share(layout, AdaSpaConfig(sparsity=0.0)) == 1


def test_memory_is_the_prediction():
    found = of("DSss")
    schedule = Schedule(tuple(KINDS[k] for k in "DSss"), 0, 4, (4.0, 3.0, 2.0, 1.0))
    size = predict(schedule, tokens=75_600, block_q=64, block_k=64, one_pass=True, **MODEL)
    assert found.held_bytes == size.total > 0
    fewer = of("DSss", dense_layers=tuple(range(20)))
    assert fewer.held_bytes == size.total / 2


def test_the_line_says_what_it_counts():
    line = of("DSss").line()
    assert line.startswith("75,600 tokens, steps 0 dense, 1 search, 2-3 sparse: skips 40% of")
    assert "counted in blocks, not in seconds" in line
    assert line.endswith("holds 0.45 GiB for each prompt")
    assert "\n" not in line


def test_the_line_of_a_recall_promises_no_share():
    line = of("DSss", recall=0.95).line()
    assert line.startswith("75,600 tokens, steps 0 dense, 1 search, 2-3 sparse: the search decides")
    assert "what a recall of 0.95 can skip; holds 0.26 GiB" in line


def test_the_line_counts_memory_by_context_window():
    line = of("DSss", windows=True).line()
    assert line.endswith("holds 0.45 GiB for each prompt and each context window")


def test_a_run_without_gain_is_told_so():
    assert of("DD").line() == "75,600 tokens, steps 0-1 dense: nothing to gain in these steps"
    assert "nothing to gain" in of("S").line()


@pytest.mark.parametrize(
    "layout, words",
    [
        (TokenLayout(0, 5, 30, 52), "too short: leave AdaSpa off; 7,800 tokens run dense, and it "
         "begins at 8,192"),
        (TokenLayout(0, 1, 200, 200), "one frame is an image"),
        (TokenLayout(392, 5, 30, 52), ""),
    ],
)  # fmt: skip
def test_short_sequences_are_told_to_leave_it_off(layout, words):
    found = of("DSss", layout)
    assert words in too_short(layout, AdaSpaConfig())
    assert bool(found.too_short) == bool(words)
    if words:
        assert found.line() == found.too_short and found.skipped == 0
