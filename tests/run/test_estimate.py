"""What is said before a run, against counting by hand."""

import pytest
import torch

from sparse_attn.block_mask import BlockMask
from sparse_attn.config import BLOCK_SIZES, AdaSpaConfig
from sparse_attn.run.estimate import (
    CacheSize,
    Workload,
    cache_size,
    estimate,
    kept_share,
    why_not_worth,
)
from sparse_attn.token_layout import TokenLayout
from tests.run.fakes import schedule

GIB = 2**30
# 21 x 45 x 80 = 75,600 tokens: 1,182 blocks, of which 0.2 are 236
WAN_720P = TokenLayout(0, 21, 45, 80)


def settings(**fields):
    return AdaSpaConfig(**{"tail": "none", **fields})


def of(kinds, layout=WAN_720P, one_pass=True, carried=False, windows=False, sparse=40, **config):
    """Of a model of 40 layers of 40 heads."""
    return estimate(
        Workload(layout, 40, sparse, 1, 40, windows), schedule(kinds), settings(**config),
        one_pass=one_pass, carried=carried,
    )  # fmt: skip


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
    assert of("DSss", sparse=38).skipped == pytest.approx(whole * 38 / 40)


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
    # 24 s: 810 of 4,050 blocks of 128 tokens, and 64 tiles of 64 averages, each of 128 tokens
    assert kept_share(TokenLayout(0, 144, 45, 80), AdaSpaConfig()) == pytest.approx(
        (810 + 32) / 4050
    )


def test_memory_is_that_of_the_sparse_layers():
    work = Workload(WAN_720P, 40, 40, 1, 40)
    whole = cache_size(work, schedule("DSss"), settings(), one_pass=True).total
    assert of("DSss").held_bytes == whole > 0
    assert of("DSss", sparse=20).held_bytes == whole / 2


def test_the_line_says_what_it_counts():
    assert of("DSss").said() == [
        "75,600 tokens. Skips 40% of the video's attention, counted in blocks.",
        "Holds 0.26 GiB for each prompt.",
    ]


def test_the_line_of_a_recall_promises_no_share():
    first, holds = of("DSss", recall=0.95).said()
    assert first == "75,600 tokens. The search decides what a recall of 0.95 can skip."
    assert holds.startswith("Holds 0.26 GiB")


def test_the_line_counts_memory_by_context_window():
    said = of("DSss", windows=True).said()
    assert said[-1] == "Holds 0.26 GiB for each prompt and each context window."


def test_a_run_without_gain_is_told_so():
    for kinds in ("DD", "S"):
        assert of(kinds).said() == ["75,600 tokens. Nothing to gain in these steps."]


WORTH = [
    (TokenLayout(0, 5, 30, 52), "too short: 7,800 tokens, and `min_tokens` is 8,192"),
    (TokenLayout(0, 1, 200, 200), "one frame is an image, not a video"),
    (TokenLayout(392, 5, 30, 52), ""),
]


@pytest.mark.parametrize("layout, words", WORTH)
def test_sequences_that_gain_nothing_are_told_so(layout, words):
    assert why_not_worth(layout, AdaSpaConfig()) == words


# ---- memory


def sizes(kinds, one_pass=False, tokens=1000, batch=1, **config):
    """Of two layers of three heads."""
    work = Workload(TokenLayout(0, 1, 1, tokens), 2, 2, batch, 3)
    return cache_size(work, schedule(kinds), settings(**config), one_pass)


def test_hunyuan_video_at_720p_stays_below_a_gib():
    # 129 frames; the paper's schedule searches twice
    work = Workload(TokenLayout(240, 33, 45, 80), 60, 60, 1, 24)
    assert work.layout.tokens == 119_040
    size = cache_size(work, schedule("DDSssSss"), settings(), one_pass=True)
    assert size.mask_bytes / GIB == pytest.approx(0.59, abs=0.015)
    assert size.lse_bytes / GIB == pytest.approx(0.162, abs=0.0005)
    assert size.total <= GIB


@pytest.mark.parametrize(
    "tokens, block_size",
    [(1000, "64"), (1024, "64"), (8320, "64"), (1000, "128"), (1000, "128x64")],
)
def test_a_mask_takes_what_its_bits_take(tokens, block_size):
    block_q, block_k = BLOCK_SIZES[block_size]
    keep = torch.ones(2, 3, -(-tokens // block_q), -(-tokens // block_k), dtype=torch.bool)
    bits = BlockMask.from_dense(keep, block_q=block_q, block_k=block_k).bits
    size = sizes("Ss", batch=2, tokens=tokens, block_size=block_size)
    assert size == CacheSize(mask_bytes=2 * bits.nbytes, lse_bytes=0)


MASK, LSE, ORDER = 2 * 3 * 16 * 2, 2 * 3 * (1000 + 4 * 4), 2 * 3 * 1000 * 2

FULLEST = [
    # kinds, one pass, mask bytes, LSE bytes
    ("DDDD", True, 0, 0),  # nothing is searched
    ("Ssss", True, MASK, 0),  # no dense step leaves an LSE
    ("DSss", False, MASK, 0),  # two passes need no earlier LSE
    ("DSss", True, 0, LSE),  # the LSE gives way to the masks layer by layer
    ("DSsS", False, MASK, LSE),  # the first search's LSE waits for the second
    ("DSsS", True, MASK, LSE),
]


@pytest.mark.parametrize("kinds, one_pass, mask, lse", FULLEST)
def test_what_is_held_at_the_fullest_moment(kinds, one_pass, mask, lse):
    assert sizes(kinds, one_pass) == CacheSize(mask, lse)


def test_orders_stay_with_the_masks():
    for kinds, one_pass, lse in (("DSss", True, 0), ("DSsS", True, LSE), ("Ssss", False, 0)):
        assert sizes(kinds, one_pass, tail="pooled") == CacheSize(MASK, lse, ORDER)
    assert sizes("DDDD", tail="pooled").total == 0
    found = sizes("DSsS", recall=0.9, tail="pooled")
    assert found == CacheSize(MASK, 0, ORDER) and found.total == MASK + ORDER
    # by position all heads share one order
    assert sizes("Ssss", tail="pooled", token_order="position") == CacheSize(MASK, 0)


@pytest.mark.parametrize("block_size", ["64", "128x64"])
@pytest.mark.parametrize("density", [0.2, 0.1])
def test_a_video_of_24_s_holds_5_gib_at_most(block_size, density):
    work = Workload(TokenLayout(0, 145, 45, 80, 256), 60, 60, 1, 24)
    assert work.layout.tokens == 522_256
    config = settings(tail="pooled", block_size=block_size, sparsity=1 - density)
    size = cache_size(work, schedule("DDSssSss"), config, one_pass=True)
    assert 0.99 * 5 * GIB < size.total <= 5 * GIB
    # a carried mask may be of the small blocks
    carried = cache_size(work, schedule("DDSssSss"), config, one_pass=True, carried=True)
    times = 4 if block_size == "64" else 2
    assert carried.mask_bytes / size.mask_bytes == pytest.approx(times, rel=2e-3)


def test_a_search_that_measures_its_own_lse_keeps_none():
    for kinds in ("DSss", "DSsS"):
        assert sizes(kinds, True, recall=0.9) == CacheSize(MASK, 0)


def test_masks_outgrow_the_lse_of_a_very_long_video():
    # a mask grows with the square of the length
    size = sizes("DSss", one_pass=True, tokens=200_000)
    assert size.mask_bytes > 2 * 3 * 200_000 * 4 and size.lse_bytes == 0
