"""The lab's arithmetic at sizes a CPU does at once: `tests/lab`."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "lab"), str(TESTS / "tiny_model")]

import attention  # noqa: E402
import clusters  # noqa: E402
import compare_presets  # noqa: E402
import contestants  # noqa: E402
import cost  # noqa: E402
import metrics  # noqa: E402
import orders  # noqa: E402
import procedural_video as video  # noqa: E402
import report  # noqa: E402
import scores  # noqa: E402
import sparse  # noqa: E402
import svg  # noqa: E402
import tails  # noqa: E402
from rule import PAPER, Rule  # noqa: E402

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
    return [rule for rule in rules if not rule.dense]


@pytest.mark.parametrize(
    "order", ["raster", "rods", "4x4x4", "hilbert", "clusters", "clusters one half"]
)
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


def test_finer_tails_come_closer_to_dense(qkv):
    dense = F.scaled_dot_product_attention(*qkv)
    errors = []
    for tail in ("none", "pooled", "halves", "quarters"):
        out, _ = run(Rule(tail, density=0.2, tail=tail, **SMALL), qkv)
        errors.append(float((out - dense).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.7 * errors[0]


@pytest.mark.parametrize("name", ["4x4x4", "fitted", "rods", "rods 2x8", "hilbert"])
def test_orders_hold_every_token_once_and_text_last(name):
    order = orders.order_of(name, LAYOUT)
    assert sorted(order.tolist()) == list(range(LAYOUT.tokens))
    assert order[-LAYOUT.before :].tolist() == list(range(LAYOUT.before))


@pytest.mark.parametrize("word", ["", "keys", "one", "one half", "within", "free", "near"])
def test_cluster_orders_hold_every_token_once_and_text_last(qkv, word):
    for order in clusters.cluster_orders(f"clusters {word}".strip(), *qkv[:2], LAYOUT):
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


def test_scores_of_the_other_side_tell_which_keys_are_alike():
    q, k = torch.randn(1, 1, 300, 8), torch.randn(1, 1, 300, 8)
    q[..., 4:] = 0  # no query asks for the second half
    features = clusters.leading(k, q)
    apart = torch.cdist(features, features)
    scores_apart = torch.cdist(k @ q.mT, k @ q.mT) / 300**0.5
    torch.testing.assert_close(apart, scores_apart, atol=0.1, rtol=0.05)


def test_every_head_takes_the_order_that_leaves_less(qkv):
    rule = Rule("c", score="block tail", tail="pooled", order="clusters one", density=0.2)
    left = {}
    for name, one in (("rods", rule.but("r", order="rods")), ("clusters", rule)):
        keep, found = (kept := run(one, qkv)[1]).sparse[0].keep, kept.founds[0]
        left[name] = (found["block tail"] * ~keep).sum((-1, -2))
    chosen = run(rule.but("b", choose=True), qkv)[1]
    rods, similar = chosen.captured.pair(0, "rods")[0], chosen.captured.pair(0, rule.order)[0]
    for b, h in ((b, h) for b in range(2) for h in range(3)):
        better = similar[b, h] if left["clusters"][b, h] < left["rods"][b, h] else rods
        assert (chosen.pairs[0][0][b, h] == better).all()


def test_blocks_of_rods_are_compact_where_nothing_divides():
    grid = (8, 12, 22)
    order = orders.rods(grid)
    t, h, w = order // (12 * 22), order // 22 % 12, order % 22
    for block in range(len(order) // 64):
        one = slice(64 * block, 64 * block + 64)
        spans = sorted(int(x[one].max() - x[one].min()) + 1 for x in (t, h, w))
        assert spans in ([4, 4, 4], [2, 4, 8])


def test_hilbert_curve_moves_one_step_at_a_time():
    order = orders.hilbert((8, 8, 8))
    places = torch.stack([order // 64, order // 8 % 8, order % 8], -1)
    assert (places.diff(dim=0).abs().sum(-1) == 1).all()


def test_fitting_cube_divides_the_grid():
    assert orders.fitting_cube((16, 20, 24)) == (4, 4, 4)
    assert orders.fitting_cube((16, 20, 26)) == (8, 4, 2)
    assert orders.fitting_cube((5, 7, 11)) is None


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule.name)
def test_contestants_keep_equally_many_blocks_and_all_text(qkv, rule):
    if rule.layers or len(rule.grades) > 1:
        return check_means(rule)
    small = rule.but(rule.name, density=0.25, block_q=rule.block_q // 4, block_k=rule.block_k // 4)
    _, one = run(small, qkv)
    keep, (sink_q, sink_k) = one.sparse[0].keep, one.sinks
    video_rows = keep[:, :, ~sink_q]
    per_row = max(round(0.25 * keep.shape[-1]), int(sink_k.sum()) + 1)
    assert video_rows.sum((1, 2, 3)).tolist() == [3 * int((~sink_q).sum()) * per_row] * 2
    assert keep[:, :, sink_q].all()
    assert keep[..., sink_k].all()


def check_means(rule):
    for factors in (rule.layers, rule.grades):
        assert not factors or sum(factors) / len(factors) == pytest.approx(1.0)


def test_scores_agree_with_float64(qkv):
    q, k, v = (x[:1, :1].double() for x in qkv)
    found = scores.analyse(*qkv, block_q=16, block_k=16)
    L, N = LAYOUT.tokens, -(-LAYOUT.tokens // 16)
    logits = q @ k.mT / 4
    w, lse = logits.softmax(-1), logits.logsumexp(-1)
    o = w @ v
    j = 5
    keys = slice(16 * j, 16 * j + 16)
    mean_k, mean_v = k[..., keys, :].mean(2, keepdim=True), v[..., keys, :].mean(2, keepdim=True)
    u, m = w[..., keys] @ v[..., keys, :], w[..., keys].sum(-1, keepdim=True)
    p = 16 * ((q @ mean_k.mT / 4) - lse[..., None]).exp()
    rows = {
        "mass": m,
        "error": (u - m * mean_v).norm(dim=-1, keepdim=True),
        "tail error": (u - p * mean_v - (m - p) * o).norm(dim=-1, keepdim=True),
        "drop error squared": (u - m * o).norm(dim=-1, keepdim=True) ** 2,
        "deficit": m - p,
    }
    for name, value in rows.items():
        expected = F.pad(value[0, 0, :, 0], (0, N * 16 - L)).view(N, 16).sum(1)
        assert found[name].shape == (2, 3, N, N)
        torch.testing.assert_close(found[name][0, 0, :, j].double(), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found["lse"][0, 0].double(), lse[0, 0], atol=1e-4, rtol=1e-4)
    assert float(found["key mass"].sum()) == pytest.approx(6 * L, rel=1e-4)


def test_chunks_do_not_change_scores(qkv, monkeypatch):
    whole = scores.analyse(*qkv, block_q=16, block_k=16)
    monkeypatch.setattr(scores, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(sparse, "CHUNK_BYTES", 1 << 16)
    parts = scores.analyse(*qkv, block_q=16, block_k=16)
    for name, value in whole.items():
        # errors are roots of differences
        torch.testing.assert_close(parts[name], value, atol=1e-2, rtol=1e-3)
    dense = F.scaled_dot_product_attention(*qkv)
    out, _ = run(Rule("all", density=1.0, **SMALL), qkv)
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=1e-4)


def test_cached_lse_finds_the_masses_of_unchanged_queries(qkv):
    found = scores.analyse(*qkv, {"mass"}, block_q=64, block_k=64)
    masses = sparse.masses_with(*qkv[:2], found["lse"], 64, 64, 0.25)
    torch.testing.assert_close(masses, found["mass"], atol=1e-3, rtol=1e-3)


def test_mean_queries_estimate_the_mass_that_keys_receive(qkv):
    found = scores.analyse(*qkv, {"mass"}, block_q=1, block_k=64)
    torch.testing.assert_close(found["query mass"], found["key mass"], atol=1e-4, rtol=1e-4)
    coarse = scores.analyse(*qkv, {"mass"}, block_q=16, block_k=64)
    assert (
        torch.corrcoef(torch.stack([coarse["query mass"], found["key mass"]]).flatten(1))[0, 1]
        > 0.9
    )


def test_correction_makes_the_tail_as_heavy_as_what_it_stands_for(qkv):
    found = scores.analyse(*qkv, block_q=16, block_k=16)
    keep = torch.rand(found["mass"].shape) < 0.3
    heavy = {}
    for kind in ("pooled", "corrected"):
        tail = tails.Tail(Rule(kind, tail=kind, **SMALL), keep, LAYOUT.tokens, found)
        _, lse = tail.attend(*qkv, 0.25)
        heavy[kind] = float((lse - found["lse"]).exp().sum())
    left_out = float((found["mass"] * ~keep).sum())
    assert heavy["pooled"] < 0.95 * left_out
    assert heavy["corrected"] == pytest.approx(left_out, rel=0.01)


def test_likeness_of_equal_and_of_different_videos():
    dense = torch.rand(2, 3, 8, 24, 24)
    same = metrics.likeness(dense, dense)
    other = metrics.likeness(dense, (dense + 0.1 * torch.randn_like(dense)).clamp(0, 1))
    assert same["psnr"] == [100.0] * 2 and same["features"] == [0.0] * 2
    assert same["flicker"] == [0.0] * 2 and same["ssim"] == pytest.approx([1.0] * 2)
    assert all(15 < x < 25 for x in other["psnr"])
    assert all(x > 0.001 for x in other["features"]) and all(x > 5 for x in other["flicker"])


def test_reading_back_tells_right_from_wrong():
    import models

    first, second = models.scenes(models.MODELS["tiny"], 9)[:2]
    clip = (video.render([first], 16, 80, 104)[0] * 255).byte().numpy()
    assert metrics.read_back(first, clip) > metrics.read_back(second, clip)
    assert metrics.read_back(first, clip) >= 0.75


def test_equal_time_takes_a_lower_density_for_a_tail():
    extras = {"block means": 1.0, "tail": 5.0, "order": 2.0, cost.EVERY_STEP: 20.0}
    paper = cost.call_ms(PAPER, extras)
    tail = PAPER.but("tail", tail="pooled")
    assert 60 < paper < 75
    assert cost.call_ms(tail, extras) == pytest.approx(paper + 6.0)
    density = cost.density_at(paper, tail, extras)
    assert 0.15 < density < 0.2
    assert cost.call_ms(tail.but("less", density=density), extras) == pytest.approx(paper)
    assert cost.call_ms(PAPER.but("fine", block_k=32), extras) is None


def results(path, gains):
    """Two models and two seeds; `gains` in dB over the paper's rule at density 0.2."""
    other = {"ssim": [0.9] * 2, "features": [0.1] * 2, "flicker": [1.0] * 2, "recall": 0.8}
    rows = [
        {"model": model, "schedule": "20", "rule": name, "density": density, "settings": settings,
         "psnr": [20.0 + gain, 22.0 + gain], "task": [1.0, 0.5], **other}
        for name, density, settings, gain in gains
        for model in ("a", "b")
    ]  # fmt: skip
    dense = [{"model": model, "schedule": "20", "task": [1.0, 1.0]} for model in ("a", "b")]
    extras = {"block means": 0.5, "tail": 5.0, "order": 2.0, cost.EVERY_STEP: 9.0}
    path.write_text(json.dumps({"rows": rows, "dense": dense, "extra_ms": extras}))
    return report.load([path])


def test_report_pairs_seeds_and_finds_equal_time(tmp_path):
    paper = {"head_adaptive": True, "again": [0.6]}
    rods = {"order": "rods", "tail": "pooled"}
    gains = [
        (PAPER.name, 0.2, paper, 0.0),
        ("better", 0.2, rods, 1.5),
        ("better", 0.163, rods, 0.75),
        ("worse", 0.2, {}, -2.0),
    ]
    data = results(tmp_path / "lab.json", gains)
    lines = report.table(data, "20", 0.2).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| better", f"| {PAPER.name}", "| worse"]
    assert "+1.50 ± 0.00" in lines[0] and "-2.00 ± 0.00" in lines[2]
    equal = report.equal_time(data)
    assert "better | 0.163" in equal and "+0.75 ± 0.00 (4 pairs)" in equal
    assert "better | 0.2," not in equal
    assert "-0.250 ± 0.144" in report.tasks(data)


def test_plot_is_well_formed_and_shows_every_point():
    curves = {"a & b": [(0.1, 20.0), (0.2, 25.0)], "c": [(0.1, 19.0), (0.2, 22.0)]}
    root = ElementTree.fromstring(svg.lines(curves, "density", "PSNR", "title"))
    tags = [element.tag.split("}")[1] for element in root.iter()]
    assert tags.count("circle") == 4 and tags.count("polyline") == 2
    assert "a & b" in [element.text for element in root.iter()]
    assert svg.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


@pytest.mark.parametrize("folder, least", [(".", 15), ("first_weights", 30)])
def test_recorded_results_still_make_their_tables(folder, least):
    files = sorted((TESTS / "lab" / "results" / folder).glob("h200_*.json"))
    data = report.load(files)
    text = report.table(data, "20", 0.2)
    assert data["extra_ms"] and text.count("\n") > least
    assert PAPER.name in text
    rules = {rule.name for group in contestants.GROUPS.values() for rule in group}
    assert {name for _, _, name in data["rows"]} <= rules


def users_graph():
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    return {
        "1": node("UNETLoader", unet_name="wan"),
        "2": node("AdaSpaAttention", model=["1", 0], preset="Custom", enabled=True),
        "3": node("KSampler", model=["2", 0], seed=7, steps=20),
        "4": node("AdaSpaReport", samples=["3", 0], adaspa=["2", 1]),
        "5": node("VAEDecode", samples=["4", 0]),
        "6": node("CreateVideo", images=["5", 0]),
        "7": node("SaveVideo", video=["6", 0]),
    }


def test_users_graph_ends_in_its_frames_and_takes_presets():
    graph = compare_presets.prepared(users_graph(), {"SaveVideo", "AdaSpaReport"})
    assert set(graph) == {"1", "2", "3", "5", "6", "adaspa_frames"}
    assert graph["adaspa_frames"]["inputs"]["images"] == ["5", 0]
    assert graph["5"]["inputs"]["samples"] == ["3", 0], "the report passed the latent on"
    fast = compare_presets.variant(graph, "Fast", 3)
    dense = compare_presets.variant(graph, None, 3)
    assert fast["2"]["inputs"] | {"model": 0} == {"model": 0, "preset": "Fast", "enabled": True}
    assert dense["2"]["inputs"]["enabled"] is False and graph["2"]["inputs"]["enabled"]
    assert fast["3"]["inputs"]["seed"] == dense["3"]["inputs"]["seed"] == 3


def test_users_graph_without_our_node_is_refused():
    graph = users_graph()
    del graph["2"]
    with pytest.raises(ValueError, match="no AdaSpa Attention node"):
        compare_presets.prepared(graph, set())


def test_presets_are_summed_up_over_seeds():
    row = {"ssim": 0.9, "flicker": 1.0, "features": 0.1, "seconds": 10.0, "dense_seconds": 20.0}
    rows = [
        {"seed": seed, "preset": preset, "psnr": psnr, **row}
        for preset, psnr in (("Fast", 20.0), ("Quality", 30.0))
        for seed in (1, 2)
    ]
    rows[1]["psnr"] = 22.0
    table, plot = compare_presets.summary(rows)
    assert "| Fast | 21.00 | 0.900 | 1.00 | 10.0 | 20.0 |" in table
    assert plot.startswith("<svg") and "Quality" in plot
