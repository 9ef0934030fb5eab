import dataclasses

import pytest

from sparse_attn.config import PRESET_FIELDS, PRESETS, AdaSpaConfig, from_preset, parse_numbers

REFUSED = [
    # field, value, what the sentence must hold
    ("sparsity", -0.01, "`sparsity` must be from 0 to 0.98, got -0.01. Try 0.8"),
    ("sparsity", 0.99, "got 0.99. Try 0.8"),
    ("sparsity", float("nan"), "got nan. Try 0.8"),
    ("block_size", "32", "`block_size` must be one of 64, 128, 128x64, got 32. Try 64"),
    ("warmup", 1.0, "`warmup` must be a share of the schedule from 0 to below 1, got 1.0"),
    ("warmup", -0.1, "got -0.1. Try 0.12"),
    ("search_points", (0.6, 0.3), "must ascend, got [0.6, 0.3]. Write them in order"),
    ("search_points", (0.5, 0.5), "must ascend"),
    ("search_points", (0.05,), "must lie from the warm-up (0.12) to below 1, got 0.05"),
    ("search_points", (0.5, 1.0), "got 1.0. The first search follows the warm-up"),
    ("search_points", (float("nan"),), "got nan"),
    ("start_percent", 1.0, "below `end_percent`, which is at most 1, got 1.0 and 1.0. Try 0 and 1"),
    ("start_percent", -0.1, "got -0.1 and 1.0"),
    ("end_percent", 1.1, "got 0.0 and 1.1"),
    ("min_tokens", -1, "`min_tokens` must be 0 or more, got -1. Try 8192"),
    ("cache", "disk", "`cache` must be one of auto, gpu, cpu, got disk. Try auto"),
    ("precision", "fp4", "must be one of auto, bf16, int8, fp8, got fp4. Try auto"),
    (
        "recall",
        1.0,
        "`recall` must be 0 or from 0.1 to 0.999, got 1.0. Try 0.95; 0 leaves the choice",
    ),
    ("recall", 0.05, "got 0.05"),
    ("recall", float("nan"), "got nan"),
    ("dense_attention", "sage", "must be one of auto, host, got sage. Try auto"),
]


@pytest.mark.parametrize("field, value, message", REFUSED, ids=lambda x: str(x)[:20])
def test_a_value_out_of_range_is_refused_with_a_hint(field, value, message):
    with pytest.raises(ValueError) as error:
        AdaSpaConfig(**{field: value})
    assert message in str(error.value)


ACCEPTED = [
    {"sparsity": 0.0},  # keeps everything
    {"sparsity": 0.98},
    {"warmup": 0.0},  # searches in the first step
    {"warmup": 0.3, "search_points": (0.3, 0.9)},  # the first point is the first search
    {"sparsity": 1 / 3, "head_adaptive": True},  # the least that head-adaptive can move from
    {"start_percent": 0.4, "end_percent": 0.6},
    {"dense_layers": (0, -1)},
    {"recall": 0.1},
    {"recall": 0.999, "precision": "fp8"},
]


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_the_edges_of_each_range_are_accepted(fields):
    config = AdaSpaConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_head_adaptive_needs_room_on_both_sides():
    with pytest.raises(ValueError, match=r"at least 0.34, got 0.2. Raise the sparsity"):
        AdaSpaConfig(sparsity=0.2, head_adaptive=True)


def test_a_recall_takes_the_place_of_head_adaptive():
    with pytest.raises(ValueError, match="so `head_adaptive` must be off"):
        AdaSpaConfig(recall=0.9, head_adaptive=True)
    with pytest.raises(ValueError, match="the preset Paper is head-adaptive"):
        from_preset("Paper", recall=0.9)
    assert from_preset("Fast", recall=0.9).recall == 0.9


def test_only_the_user_asks_for_low_precision():
    wishes = {p: AdaSpaConfig(precision=p).low_precision for p in ("auto", "bf16", "int8", "fp8")}
    assert wishes == {"auto": None, "bf16": None, "int8": "int8", "fp8": "int8"}
    assert all(preset.precision == "auto" for preset in PRESETS.values())


def test_a_config_cannot_change_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdaSpaConfig().sparsity = 2.0


def test_density_is_what_sparsity_leaves():
    assert AdaSpaConfig(sparsity=0.7).density == pytest.approx(0.3)


def test_a_block_size_names_queries_and_keys():
    sizes = {name: AdaSpaConfig(block_size=name) for name in ("64", "128", "128x64")}
    assert {name: (c.block_q, c.block_k) for name, c in sizes.items()} == {
        "64": (64, 64), "128": (128, 128), "128x64": (128, 64),
    }  # fmt: skip


def test_presets_hold_the_designed_values():
    values = {name: (p.sparsity, p.warmup, p.search_points) for name, p in PRESETS.items()}
    assert values == {
        "Quality": (0.7, 0.2, (0.6,)),
        "Balanced": (0.8, 0.12, (0.45,)),
        "Fast": (0.9, 0.1, (0.45,)),
        "Paper": (0.8, 0.2, (0.6,)),
    }
    assert all(preset.block_size == "64" for preset in PRESETS.values())
    assert [name for name, preset in PRESETS.items() if preset.head_adaptive] == ["Paper"]
    assert [name for name, preset in PRESETS.items() if preset.tail == "none"] == ["Paper"]
    assert all(preset.pooled == (preset.tail == "pooled") for preset in PRESETS.values())
    assert all(preset.by_similarity == preset.pooled for preset in PRESETS.values())
    gaps = {name: preset.search_gap for name, preset in PRESETS.items()}
    assert gaps == {"Quality": 3, "Balanced": 3, "Fast": 3, "Paper": 0}
    strides = {name: preset.query_stride for name, preset in PRESETS.items()}
    assert strides == {"Quality": 4, "Balanced": 4, "Fast": 4, "Paper": 1}


def test_a_tail_needs_blocks_of_64_keys():
    for block_size, pooled in (("64", True), ("128x64", True), ("128", False)):
        config = AdaSpaConfig(block_size=block_size)
        assert config.tail == "pooled" and config.pooled == pooled
        assert bool(config.why_no_tail) != pooled
        config = AdaSpaConfig(block_size=block_size, tail="none")
        assert not config.pooled and config.why_no_tail == ""
    with pytest.raises(ValueError, match=r"`tail` must be one of .*, got weighted. Try pooled"):
        AdaSpaConfig(tail="weighted")


def test_only_a_tail_orders_heads_by_similarity():
    for fields, similar in (
        ({}, True),
        ({"token_order": "position"}, False),
        ({"tail": "none"}, False),
        ({"block_size": "128"}, False),
    ):
        assert AdaSpaConfig(**fields).by_similarity == similar
    with pytest.raises(ValueError, match=r"`token_order` must be one of .*, got raster. Try sim"):
        AdaSpaConfig(token_order="raster")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_decides_its_fields_and_leaves_the_others(preset):
    own = {
        "sparsity": 0.5,
        "block_size": "128x64",
        "warmup": 0.5,
        "search_points": (0.7,),
        "head_adaptive": False,
        "tail": "none" if PRESETS[preset].tail == "pooled" else "pooled",
        "token_order": "position",
    }
    assert set(own) == set(PRESET_FIELDS)
    others = {
        "dense_layers": (1,),
        "min_tokens": 7,
        "cache": "cpu",
        "enabled": False,
        "end_percent": 0.9,
    }
    config = from_preset(preset, **own, **others)
    assert all(getattr(config, name) == getattr(PRESETS[preset], name) for name in own)
    assert all(getattr(config, name) == value for name, value in others.items())


def test_custom_leaves_every_field_to_the_caller():
    config = from_preset("Custom", sparsity=0.5, block_size="128", warmup=0.4)
    assert (config.sparsity, config.block_size, config.warmup) == (0.5, "128", 0.4)
    assert config.search_gap == 3 and config.query_stride == 4


def test_a_search_for_a_recall_measures_every_row():
    assert AdaSpaConfig(query_stride=4).search_stride == 4
    assert AdaSpaConfig(query_stride=4, recall=0.9).search_stride == 1
    with pytest.raises(ValueError, match=r"`query_stride` must be 1 or 4, got 3\. Try 4"):
        AdaSpaConfig(query_stride=3)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"`preset` must be one of .*'Custom'.*, got 'Turbo'"):
        from_preset("Turbo")


def test_numbers_are_read_with_any_spacing():
    assert parse_numbers("0.3,0.6 , ", float, "search_points") == (0.3, 0.6)
    assert parse_numbers("0, 1,-1", int, "dense_layers") == (0, 1, -1)
    # as keyboards for Chinese and Japanese write them
    assert parse_numbers("\uff10\uff0c1; -1", int, "dense_layers") == (0, 1, -1)
    assert parse_numbers("0.4\u3001\uff10.7", float, "search_points") == (0.4, 0.7)
    assert parse_numbers("  ", float, "search_points") == ()


def test_what_is_no_number_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`search_points` must be numbers .* got 'half'. Example"):
        parse_numbers("half", float, "search_points")
    with pytest.raises(ValueError, match=r"`dense_layers` .* got '1.5'. Example: 0, 1, -1"):
        parse_numbers("1.5", int, "dense_layers")


@pytest.mark.parametrize(
    "text, write",
    [
        ("0,45", "0.45"),
        (" 0,4, 0,7 ", "0.4, 0.7"),
        ("0,4; 0,7", "0.4, 0.7"),
        ("0,4 0,7", "0.4, 0.7"),
    ],
)
def test_a_decimal_comma_is_told_as_such(text, write):
    with pytest.raises(ValueError, match="must have points in its numbers, not commas") as error:
        parse_numbers(text, float, "search_points")
    assert str(error.value).endswith(f"Write {write}.")
    # numbers of layers have no fraction
    assert parse_numbers("0,45", int, "dense_layers") == (0, 45)
