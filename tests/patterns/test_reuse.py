"""What a run keeps for another, and what the other makes of it."""

from dataclasses import replace

import pytest
import torch
from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.block_mask import BlockMask
from sparse_attn.patterns import reuse
from sparse_attn.patterns.file import load, save
from sparse_attn.patterns.reuse import RECALL_LOSS
from sparse_attn.run.report import reuse_lines
from sparse_attn.run.serving import NOT_A_NUMBER
from tests.method import truth
from tests.patterns.example_pattern import FAMILY, NAME
from tests.run.fakes import BLOCKS, SCALE, Backend, Run, tensors


def call_of(run, step, qkv, name=NAME):
    return run.attend(step, qkv, name=name, role=name.role if name else "positive")


@pytest.fixture
def found():
    """The pattern of a run over `tensors(0)`."""
    run = Run("Ss")
    run.statistics.model = FAMILY
    call_of(run, 0, tensors(0))
    return run.state.end(keep_pattern=True).named("a file")


def carrying(kinds, pattern, **options):
    run = Run(kinds, carried=pattern, **options)
    run.statistics.model = FAMILY
    return run


def test_a_run_keeps_its_masks_on_the_cpu_only_when_asked(found):
    assert list(found.layers) == [NAME]
    (layer,) = found.layers.values()
    assert layer.bits.dtype == torch.uint8 and layer.bits.device.type == "cpu"
    keep = BlockMask(layer.bits, 10, 64, 64).to_dense()
    q, k, _ = tensors(0)
    exact = truth.recall(q.double(), k.double(), keep, **BLOCKS)[0]
    assert layer.recall == pytest.approx(exact.tolist(), abs=1e-4)
    assert layer.density == pytest.approx(keep.float().mean((0, 2, 3)).tolist())
    run = Run("Ss")
    call_of(run, 0, tensors(0))
    assert run.state.end() is None and not run.state.layers


def test_tall_blocks_are_carried_and_saved_as_such(tmp_path):
    run = Run("Ss", block_size="128x64")
    run.statistics.model = FAMILY
    call_of(run, 0, tensors(0))
    pattern = load(save(run.state.end(keep_pattern=True), tmp_path, "tall"))
    assert pattern.block_size == "128x64"
    assert pattern.layers[NAME].bits.shape == (1, 2, 5, 2)
    run, qkv = carrying("Ss", pattern, block_size="128x64"), tensors(0)
    out, did = call_of(run, 0, qkv)
    assert did == ["sparse"]
    mask = BlockMask(pattern.layers[NAME].bits, 10, 128, 64)
    expected, _ = reference.attention(*(x.double() for x in qkv), scale=SCALE, mask=mask)
    assert_within("out", out, expected, 1e-5)
    # in square blocks the same pattern is of no use
    assert call_of(carrying("Ss", pattern), 0, qkv)[1] == ["dense", "masses"]


def test_a_carried_layer_runs_sparse_from_the_search_step_on(found):
    run = carrying("DSss", found)
    qkv = tensors(0)
    out, did = call_of(run, 1, qkv)
    assert did == ["sparse"]
    mask = BlockMask(found.layers[NAME].bits, 10, 64, 64)
    expected, _ = reference.attention(*(x.double() for x in qkv), scale=SCALE, mask=mask)
    assert_within("out", out, expected, 1e-5)
    assert call_of(run, 2, tensors(0))[1] == ["sparse"]
    run.state.end_step()
    statistics = run.statistics
    pattern = statistics.patterns[0, "positive"]
    assert pattern.carried and not pattern.exact and pattern.step == 1
    # 64 of 640 rows
    assert pattern.recall == pytest.approx(found.layers[NAME].recall, abs=0.05)
    assert "(sampled)" in statistics.summary() and "(estimated)" not in statistics.summary()
    (line,) = reuse_lines(statistics)
    assert line.startswith("Pattern of a file: 1 masks used without a search, recall 0.")


def worse(pattern, loss):
    """The same masks, said to have held so much more when they were found."""
    layer = pattern.layers[NAME]
    recall = tuple(r + loss for r in layer.recall)
    return replace(pattern, layers={NAME: replace(layer, recall=recall)})


@pytest.mark.parametrize("loss, searches", [(0.0, False), (0.12, True)])
def test_a_layer_whose_recall_fell_searches_after_all(found, loss, searches):
    run = carrying("Sss", worse(found, loss))
    assert call_of(run, 0, tensors(0))[1] == (["dense", "masses"] if searches else ["sparse"])
    # asked once, not in every step
    assert call_of(run, 1, tensors(0))[1] == ["sparse"]
    run.state.end_step()
    statistics = run.statistics
    assert statistics.reuse.masks == (not searches)
    assert sum(statistics.reuse.refused.values()) == searches
    if searches:
        text = "\n".join(statistics.lines())
        assert f"Searched after all: 1 masks, recall more than {RECALL_LOSS} below" in text
        assert statistics.patterns.exact()


@pytest.mark.parametrize("asked, searches", [(0.5, False), (0.97, True)])
def test_a_carried_mask_must_hold_the_recall_that_is_asked_for(found, asked, searches):
    run = carrying("Ss", found, recall=asked)
    assert call_of(run, 0, tensors(0))[1] == (["dense", "masses"] if searches else ["sparse"])
    if searches:
        assert run.statistics.reuse.refused == {f"recall below the {asked} asked for": 1}


def test_another_video_is_noticed(found):
    q, k, v = tensors(0)
    # the same video the other way round: its blocks lie elsewhere
    other = q.roll(300, 2), k.flip(2), v
    run = carrying("Ss", found)
    assert call_of(run, 0, other)[1] == ["dense", "masses"]


@pytest.mark.parametrize("name", [NAME._replace(block_index=7), None])
def test_a_layer_that_the_pattern_does_not_know_searches(found, name):
    run = carrying("Ss", found)
    assert call_of(run, 0, tensors(0), name=name)[1] == ["dense", "masses"]
    assert sum(run.statistics.reuse.refused.values()) == 1


def test_a_carried_layer_searches_when_the_user_asks_for_another_search(found):
    run = carrying("SsSs", found)
    assert [call_of(run, step, tensors(step))[1] for step in range(4)] == [
        ["sparse"], ["sparse"], ["dense", "masses"], ["sparse"],
    ]  # fmt: skip
    run.state.end_step()
    pattern = run.statistics.patterns[0, "positive"]
    assert not pattern.carried and pattern.exact


def test_an_lse_kept_for_the_search_is_let_go(found):
    run = carrying("DSs", found, backend=Backend(one_pass=True))
    call_of(run, 0, tensors(0))
    assert run.layer().lse is not None
    call_of(run, 1, tensors(0))
    assert run.layer().lse is None


def test_broken_numbers_do_not_meet_a_carried_mask(found):
    q, k, v = tensors(0)
    k[0, 0, 5, 5] = float("nan")
    run = carrying("Ss", found)
    assert call_of(run, 0, (q, k, v))[1][-1] == "host"
    assert run.statistics.reuse.masks == 0
    assert NOT_A_NUMBER in run.statistics.kept_dense


def test_out_of_memory_while_measuring_searches_instead(found, monkeypatch):
    def out_of_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reuse, "sampled_recall", out_of_memory)
    run = carrying("Ss", found)
    assert call_of(run, 0, tensors(0))[1] == ["dense", "masses"]
    assert run.statistics.reuse.refused == {"out of memory while measuring the recall": 1}


def test_a_carried_mask_can_be_carried_on_with_the_recall_of_its_search(found):
    run = carrying("Ss", found)
    call_of(run, 0, tensors(0))
    again = run.state.end(keep_pattern=True)
    assert torch.equal(again.layers[NAME].bits, found.layers[NAME].bits)
    assert again.layers[NAME].recall == pytest.approx(found.layers[NAME].recall)
