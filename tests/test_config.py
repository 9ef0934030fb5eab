import dataclasses

import pytest

from sparse_attn.config import PRESET_FIELDS, PRESETS, AdaSpaConfig, from_preset, parse_numbers

REFUSED = [
    # field, value, what the sentence must hold
    ("sparsity", -0.01, "`sparsity` must be from 0 to 0.98, got -0.01. Try 0.8"),
    ("sparsity", 0.99, "got 0.99. Try 0.8"),
    ("sparsity", float("nan"), "got nan. Try 0.8"),
    ("block_size", 32, "`block_size` must be 64 or 128, got 32. Try 64"),
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
    ("cache", "disk", "`cache` must be one of ('auto', 'gpu', 'cpu'), got 'disk'. Try auto"),
    ("dense_attention", "sage", "must be one of ('auto', 'host'), got 'sage'. Try auto"),
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
]


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_the_edges_of_each_range_are_accepted(fields):
    config = AdaSpaConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_head_adaptive_needs_room_on_both_sides():
    with pytest.raises(ValueError, match=r"at least 0.34, got 0.2. Raise the sparsity"):
        AdaSpaConfig(sparsity=0.2, head_adaptive=True)


def test_a_config_cannot_change_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdaSpaConfig().sparsity = 2.0


def test_density_is_what_sparsity_leaves():
    assert AdaSpaConfig(sparsity=0.7).density == pytest.approx(0.3)


def test_presets_hold_the_designed_values():
    values = {name: (p.sparsity, p.warmup, p.search_points) for name, p in PRESETS.items()}
    assert values == {
        "Quality": (0.7, 0.2, ()),
        "Balanced": (0.8, 0.12, ()),
        "Fast": (0.9, 0.06, ()),
        "Paper": (0.8, 0.2, (0.6,)),
    }
    assert all(preset.block_size == 64 for preset in PRESETS.values())
    assert [name for name, preset in PRESETS.items() if preset.head_adaptive] == ["Paper"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_decides_its_fields_and_leaves_the_others(preset):
    own = {
        "sparsity": 0.5,
        "block_size": 128,
        "warmup": 0.5,
        "search_points": (0.7,),
        "head_adaptive": False,
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
    config = from_preset("Custom", sparsity=0.5, block_size=128, warmup=0.4)
    assert (config.sparsity, config.block_size, config.warmup) == (0.5, 128, 0.4)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"`preset` must be one of .*'Custom'.*, got 'Turbo'"):
        from_preset("Turbo")


def test_numbers_are_read_with_any_spacing():
    assert parse_numbers("0.3,0.6 , ", float, "search_points") == (0.3, 0.6)
    assert parse_numbers("0, 1,-1", int, "dense_layers") == (0, 1, -1)
    assert parse_numbers("  ", float, "search_points") == ()


def test_what_is_no_number_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`search_points` must be numbers .* got 'half'. Example"):
        parse_numbers("half", float, "search_points")
    with pytest.raises(ValueError, match=r"`dense_layers` .* got '1.5'. Example: 0, 1, -1"):
        parse_numbers("1.5", int, "dense_layers")
