"""What an attention call does with a pooled tail, step by step, with plain torch."""

import pytest
import torch
from close import assert_same_choice, assert_within, mass_rounding, rounding

from sparse_attn.backends import reference
from sparse_attn.block_mask import recall
from sparse_attn.run.serving import NOT_A_NUMBER, SPARSE_OUT_OF_MEMORY
from sparse_attn.token_layout import TokenLayout
from tests.method import truth
from tests.method.chosen import chosen
from tests.run.fakes import (
    SCALE,
    exact_masses,
    host_attention,
    no_memory,
)
from tests.run.tail_run import (
    BOTH_ORDERS,
    LAYOUT,
    PERMUTED,
    H,
    TailRun,
    dense,
    in_order,
    padded,
    tail_error,
    tensors,
    with_tail,
)

SEQUENCES = [
    ("Sss", False, [["dense", "permute", "masses", "pooled masses"],
                    ["permute", "sparse"], ["permute", "sparse"]]),
    ("DSs", True, [["dense"], ["permute", "dense with masses", "pooled masses"],
                   ["permute", "sparse"]]),
    ("SSs", False, [["dense", "permute", "masses", "pooled masses"],
                    ["permute", "masses", "pooled masses", "permute", "sparse"],
                    ["permute", "sparse"]]),
]  # fmt: skip


@pytest.mark.parametrize("kinds, one_pass, did", SEQUENCES, ids=lambda x: str(x)[:5])
def test_each_step_does_its_kind_of_work(kinds, one_pass, did):
    run = TailRun(kinds, one_pass=one_pass)
    assert [run.attend(step, tensors(step))[1] for step in range(len(kinds))] == did


@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_dense_steps_and_searches_answer_with_the_dense_output(one_pass, biased):
    run, bias = TailRun("DSs", one_pass=one_pass), padded(2) if biased else None
    for step in range(2):
        qkv = tensors(step, batch=2)
        out, _ = run.attend(step, qkv, key_bias=bias)
        assert_within("out", out, dense(*qkv, bias), 1e-5)


@pytest.mark.parametrize("block_size", ["64", "128x64"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("head_adaptive", [False, True], ids=["uniform", "head-adaptive"])
@pytest.mark.parametrize("batch", [1, 2])
@BOTH_ORDERS
def test_a_sparse_step_adds_the_averages_of_what_it_skips(
    block_size, biased, head_adaptive, batch, token_order
):
    run = TailRun("Ss", block_size=block_size, head_adaptive=head_adaptive, token_order=token_order)
    bias = padded(batch) if biased else None
    run.attend(0, tensors(0, batch), key_bias=bias)
    later = tensors(1, batch)
    out, _ = run.attend(1, later, key_bias=bias)
    mask = run.pattern().mask
    exact = with_tail(*later, mask, run.order, bias)
    assert_within("out", out, exact, 1e-5)
    bare, _ = reference.attention(
        *(x.double() for x in in_order(run, *later)), scale=SCALE, mask=mask,
        key_bias=None if bias is None else bias[:, run.order[0, 0]].double(),
    )  # fmt: skip
    out, truth = in_order(run, out, dense(*later, bias))
    assert (out - bare).abs().max() > 0.05, "the tail does something"
    assert (out - truth).square().mean() < (bare - truth).square().mean()


def score_rounding(q, k, v, masses):
    """How far tail errors sqrt(M (M - P)) s + (M - P) |vm - o| may be off in float32.

    M and P, which is at most M, are off by a share e of M, so their difference by 2 e M and its
    root by sqrt(2 e M); s, |vm| and |o| are at most the longest value. The distance is the root of
    a difference of squares, each a sum of D.
    """
    e, longest = mass_rounding(q, k, SCALE), v.norm(dim=-1).max()
    apart = 2 * longest * (2 * rounding(v.shape[-1] + 4)) ** 0.5
    return masses * ((2 * e) ** 0.5 * longest + 2 * e * 2 * longest + apart)


@BOTH_ORDERS
def test_a_search_keeps_the_blocks_whose_averages_err_most(token_order):
    run, qkv = TailRun("Ss", token_order=token_order, sparsity=0.5), tensors()
    run.attend(0, qkv)
    q, k, v = (x.double() for x in in_order(run, *qkv))
    scores = tail_error(q, k, v).float()
    masses = exact_masses(q, k)
    keep, held = chosen(masses, PERMUTED, run.state.config, scores)
    assert_same_choice(run.keep, keep, scores.double(), score_rounding(q, k, v, masses))
    by_mass, most = chosen(masses, PERMUTED, run.state.config)
    assert not torch.equal(keep, by_mass)
    # the recall shown is still one of masses
    run.state.end_step()
    (pattern,) = run.statistics.patterns.values()
    assert pattern.recall == pytest.approx(held[0].tolist(), abs=1e-5) and (held < most).all()


def test_keeping_everything_equals_dense_at_every_step():
    run = TailRun("SsSs", sparsity=0.0)
    for step in range(4):
        qkv = tensors(step, batch=2)
        assert_within("out", run.attend(step, qkv)[0], dense(*qkv), 1e-5)


def test_text_reads_everything_and_is_read_whole():
    run, bias = TailRun("Ss", sparsity=0.8), padded()
    run.attend(0, tensors(0), key_bias=bias)
    later = tensors(1)
    out, _ = run.attend(1, later, key_bias=bias)
    text = [*range(LAYOUT.before), *range(LAYOUT.tokens - LAYOUT.after, LAYOUT.tokens)]
    exact = dense(*later, bias)
    assert_within("text", out[:, :, text], exact[:, :, text], 1e-5)
    video = slice(LAYOUT.before, LAYOUT.before + LAYOUT.video)
    assert (out[:, :, video] - exact[:, :, video]).abs().max() > 0.05
    keep = run.keep
    first = LAYOUT.video // 64
    assert keep[..., first:].all() and keep[..., first:, :].all() and not keep.all()


@pytest.mark.parametrize("layout", [TokenLayout(0, 4, 8, 20), TokenLayout(0, 3, 1, 30)])
def test_a_video_alone_and_one_smaller_than_the_rods(layout):
    run = TailRun("Ss", layout=layout)
    run.attend(0, tensors(0, layout=layout))
    later = tensors(1, layout=layout)
    out, _ = run.attend(1, later)
    assert_within("out", out, with_tail(*later, run.pattern().mask, run.order), 1e-5)


def test_bfloat16_errs_as_little_as_its_rounding():
    run = TailRun("Ss")
    run.attend(0, tensors(0, dtype=torch.bfloat16))
    later = tensors(1, dtype=torch.bfloat16)
    out, _ = run.attend(1, later)
    assert out.dtype == torch.bfloat16
    assert_within("out", out, with_tail(*later, run.pattern().mask, run.order), 2e-2)


def test_a_recall_is_one_of_masses_and_sampled_in_the_masks_order():
    run = TailRun("Sss", recall=0.7)
    did = [run.attend(step, tensors(step))[1] for step in range(3)]
    assert did[0] == ["dense", "permute", "masses"], "no scores, the masses rank"
    q, k, _ = in_order(run, *tensors(0))
    keep, held = chosen(exact_masses(q, k), PERMUTED, run.state.config)
    assert (held >= 0.7).all() and abs(int(run.keep.sum()) - int(keep.sum())) <= H
    true = recall(exact_masses(q, k), run.keep)
    assert (true >= 0.7 - 2 * mass_rounding(q, k, SCALE)).all(), "with as few blocks as can be"
    run.state.end_step()
    ((step, sampled),) = run.statistics.patterns.samples.values()
    q, k, _ = in_order(run, *tensors(2))
    exact = truth.recall(
        q.double(), k.double(), run.keep, block_q=64, block_k=64, scale=SCALE
    )  # fmt: skip
    assert step == 2 and sampled == pytest.approx(exact[0].tolist(), abs=0.06)


@pytest.mark.parametrize("step", [0, 1])
def test_nan_gives_the_call_to_the_host(step):
    run = TailRun("Sss")
    if step:
        run.attend(0, tensors(0))
    q, k, v = tensors(step)
    k[0, 0, 100, 3] = float("nan")
    before = run.host_calls
    out, _ = run.attend(step, (q, k, v))
    assert run.host_calls == before + 1
    assert run.layer().dense_reason == NOT_A_NUMBER
    assert torch.equal(out.isnan(), host_attention(q, k, v).isnan())


def test_out_of_memory_while_permuting_keeps_sampling_dense():
    run, qkv = TailRun("Sss"), tensors()
    run.attend(0, qkv)
    run.backend.fails["permute"] = no_memory()
    out, _ = run.attend(1, qkv)
    assert_within("out", out, dense(*qkv), 1e-5)
    assert run.host_calls == 1 and run.pattern() is None
    assert run.statistics.kept_dense == {SPARSE_OUT_OF_MEMORY: 1}


def test_low_precision_gets_what_the_sparse_kernel_gets(monkeypatch):
    # a search would measure which of two alike is faster
    run, given = TailRun("Ss", precision="int8", dense_attention="host"), {}

    def attention(*qkv, **options):
        given.update(options)
        return run.backend.attention(*qkv, **options)

    monkeypatch.setattr(run.backend, "quantised_attention", attention)
    for step in range(2):
        out, _ = run.attend(step, tensors(step))
    assert run.statistics.low_precision.calls == 1
    assert torch.equal(given["mask"].bits, run.pattern().mask.bits)
    assert given["order"] is not None and given["pooled"] is not None
    assert_within("out", out, with_tail(*tensors(1), run.pattern().mask, run.order), 1e-5)


def test_the_report_tells_of_the_tail():
    text = "Tail: pooled, the average of every skipped block stands in for it"
    for config, said in (({}, True), ({"tail": "none"}, False), ({"block_size": "128"}, False)):
        run = TailRun("Ss", **config)
        for step in range(2):
            _, did = run.attend(step, tensors(step))
        run.state.end_step()
        statistics = run.statistics
        assert (text in statistics.lines()) == said == ("permute" in did)
        assert statistics.as_dict()["tail"] == ("pooled" if said else "none")
        note = "Note: blocks of 128 have no tail, that needs blocks of 64 keys"
        assert (note in statistics.lines()) == ("block_size" in config)


@BOTH_ORDERS
@pytest.mark.parametrize("kinds", ["DSsSs", "DSsss", "DSs"])
def test_memory_is_predicted_to_the_byte(kinds, token_order):
    run, qkv = TailRun(kinds, one_pass=True, token_order=token_order), tensors(batch=2)
    run.estimate(qkv)
    for step in range(len(kinds)):
        run.attend(step, qkv)
    statistics = run.statistics
    assert statistics.memory.held_bytes == statistics.memory.predicted_bytes > 0
