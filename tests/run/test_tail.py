"""What an attention call does with a pooled tail, step by step, with plain torch."""

import pytest
import torch
from close import assert_same_choice, assert_within, mass_rounding, rounding

from sparse_attn import block_mask
from sparse_attn.backends import reference
from sparse_attn.block_mask import BlockMask, recall
from sparse_attn.call import LayerName
from sparse_attn.config import TOKEN_ORDERS
from sparse_attn.orders.packed import same_blocks
from sparse_attn.orders.position import serpentine_order, video_first
from sparse_attn.patterns.file import load, save
from sparse_attn.patterns.reuse import ONE_ORDER
from sparse_attn.run import packed_lse
from sparse_attn.run.serving import NOT_A_NUMBER, SPARSE_OUT_OF_MEMORY
from sparse_attn.token_layout import TokenLayout
from tests.method import truth
from tests.method.chosen import chosen
from tests.run.fakes import (
    SCALE,
    Backend,
    Run,
    exact_masses,
    host_attention,
    no_memory,
)

# grids that rods of 4 x 4 do not divide, text on both sides, a last block that is not full
LAYOUT = TokenLayout(30, 5, 6, 21, 40)
H, D = 2, 16
PERMUTED = video_first(LAYOUT)
NAME = LayerName("positive", "double", 0, 0)
BOTH_ORDERS = pytest.mark.parametrize("token_order", TOKEN_ORDERS)


class TailRun(Run):
    """A run with a pooled tail whose only layer has one key."""

    def __init__(self, kinds, one_pass=False, layout=LAYOUT, carried=None, **config):
        fields = {"tail": "pooled", "token_order": "position", **config}
        super().__init__(kinds, Backend(one_pass), layout=layout, carried=carried, **fields)
        self.statistics.model = "Wan"

    def attend(self, step, qkv, **more):
        out, did = super().attend(step, qkv, **more)
        return out, [what for what in did if what != "host"]

    @property
    def keep(self):
        return self.pattern().mask.to_dense()

    @property
    def order(self):
        return self.state.layers.fetch(self.layer(), torch.device("cpu"))[1]


def tensors(seed=0, batch=1, layout=LAYOUT, dtype=torch.float32):
    """Neighbours in the video are alike; [B, H, L, D] over the host's [B, L, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    L = layout.tokens
    smooth = torch.randn(batch, 8, H, D, generator=generator)
    smooth = smooth.repeat_interleave(-(-L // 8), 1)[:, :L]
    found = []
    for share in (1.0, 1.0, 0.0):
        x = share * smooth + torch.randn(batch, L, H, D, generator=generator)
        found.append(x.to(dtype).transpose(1, 2))
    return found


def dense(q, k, v, key_bias=None):
    bias = None if key_bias is None else key_bias.double()
    inputs = (x.double() for x in (q, k, v))
    return reference.attention(*inputs, scale=SCALE, key_bias=bias)[0]


def with_tail(q, k, v, mask, order, key_bias=None):
    bias = None if key_bias is None else key_bias.double()
    moved = reference.permute(q.double(), k.double(), v.double(), order, bias)
    return reference.attention(
        moved.q, moved.k, moved.v, scale=SCALE, key_bias=moved.key_bias, mask=mask,
        pooled=moved.pooled, order=order,
    )[0]  # fmt: skip


def tail_error(q, k, v):
    """Of every block pair, of tokens in the mask's order, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    lse = reference.scaled_logits(q, k, SCALE).logsumexp(-1)
    order = torch.arange(k.shape[2]).expand(k.shape[:3])
    pooled = reference.permute(None, k, v, order).pooled
    masses = reference.block_masses(q, k, lse, block_q=64, block_k=64, scale=SCALE)
    pooled_masses = reference.pooled_masses(
        q, pooled.k_mean, pooled.log_sizes, lse, block_q=64, scale=SCALE
    )
    return reference.tail_error(masses, pooled_masses, v, pooled.v_mean)


def padded(batch=1):
    """A bias that hides the last tokens of the text behind the video, and weighs one before it."""
    bias = torch.zeros(batch, LAYOUT.tokens)
    bias[:, -25:] = -1e30
    bias[:, 3] = 1.5
    return bias


def in_order(run, *tensors):
    return [reference.in_order(x, run.order) for x in tensors]


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


@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
@BOTH_ORDERS
def test_a_later_search_finds_the_new_pattern_with_the_old_lse(one_pass, token_order):
    run, later = TailRun("DSsSs", one_pass=one_pass, token_order=token_order), tensors(7)
    for step in range(3):
        if step or one_pass:
            run.attend(step, tensors(step))
    old, old_order = run.keep, run.order
    assert run.layer().lse is not None
    run.attend(3, later)
    new = run.keep
    assert not torch.equal(new, old) and run.layer().lse is None
    q, k, v = (x.double() for x in in_order(run, *later))
    scores = tail_error(q, k, v)
    best, _ = chosen(scores.float(), PERMUTED, run.state.config)
    spared = (scores * new).sum() / (scores * best).sum()
    assert spared > 0.95, "close to the choice with today's LSE"
    if token_order == "position":
        assert (scores * old).sum() < (scores * new).sum() and torch.equal(old_order, run.order)
        return
    assert not torch.equal(old_order, run.order), "an order of today's tokens"
    truth = dense(*later)
    left = [
        (with_tail(*later, BlockMask.from_dense(keep, block_q=64, block_k=64), order) - truth)
        .square()
        .mean()
        for keep, order in ((new, run.order), (old, old_order))
    ]
    assert left[0] < left[1]


@BOTH_ORDERS
def test_a_kept_lse_is_in_the_order_of_the_tokens(token_order):
    run = TailRun("DSsSs", one_pass=True, token_order=token_order)
    for step in range(2):
        q, k, v = tensors(step)
        run.attend(step, (q, k, v))
        exact = reference.scaled_logits(q, k, SCALE).logsumexp(-1)
        found = packed_lse.unpack(run.layer().lse, LAYOUT.tokens)
        spanned = (exact.amax(-1) - exact.amin(-1)).max().item()
        assert_within("lse", found, exact.double(), 1e-4 + 1.01 * spanned / 510)


def test_a_search_takes_the_heads_that_similarity_serves_better():
    """Head 0 looks all over the video for its like, head 1 around itself."""
    generator = torch.Generator().manual_seed(3)
    L = LAYOUT.tokens
    kinds = torch.randn(10, D, generator=generator) * 2
    strewn = torch.randint(10, (L,), generator=generator)
    q, k, v = tensors(4)
    q[0, 0] = kinds[strewn] + 0.1 * q[0, 0]
    k[0, 0] = kinds[strewn] + 0.1 * k[0, 0]
    run = TailRun("Ss", token_order="similarity")
    run.attend(0, (q, k, v))
    in_place = serpentine_order(LAYOUT, torch.device("cpu"))
    assert not torch.equal(run.order[0, 0], in_place)
    assert torch.equal(run.order[0, 0, LAYOUT.video :], in_place[LAYOUT.video :])
    alike = strewn[run.order[0, 0, : LAYOUT.video].long()].split(64)
    assert sum((x == x.mode().values).float().mean() for x in alike) / len(alike) > 0.6
    run.state.end_step()
    statistics = run.statistics
    (pattern,) = statistics.patterns.values()
    assert pattern.similar == [float(not torch.equal(x, in_place)) for x in run.order[0]]
    share = sum(pattern.similar) / 2
    assert statistics.patterns.similar() == statistics.as_dict()["heads_by_similarity"] == share > 0
    line = f"Token order: by similarity in {share:.0%} of the heads, else by position"
    assert line in statistics.lines()
    position = TailRun("Ss")
    position.attend(0, (q, k, v))
    assert torch.equal(position.order, in_place.expand(1, H, -1))


def test_a_bias_on_the_video_leaves_all_heads_one_order():
    run, qkv, bias = TailRun("Ss", token_order="similarity"), tensors(), padded()
    bias[:, 100] = -1.0
    run.attend(0, qkv, key_bias=bias)
    later = tensors(1)
    out, _ = run.attend(1, later, key_bias=bias)
    in_place = serpentine_order(LAYOUT, torch.device("cpu")).expand(1, H, -1)
    assert same_blocks(run.order, in_place, LAYOUT).all()
    assert torch.equal(run.order[0], run.order[0, :1].expand(H, -1))
    assert_within("out", out, with_tail(*later, run.pattern().mask, run.order, bias), 1e-5)


def test_a_replaced_order_takes_its_prefetched_copy_along():
    run, forgotten = TailRun("SSs", token_order="similarity"), []
    run.state.cache.forget = lambda *stored: forgotten.extend(stored)
    run.attend(0, tensors(0))
    old = run.pattern().mask.bits, run.pattern().order
    run.attend(1, tensors(1))
    assert [x is y for x, y in zip(forgotten, old, strict=True)] == [True, True]


def test_orders_are_kept_where_masks_are_and_fetched_ahead(monkeypatch):
    run = TailRun("Sss", token_order="similarity")
    cache, kept, ahead = run.state.cache, [], []
    cache.place = "cpu"
    keep = cache.keep
    monkeypatch.setattr(cache, "keep", lambda x: kept.append(x) or keep(x))
    monkeypatch.setattr(cache, "prefetch", lambda x, device: ahead.append(x))
    run.attend(0, tensors(0))
    run.state.layers.following["layer 0"] = "layer 0"
    run.state.layers.prefetch_next("layer 0", torch.device("cuda"))
    wanted = [run.pattern().mask.bits, run.pattern().order]
    assert all(x is y for x, y in zip(ahead, wanted, strict=True))
    assert any(torch.equal(x, run.pattern().order) for x in kept)
    run.layer().disable("a reason")
    assert run.pattern() is None and run.layer().nbytes() == 0


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
    run, given = TailRun("Ss", precision="int8"), {}

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


# ---- carried patterns


def carried_from(**config):
    run = TailRun("Ss", **config)
    for step in range(2):
        run.attend(step, tensors(step), name=NAME)
    return run.state.end(keep_pattern=True).named("another run")


@BOTH_ORDERS
@pytest.mark.parametrize("most_blocks", [block_mask.MOST_BLOCKS, 5])
def test_a_carried_pattern_is_used_in_its_order(token_order, most_blocks, tmp_path, monkeypatch):
    # eleven blocks a side: a file has the small ones
    monkeypatch.setattr(block_mask, "MOST_BLOCKS", most_blocks)
    pattern = carried_from(token_order=token_order)
    assert pattern.layers[NAME].bits.shape[-2:] == (11, 2)
    assert pattern.pooled and pattern.layout == LAYOUT
    own = token_order == "similarity"
    assert pattern.order == ("similarity" if own else "rods")
    assert (pattern.layers[NAME].order is not None) == own
    pattern = load(save(pattern, tmp_path, "pattern"))
    run = TailRun("Sss", carried=pattern)
    # clusters of other tokens would not hold enough here
    qkv = tensors(0 if own else 1)
    out, did = run.attend(0, qkv, name=NAME)
    assert did == ["permute", "sparse"]
    assert torch.equal(run.pattern().mask.bits, pattern.layers[NAME].bits)
    if own:
        assert torch.equal(run.order, pattern.layers[NAME].order)
    assert_within("out", out, with_tail(*qkv, run.pattern().mask, run.order), 1e-5)
    run.state.end_step()
    (shown,) = run.statistics.patterns.values()
    q, k, _ = in_order(run, *qkv)
    exact = truth.recall(q.double(), k.double(), run.keep, block_q=64, block_k=64, scale=SCALE)
    assert shown.recall == pytest.approx(exact[0].tolist(), abs=0.06)


def test_a_second_search_replaces_a_carried_pattern():
    run = TailRun("DsSs", one_pass=True, carried=carried_from())
    did = [run.attend(step, tensors(step), name=NAME)[1] for step in range(4)]
    # with the LSE of the dense step
    again = ["permute", "masses", "pooled masses", "permute", "sparse"]
    assert did[1:] == [["permute", "sparse"], again, ["permute", "sparse"]]
    assert not run.pattern().carried


def test_a_pattern_of_many_orders_is_refused_where_the_video_is_biased():
    run = TailRun("Ss", carried=carried_from(token_order="similarity"))
    bias = torch.zeros(1, LAYOUT.tokens)
    bias[:, 100] = -1.0
    run.attend(0, tensors(1), name=NAME, key_bias=bias)
    assert run.statistics.reuse.refused == {ONE_ORDER: 1} and not run.pattern().carried


@pytest.mark.parametrize("first, second", [("none", "pooled"), ("pooled", "none")])
def test_a_pattern_of_another_tail_is_refused_with_the_reason(first, second):
    pattern = carried_from(tail=first)
    run = TailRun("Ss", tail=second, carried=pattern)
    run.attend(0, tensors(0), name=NAME)
    reason = f"the pattern was found with `tail` {first}, and this run has {second}"
    assert run.statistics.reuse.refused == {reason: 1}
    assert run.keep is not None and not run.pattern().carried
