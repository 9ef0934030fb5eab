"""Carried patterns: what a run keeps, what another makes of it, and their files."""

import json
import re
from dataclasses import replace

import pytest
import torch
from close import assert_within
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_attn.backends import reference
from sparse_attn.block_mask import BlockMask
from sparse_attn.method.recall import sample_rows, sampled_recall
from sparse_attn.patterns import reuse as carrying_module
from sparse_attn.patterns.pattern import CarriedLayer, CarriedPattern, LayerName, load, save
from sparse_attn.patterns.reuse import RECALL_LOSS
from sparse_attn.run.report import carried_lines
from sparse_attn.run.state import NOT_A_NUMBER, Call
from sparse_attn.token_layout import TokenLayout
from tests.run.test_run_state import BLOCKS, LAYOUT, SCALE, Backend, make_run, tensors  # noqa: F401

NAME = LayerName("positive", "double", 0, 0)
FAMILY = "Wan"


def a_pattern():
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for index in range(2):
        keep = torch.rand(1, 3, 10, 10, generator=generator) < 0.4
        keep[..., 0] = True
        bits = BlockMask.from_dense(keep, block_q=64, block_k=64).bits
        layers[NAME._replace(block_index=index)] = CarriedLayer(bits, (0.4,) * 3, (0.9, 0.8, 0.7))
    return CarriedPattern(FAMILY, LAYOUT, "64", layers)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "city.safetensors"
    save(a_pattern(), path)
    return path


# ---- files


def test_a_file_gives_back_what_was_saved(file):
    saved, loaded = a_pattern(), load(file)
    assert replace(loaded, layers={}, source="") == replace(saved, layers={})
    assert loaded.source == "city.safetensors"
    assert list(loaded.layers) == list(saved.layers)
    for name, layer in saved.layers.items():
        assert torch.equal(loaded.layers[name].bits, layer.bits)
        assert loaded.layers[name].recall == layer.recall
        assert loaded.layers[name].density == layer.density


def test_a_file_names_what_it_is_for_and_is_compact(file):
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    expected = {
        "format": "adaspa pattern", "version": "2", "family": FAMILY, "grid": "[5, 4, 31]",
        "before": "20", "after": "0", "block_size": "64", "order": "raster", "density": "0.4000",
        "recall": "0.8000",
    }  # fmt: skip
    assert expected.items() <= metadata.items()
    masks = a_pattern().nbytes()
    assert masks == 2 * 3 * 10 * 2
    assert masks < file.stat().st_size < masks + 1500


@pytest.mark.parametrize("pooled, order", [(True, "rods"), (False, "raster")])
def test_a_file_tells_the_order_and_the_tail_of_its_masks(tmp_path, pooled, order):
    path = tmp_path / "city.safetensors"
    save(replace(a_pattern(), pooled=pooled), path)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    assert (metadata["order"], metadata["tail"]) == (order, "pooled" if pooled else "none")
    assert load(path).pooled == pooled


def test_a_file_of_an_earlier_version_has_no_tail(file):
    rewritten(file, tail=None, version="1")
    assert not load(file).pooled


def test_a_file_of_the_first_version_is_in_rods(tmp_path):
    path = tmp_path / "city.safetensors"
    save(replace(a_pattern(), pooled=True), path)
    rewritten(path, version="1")
    loaded = load(path)
    assert loaded.pooled and loaded.order == "rods"
    assert all(layer.order is None for layer in loaded.layers.values())


def ordered_pattern():
    """Every head has an order of its own, the text of 20 tokens behind the video."""
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name, layer in a_pattern().layers.items():
        order = torch.rand(1, 3, LAYOUT.video, generator=generator).argsort(-1) + LAYOUT.before
        order = torch.cat([order, torch.arange(LAYOUT.before).expand(1, 3, -1)], -1).int()
        layers[name] = replace(layer, order=order)
    return replace(a_pattern(), layers=layers, pooled=True)


def test_a_file_holds_the_order_of_every_head(tmp_path):
    path, saved = tmp_path / "city.safetensors", ordered_pattern()
    save(saved, path)
    loaded = load(path)
    assert loaded.order == "similarity" and loaded.nbytes() == saved.nbytes()
    assert saved.nbytes() == a_pattern().nbytes() + 2 * 3 * LAYOUT.tokens * 4
    for name, layer in saved.layers.items():
        assert torch.equal(loaded.layers[name].order, layer.order)


def swapped(order):
    order[0, 1, 5], order[0, 1, 6] = order[0, 1, 6].clone(), order[0, 1, 5].clone()
    return order


def doubled(order):
    order[0, 1, 5] = order[0, 1, 6]
    return order


def beyond_the_last(order):
    order[0, 1, 5] = LAYOUT.tokens
    return order


ORDER_DAMAGE = {
    "swapped": (swapped, "not those that were written"),
    "doubled": (doubled, "is not one of all tokens"),
    "beyond": (beyond_the_last, "tokens that there are not"),
    "text elsewhere": (lambda x: x.flip(-1).contiguous(), "is not one of all tokens"),
    "dtype": (lambda x: x.long(), "torch.int64"),
    "shape": (lambda x: x[..., 1:].contiguous(), "a token order of shape [1, 3, 639]"),
}


@pytest.mark.parametrize("name", ORDER_DAMAGE)
def test_a_damaged_order_is_refused(tmp_path, name):
    change, words = ORDER_DAMAGE[name]
    path = tmp_path / "city.safetensors"
    save(ordered_pattern(), path)
    rewritten(path, lambda x: {**x, "order.00001": change(x["order.00001"])})
    with pytest.raises(ValueError, match=re.escape(words)):
        load(path)


def test_a_lost_order_is_refused(tmp_path):
    path = tmp_path / "city.safetensors"
    save(ordered_pattern(), path)
    rewritten(path, lambda x: {k: v for k, v in x.items() if k != "order.00001"})
    with pytest.raises(ValueError, match="not those that were written"):
        load(path)


def test_saving_leaves_the_old_file_and_no_part_when_it_fails(file, monkeypatch):
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save(a_pattern(), file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def rewritten(file, change_tensors=None, **metadata):
    with safe_open(file, framework="pt") as opened:
        found = {**opened.metadata(), **metadata}
    tensors = load_file(file)
    if change_tensors:
        tensors = change_tensors(tensors)
    save_file(tensors, file, metadata={k: v for k, v in found.items() if v is not None})


def flip(tensors):
    tensors["mask.00001"][0, 0, 5, 0] ^= 2
    return tensors


def rows_of_nothing(tensors):
    tensors["mask.00000"][0, 1, 3] = 0
    return tensors


def beyond(tensors):
    tensors["mask.00000"][0, 1, 3, 1] |= 128
    return tensors


DAMAGE = {
    "newer": (None, {"version": "3"}, "written by a newer AdaSpa (format 3"),
    "not ours": (None, {"format": None}, "is not an AdaSpa pattern file"),
    "a flipped bit": (flip, {}, "not those that were written"),
    "an empty row": (rows_of_nothing, {}, "leaves a part of the video without attention"),
    "blocks behind the last": (beyond, {}, "lists blocks behind the last"),
    "dtype": (lambda x: {k: v.int() for k, v in x.items()}, {}, "torch.int32 instead of uint8"),
    "shape": (lambda x: {k: v[:, :, :9] for k, v in x.items()}, {}, "of shape [1, 3, 9, 2]"),
    "heads": (lambda x: {k: v[:, :2] for k, v in x.items()}, {}, "numbers per head"),
    "a mask lost": (lambda x: {"mask.00000": x["mask.00000"]}, {}, "1 masks for 2 layers"),
    "order": (None, {"order": "hilbert"}, "token order 'hilbert'"),
    "order of another tail": (
        None,
        {"tail": "pooled"},
        "token order 'raster' is not rods or similarity",
    ),
    "no orders": (None, {"tail": "pooled", "order": "similarity"}, "0 token orders of 2 masks"),
    "tail": (None, {"tail": "weighted"}, "tail 'weighted' is not one of none, pooled"),
    "grid": (None, {"grid": "[5, 4]"}, "damaged"),
    "negative grid": (None, {"grid": "[-5, -4, 31]"}, "is not positive"),
    "block size": (None, {"block_size": "96"}, "blocks of 96 instead of 64, 128, 128x64"),
    "other blocks": (None, {"block_size": "128x64"}, "of shape [1, 3, 10, 2] for 5 x 10 blocks"),
    "no family": (None, {"family": None}, "family is missing"),
    "no JSON": (None, {"layers": "[["}, "damaged"),
    "recall": (None, {"layers": json.dumps(2 * [[*NAME, [2.0] * 3, [0.5] * 3]])}, "outside 0 to 1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_with_one_sentence(file, name):
    change, metadata, words = DAMAGE[name]
    rewritten(file, change and (lambda x: {k: v.contiguous() for k, v in change(x).items()}),
              **metadata)  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        load(file)
    assert "\n" not in str(refused.value) and "city.safetensors" in str(refused.value)


@pytest.mark.parametrize("size", [0, 5, 200, -3])
def test_a_truncated_file_is_refused(file, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"city\.safetensors cannot be read"):
        load(file)


def test_a_file_of_something_else_or_none_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not an AdaSpa pattern file"):
        load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "absent.safetensors")


def test_nothing_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no pattern to save"):
        save(CarriedPattern(FAMILY, LAYOUT, "64"), tmp_path / "none.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, ""),
        ({"family": "Mochi"}, "the pattern is of Wan, and this model is Mochi"),
        ({"layout": TokenLayout(20, 4, 5, 31)}, "and this run has 640 tokens (4x5x31 video"),
        ({"block_size": "128"}, "blocks of 64, and `block_size` is 128"),
        ({"block_size": "128x64"}, "blocks of 64, and `block_size` is 128x64"),
        ({"name": NAME._replace(role="negative")}, "does not know the layer or the prompt"),
        ({"name": None}, "do not share patterns"),
        ({"batch": 2}, "this run has 2 and 3"),
        ({"heads": 4}, "this run has 1 and 4"),
    ],
)
def test_a_mask_is_found_where_everything_fits(change, words):
    fits = {
        "name": NAME, "family": FAMILY, "layout": LAYOUT, "block_size": "64", "batch": 1,
        "heads": 3,
    }  # fmt: skip
    layer, reason = a_pattern().find(**{**fits, **change})
    assert (layer is None) == bool(words) and words in reason and (words or not reason)


# ---- recall of a sample


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_every_row_sampled_is_the_recall_itself(biased):
    q, k, _ = tensors(batch=2)
    keep = torch.rand(2, 2, 10, 10) < 0.4
    mask = BlockMask.from_dense(keep, block_q=64, block_k=64)
    bias = torch.randn(2, LAYOUT.tokens) if biased else None
    held = sampled_recall(q, k, mask, list(range(LAYOUT.tokens)), scale=SCALE, key_bias=bias)
    exact = reference.recall(q.double(), k.double(), keep, key_bias=bias, **BLOCKS)
    torch.testing.assert_close(held.double(), exact, atol=1e-5, rtol=0)


def test_a_sample_reaches_the_whole_video_and_keeps_no_step_with_its_lines():
    rows = sample_rows(75_600, 64)
    assert len(rows) == 64 and rows == sorted(set(rows))
    gaps = [b - a for a, b in zip([0, *rows], [*rows, 75_600], strict=True)]
    assert max(gaps) < 2 * 75_600 / 64
    # lines of 80 tokens: even steps of 1,280 would meet one column of them
    assert len({row % 80 for row in sample_rows(64 * 1280, 64)}) > 15
    assert sample_rows(10, 64)[-1] < 10


# ---- runs


def call_of(run, step, qkv, name=NAME, key="layer 0", layer=0):
    run.backend.did, before = [], run.host.calls
    call = Call(key, layer, name.role if name else "positive", step, LAYOUT, SCALE, run.host,
                name=name)  # fmt: skip
    out = run.state.attend(call, *qkv)
    return out, run.backend.did + (run.host.calls - before) * ["host"]


@pytest.fixture
def found(make_run):  # noqa: F811
    """The pattern of a run over `tensors(0)`."""
    run = make_run("Ss")
    run.state.statistics.model = FAMILY
    call_of(run, 0, tensors(0))
    return run.state.end(keep_pattern=True).named("a file")


@pytest.fixture
def carrying(make_run):  # noqa: F811
    def make(kinds, pattern, **options):
        run = make_run(kinds, **options)
        run.state.carried = pattern
        run.state.statistics.carried_from = pattern.source
        run.state.statistics.model = FAMILY
        return run

    return make


def test_a_run_keeps_its_masks_on_the_cpu_only_when_asked(make_run, found):  # noqa: F811
    assert list(found.layers) == [NAME]
    (layer,) = found.layers.values()
    assert layer.bits.dtype == torch.uint8 and layer.bits.device.type == "cpu"
    keep = BlockMask(layer.bits, 10, 64, 64).to_dense()
    q, k, _ = tensors(0)
    exact = reference.recall(q.double(), k.double(), keep, **BLOCKS)[0]
    assert layer.recall == pytest.approx(exact.tolist(), abs=1e-4)
    assert layer.density == pytest.approx(keep.float().mean((0, 2, 3)).tolist())
    run = make_run("Ss")
    call_of(run, 0, tensors(0))
    assert run.state.end() is None and not run.state.layers


def test_tall_blocks_are_carried_and_saved_as_such(make_run, carrying, tmp_path):  # noqa: F811
    run = make_run("Ss", block_size="128x64")
    run.state.statistics.model = FAMILY
    call_of(run, 0, tensors(0))
    save(run.state.end(keep_pattern=True), tmp_path / "tall.safetensors")
    pattern = load(tmp_path / "tall.safetensors")
    assert pattern.block_size == "128x64"
    assert pattern.layers[NAME].bits.shape == (1, 2, 5, 2)
    run, qkv = carrying("Ss", pattern, block_size="128x64"), tensors(0)
    out, did = call_of(run, 0, qkv)
    assert did == ["sparse"]
    keep = BlockMask(pattern.layers[NAME].bits, 10, 128, 64).to_dense()
    blocks = {"block_q": 128, "block_k": 64, "scale": SCALE}
    expected, _ = reference.sparse_attention(*(x.double() for x in qkv), keep, **blocks)
    assert_within("out", out, expected, 1e-5)
    # in square blocks the same pattern is of no use
    assert call_of(carrying("Ss", pattern), 0, qkv)[1] == ["dense", "masses"]


def test_a_carried_layer_runs_sparse_from_the_search_step_on(carrying, found):
    run = carrying("DSss", found)
    qkv = tensors(0)
    out, did = call_of(run, 1, qkv)
    assert did == ["sparse"]
    keep = BlockMask(found.layers[NAME].bits, 10, 64, 64).to_dense()
    expected, _ = reference.sparse_attention(*(x.double() for x in qkv), keep, **BLOCKS)
    assert_within("out", out, expected, 1e-5)
    assert call_of(run, 2, tensors(0))[1] == ["sparse"]
    run.state.end_step()
    statistics = run.state.statistics
    pattern = statistics.patterns[0, "positive"]
    assert pattern.carried and not pattern.exact and pattern.step == 1
    # 64 of 640 rows
    assert pattern.recall == pytest.approx(found.layers[NAME].recall, abs=0.05)
    assert "(sampled)" in statistics.summary() and "(estimated)" not in statistics.summary()
    (line,) = carried_lines(statistics)
    assert line.startswith("Pattern of a file: 1 masks used without a search, recall 0.")


def worse(pattern, loss):
    """The same masks, said to have held so much more when they were found."""
    layer = pattern.layers[NAME]
    recall = tuple(r + loss for r in layer.recall)
    return replace(pattern, layers={NAME: replace(layer, recall=recall)})


@pytest.mark.parametrize("loss, searches", [(0.0, False), (0.12, True)])
def test_a_layer_whose_recall_fell_searches_after_all(carrying, found, loss, searches):
    run = carrying("Sss", worse(found, loss))
    assert call_of(run, 0, tensors(0))[1] == (["dense", "masses"] if searches else ["sparse"])
    # asked once, not in every step
    assert call_of(run, 1, tensors(0))[1] == ["sparse"]
    run.state.end_step()
    statistics = run.state.statistics
    assert statistics.carried == (not searches)
    assert sum(statistics.not_carried.values()) == searches
    if searches:
        text = "\n".join(statistics.lines())
        assert f"Searched after all: 1 masks, recall more than {RECALL_LOSS} below" in text
        assert statistics.exact()


@pytest.mark.parametrize("asked, searches", [(0.5, False), (0.97, True)])
def test_a_carried_mask_must_hold_the_recall_that_is_asked_for(carrying, found, asked, searches):
    run = carrying("Ss", found, recall=asked)
    assert call_of(run, 0, tensors(0))[1] == (["dense", "masses"] if searches else ["sparse"])
    if searches:
        assert run.state.statistics.not_carried == {f"recall below the {asked} asked for": 1}


def test_another_video_is_noticed(carrying, found):
    q, k, v = tensors(0)
    # the same video the other way round: its blocks lie elsewhere
    other = q.roll(300, 2), k.flip(2), v
    run = carrying("Ss", found)
    assert call_of(run, 0, other)[1] == ["dense", "masses"]


@pytest.mark.parametrize("name", [NAME._replace(block_index=7), None])
def test_a_layer_that_the_pattern_does_not_know_searches(carrying, found, name):
    run = carrying("Ss", found)
    assert call_of(run, 0, tensors(0), name=name)[1] == ["dense", "masses"]
    assert sum(run.state.statistics.not_carried.values()) == 1


def test_a_carried_layer_searches_when_the_user_asks_for_another_search(carrying, found):
    run = carrying("SsSs", found)
    assert [call_of(run, step, tensors(step))[1] for step in range(4)] == [
        ["sparse"], ["sparse"], ["dense", "masses"], ["sparse"],
    ]  # fmt: skip
    run.state.end_step()
    pattern = run.state.statistics.patterns[0, "positive"]
    assert not pattern.carried and pattern.exact


def test_an_lse_kept_for_the_search_is_let_go(carrying, found):
    run = carrying("DSs", found, backend=Backend(one_pass=True))
    call_of(run, 0, tensors(0))
    assert run.state.layers["layer 0"].lse is not None
    call_of(run, 1, tensors(0))
    assert run.state.layers["layer 0"].lse is None


def test_broken_numbers_do_not_meet_a_carried_mask(carrying, found):
    q, k, v = tensors(0)
    k[0, 0, 5, 5] = float("nan")
    run = carrying("Ss", found)
    assert call_of(run, 0, (q, k, v))[1][-1] == "host"
    assert run.state.statistics.carried == 0
    assert NOT_A_NUMBER in run.state.statistics.kept_dense


def test_out_of_memory_while_measuring_searches_instead(carrying, found, monkeypatch):
    def out_of_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(carrying_module, "sampled_recall", out_of_memory)
    run = carrying("Ss", found)
    assert call_of(run, 0, tensors(0))[1] == ["dense", "masses"]
    assert run.state.statistics.not_carried == {"out of memory while measuring the recall": 1}


def test_a_carried_mask_can_be_carried_on_with_the_recall_of_its_search(carrying, found):
    run = carrying("Ss", found)
    call_of(run, 0, tensors(0))
    again = run.state.end(keep_pattern=True)
    assert torch.equal(again.layers[NAME].bits, found.layers[NAME].bits)
    assert again.layers[NAME].recall == pytest.approx(found.layers[NAME].recall)
