"""The lab's arithmetic at sizes a CPU does at once: `tests/lab`."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "lab"), str(TESTS / "tiny_model")]

import attention  # noqa: E402
import clusters  # noqa: E402
import contestants  # noqa: E402
import orders  # noqa: E402
import scores  # noqa: E402
import sol_op  # noqa: E402
import sparse  # noqa: E402
import train  # noqa: E402
import train_models  # noqa: E402
from rule import PAPER, Rule, first_search  # noqa: E402
from selecting import select  # noqa: E402

from sparse_attn.token_layout import TokenLayout  # noqa: E402

LAYOUT = TokenLayout(before=9, frames=4, height=6, width=11)
SMALL = {"block_q": 16, "block_k": 16}


@pytest.fixture
def qkv():
    """Queries and keys that prefer some blocks: [2, 3, 273, 16]."""
    drift = torch.randn(2, 3, LAYOUT.tokens, 16).cumsum(2) * 0.15
    return tuple(drift + torch.randn(2, 3, LAYOUT.tokens, 16) for _ in range(3))


def captured(qkv):
    found = attention.Captured(LAYOUT)
    found.keep(0, *qkv)
    return found


def run(rule, qkv):
    one = attention.Run(rule, captured(qkv), first=0, steps=10)
    one.begin(1)
    return one.attend(0, *qkv), one


def all_rules():
    rules = {rule: None for group in contestants.GROUPS.values() for rule in group}
    return [rule for rule in rules if not rule.dense and rule.score not in sol_op.SCORES]


@pytest.mark.parametrize("order", ["raster", "rods", "hilbert", "cubes 4x4x4", *clusters.NAMES])
@pytest.mark.parametrize("tail", ["none", "pooled", "frozen"])
def test_everything_kept_is_dense_attention(qkv, order, tail):
    rule = Rule("all", density=1.0, order=order, tail=tail, **SMALL)
    out, one = run(rule, qkv)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*qkv), atol=2e-5, rtol=1e-4)
    assert one.density() == 1.0


def test_tail_joins_the_softmax_as_one_pseudo_key_per_block(qkv):
    q, k, v = qkv
    out, one = run(Rule("tail", density=0.3, tail="pooled", **SMALL), qkv)
    keep = one.sparse[0].keep
    assert 0.2 < keep.float().mean() < 0.5
    tokens = keep.repeat_interleave(16, 2).repeat_interleave(16, 3)
    tokens = tokens[:, :, : LAYOUT.tokens, : LAYOUT.tokens]
    blocks = [x.split(16, dim=2) for x in (k, v)]
    k_mean, v_mean = (torch.stack([b.mean(2) for b in x], 2) for x in blocks)
    size = torch.tensor([b.shape[2] for b in blocks[0]]).float().log()
    rows = (~keep).repeat_interleave(16, 2)[:, :, : LAYOUT.tokens]
    logits = torch.cat([
        (q @ k.mT / 4).masked_fill(~tokens, float("-inf")),
        (q @ k_mean.mT / 4 + size).masked_fill(~rows, float("-inf")),
    ], -1)  # fmt: skip
    torch.testing.assert_close(out, logits.softmax(-1) @ torch.cat([v, v_mean], 2))


@pytest.mark.parametrize("name", ["rods", "hilbert", "cubes 4x4x4", "cubes 8x4x2"])
def test_orders_hold_every_token_once_and_text_last(name):
    order = orders.order_of(name, LAYOUT)
    assert sorted(order.tolist()) == list(range(LAYOUT.tokens))
    assert order[-LAYOUT.before :].tolist() == list(range(LAYOUT.before))


@pytest.mark.parametrize("name", clusters.NAMES)
def test_cluster_orders_hold_every_token_once_and_text_last(qkv, name):
    order = clusters.cluster_order(name, *qkv[:2], LAYOUT)
    assert order.shape == (2, 3, LAYOUT.tokens)
    assert (order.sort(-1).values == torch.arange(LAYOUT.tokens)).all()
    assert (order[..., -LAYOUT.before :] == torch.arange(LAYOUT.before)).all()


def test_clusters_gather_what_is_alike():
    kinds = torch.arange(512)[torch.randperm(512)] % 8
    x = 5 * torch.randn(1, 2, 8, 16)[:, :, kinds] + 0.1 * torch.randn(1, 2, 512, 16)
    order = clusters.halved(x)
    assert (order.sort(-1).values == torch.arange(512)).all()
    blocks = kinds[order].unflatten(-1, (8, 64))
    assert (blocks == blocks[..., :1]).float().mean() > 0.9


def spread_within_blocks(x, order, video: int) -> float:
    """Share of the variance of the video's tokens that is left inside blocks of 64."""
    x = x.gather(2, order.long()[..., None].expand_as(x))[:, :, : video // 64 * 64]
    inside = x.unflatten(2, (-1, 64)).var(3, unbiased=False).mean()
    return float(inside / x.var(2, unbiased=False).mean())


def test_the_pack_orders_as_the_lab_does_and_better_than_rods():
    layout = TokenLayout(9, 8, 16, 22)
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(16, (2, 2, layout.tokens, 1), generator=generator).expand(-1, -1, -1, 32)
    q, k = (
        torch.randn(2, 2, 16, 32, generator=generator).gather(2, kind)
        + 0.05 * torch.randn(2, 2, layout.tokens, 32, generator=generator)
        for _ in range(2)
    )
    labs, packs = (clusters.cluster_order(name, q, k, layout) for name in clusters.NAMES)
    rods = orders.order_of("rods", layout).expand(2, 2, -1)
    for x in (q, k):
        lab, pack, rod = (spread_within_blocks(x, o, layout.video) for o in (labs, packs, rods))
        assert rod > 0.9
        assert lab < 0.2 * rod
        assert 0.8 * lab < pack < 1.2 * lab


def test_scores_of_the_other_side_tell_which_keys_are_alike():
    q, k = torch.randn(1, 1, 300, 8), torch.randn(1, 1, 300, 8)
    q[..., 4:] = 0  # no query asks for the second half
    features = clusters.leading(k, q)
    apart = torch.cdist(features, features)
    scores_apart = torch.cdist(k @ q.mT, k @ q.mT) / 300**0.5
    torch.testing.assert_close(apart, scores_apart, atol=0.1, rtol=0.05)


def test_every_head_takes_the_order_that_leaves_less(qkv):
    rule = Rule("c", score="block tail", tail="pooled", order="clusters", density=0.2)
    left = {}
    for name, one in (("rods", rule.but("r", order="rods")), ("clusters", rule)):
        keep, found = (kept := run(one, qkv)[1]).sparse[0].keep, kept.founds[0]
        left[name] = (found["block tail"] * ~keep).sum((-1, -2))
    chosen = run(rule.but("b", choose=True), qkv)[1]
    rods, similar = (chosen.captured.order(0, name) for name in ("rods", rule.order))
    for b, h in ((b, h) for b in range(2) for h in range(3)):
        better = similar[b, h] if left["clusters"][b, h] < left["rods"][b, h] else rods
        assert (chosen.orders[0][b, h] == better).all()


def test_a_search_right_after_the_first_one_looks_at_its_own_step(qkv):
    rule = Rule("c", score="block tail", tail="pooled", order="clusters", density=0.2)
    now = tuple(x.flip(2) for x in qkv)
    orders_found = {}
    for again in ((), (0.1,)):
        one = attention.Run(rule.but("c", again=again), captured(qkv), first=0, steps=10)
        one.begin(1)
        one.attend(0, *now)
        assert one.searches == len(again)
        orders_found[again] = one.orders[0]
    then, fresh = (clusters.cluster_order("clusters", *x[:2], LAYOUT) for x in (qkv, now))
    assert torch.equal(orders_found[()], then) and torch.equal(orders_found[0.1,], fresh)


def test_a_carried_pattern_is_the_other_seeds_order_and_mask(qkv):
    rule = Rule("c", score="block tail", tail="pooled", order="clusters", density=0.2)
    own, carried = run(rule, qkv)[1], run(rule.but("d", carried=True), qkv)[1]
    assert torch.equal(carried.orders[0], own.orders[0].flip(0))
    assert torch.equal(carried.sparse[0].keep, own.sparse[0].keep.flip(0))


def test_a_drift_gate_searches_where_keys_moved(qkv):
    rule = Rule("c", score="block tail", tail="pooled", order="rods", density=0.2, drift=0.5)
    for moved, searches in ((0.01, 0), (5.0, 1)):
        one = attention.Run(rule, captured(qkv), first=0, steps=10)
        for step, share in ((1, 0.0), (2, moved)):
            one.begin(step)
            one.attend(0, qkv[0], qkv[1] + share * torch.randn_like(qkv[1]).cumsum(2), qkv[2])
        assert one.searches == searches


def test_blocks_of_rods_are_compact_where_nothing_divides():
    grid = (8, 12, 22)
    order = orders.rods(grid)
    t, h, w = order // (12 * 22), order // 22 % 12, order % 22
    for block in range(len(order) // 64):
        one = slice(64 * block, 64 * block + 64)
        spans = sorted(int(x[one].max() - x[one].min()) + 1 for x in (t, h, w))
        assert spans in ([4, 4, 4], [2, 4, 8])


@pytest.mark.parametrize("sides", [(4, 4, 4), (8, 4, 2)])
def test_cubes_that_divide_the_grid_are_blocks(sides):
    grid = (8, 12, 16)
    order = orders.cubes(grid, sides).unflatten(0, (-1, 64))
    for x, side in zip((order // 192, order // 16 % 12, order % 16), sides, strict=True):
        assert (x.amax(1) - x.amin(1) == side - 1).all() and (x.amin(1) % side == 0).all()


def test_hilbert_curve_moves_one_step_at_a_time():
    order = orders.hilbert((8, 8, 8))
    places = torch.stack([order // 64, order // 8 % 8, order % 8], -1)
    assert (places.diff(dim=0).abs().sum(-1) == 1).all()


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule.name)
def test_contestants_keep_equally_many_blocks_and_all_text(qkv, rule):
    if rule.layers or len(rule.grades) > 1:
        return check_mean(rule)
    small = rule.but(rule.name, density=0.25, block_q=rule.block_q // 4, block_k=rule.block_k // 4)
    _, one = run(small, qkv)
    keep, (sink_q, sink_k) = one.sparse[0].keep, one.sinks
    video_rows = keep[:, :, ~sink_q]
    per_row = max(round(0.25 * keep.shape[-1]), int(sink_k.sum()) + 1)
    assert video_rows.sum((1, 2, 3)).tolist() == [3 * int((~sink_q).sum()) * per_row] * 2
    assert keep[:, :, sink_q].all()
    assert keep[..., sink_k].all()


def check_mean(rule):
    steps, first = first_search(rule, "20")
    one = attention.Run(rule, attention.Captured(LAYOUT), first, steps)
    wanted = []
    for step in range(first + 1, steps):
        one.begin(step)
        wanted += [one.wanted(layer) for layer in range(6)]
    assert len(set(wanted)) > 1 and sum(wanted) / len(wanted) == pytest.approx(rule.density)


def test_a_name_means_one_rule_and_ablations_begin_with_their_base():
    named = {rule.name: rule for group in contestants.GROUPS.values() for rule in group}
    for name, group in contestants.GROUPS.items():
        assert all(named[rule.name] == rule for rule in group), name
    for group in contestants.ABLATIONS.values():
        base, *others = group
        assert base in (PAPER, contestants.ONE, contestants.TWO) and others


def test_a_head_adaptive_target_moves_blocks_between_heads_and_rows(qkv):
    rule = Rule("m", score="mass", budget="mass", head_adaptive=True, **SMALL)
    masses = scores.analyse(*qkv, block_q=16, block_k=16)["mass"]
    masses[:, 0, :, 3:] *= 1e-3  # a recall above 0.8: this head gives
    no_text = torch.zeros(18, dtype=torch.bool)
    kept = select(rule, masses, masses, no_text, no_text, 0.3).sum(-1)
    assert sorted(kept[0].sum(-1).tolist()) == [18 * 3, 18 * 5, 18 * 7]
    assert kept[0, 0].sum() == 18 * 3 and kept[0, 1].unique().numel() > 1


def test_scores_agree_with_float64(qkv):
    q, k, _ = (x[:1, :1].double() for x in qkv)
    found = scores.analyse(*qkv, block_q=16, block_k=16)
    L, N = LAYOUT.tokens, -(-LAYOUT.tokens // 16)
    logits = q @ k.mT / 4
    w, lse = logits.softmax(-1), logits.logsumexp(-1)
    j = 5
    keys = slice(16 * j, 16 * j + 16)
    m = w[..., keys].sum(-1, keepdim=True)
    p = 16 * ((q @ k[..., keys, :].mean(2, keepdim=True).mT / 4) - lse[..., None]).exp()
    for name, value in {"mass": m, "deficit": m - p}.items():
        expected = F.pad(value[0, 0, :, 0], (0, N * 16 - L)).view(N, 16).sum(1)
        assert found[name].shape == (2, 3, N, N)
        torch.testing.assert_close(found[name][0, 0, :, j].double(), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found["lse"][0, 0].double(), lse[0, 0], atol=1e-4, rtol=1e-4)


def test_block_tail_is_what_its_formula_says(qkv):
    found = scores.analyse(*qkv, block_q=16, block_k=16)
    v = qkv[2][1, 2].double()
    mass, deficit = found["mass"][1, 2].double(), found["deficit"][1, 2].double()
    blocks = v.split(16)
    centre = torch.stack([b.mean(0) for b in blocks])
    spread = torch.stack([(b - b.mean(0)).square().mean(0).sum().sqrt() for b in blocks])
    out = mass @ centre / mass.sum(-1, keepdim=True)
    apart = (centre[None] - out[:, None]).norm(dim=-1)
    expected = (mass * deficit).sqrt() * spread + deficit * apart
    torch.testing.assert_close(found["block tail"][1, 2].double(), expected, atol=1e-3, rtol=2e-3)


def test_chunks_do_not_change_scores(qkv, monkeypatch):
    whole = scores.analyse(*qkv, block_q=16, block_k=16)
    monkeypatch.setattr(scores, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(sparse, "CHUNK_BYTES", 1 << 16)
    parts = scores.analyse(*qkv, block_q=16, block_k=16)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-3, rtol=1e-3)
    dense = F.scaled_dot_product_attention(*qkv)
    out, _ = run(Rule("all", density=1.0, **SMALL), qkv)
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=1e-4)


def test_cached_lse_finds_the_masses_of_unchanged_queries(qkv):
    found = scores.analyse(*qkv, block_q=64, block_k=64, tails=False)
    assert "deficit" not in found
    masses = sparse.masses_with(*qkv[:2], found["lse"], 64, 64, 0.25)
    torch.testing.assert_close(masses, found["mass"], atol=1e-3, rtol=1e-3)


def test_mean_queries_estimate_the_mass_that_keys_receive(qkv):
    received = (qkv[0] @ qkv[1].mT / 4).softmax(-1).sum(2)
    fine = scores.analyse(*qkv, block_q=1, block_k=64)["query mass"]
    torch.testing.assert_close(fine, received, atol=1e-4, rtol=1e-4)
    coarse = scores.analyse(*qkv, block_q=16, block_k=64)["query mass"]
    assert torch.corrcoef(torch.stack([coarse, received]).flatten(1))[0, 1] > 0.9


def test_sol_ops_threshold_takes_the_share_of_blocks_that_was_asked_for(qkv):
    q, k, _ = (x.repeat(1, 1, 4, 1) for x in qkv)
    for density in (0.25, 0.5):
        tau, exact = sol_op.threshold_for(q, k, density)
        assert -9 < tau < 9 and abs(float(exact.float().mean()) - density) < 0.02


@pytest.mark.parametrize("name", train_models.TRAINED)
def test_a_training_makes_the_model_and_ends_at_its_size(name, tmp_path):
    spec = train_models.MODELS[name]
    options = Namespace(comfyui="", out=tmp_path, minutes=1.0, more="--seed 5")
    args = train.parser().parse_args(train_models.command(name, options)[2:])
    assert (args.family, args.heads, args.head_dim) == (spec.family, spec.heads, spec.head_dim)
    assert (args.layers, args.rich, args.name, args.seed) == (spec.layers, spec.rich, name, 5)
    assert spec.family == "wan" or args.double == spec.double
    stages = train.stages(args)
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    assert (stages[-1].frames, stages[-1].height, stages[-1].width) == spec.latent
