"""The lab's rules at sizes a CPU does at once, the pack's through its own installation."""

import math
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "lab"), str(TESTS / "tiny_model")]

import check_model  # noqa: E402
import compare_sol  # noqa: E402
import contestants  # noqa: E402
import generation  # noqa: E402
import models  # noqa: E402
import rivals  # noqa: E402
import run_forecast  # noqa: E402
import sol_op  # noqa: E402
import train  # noqa: E402
import train_models  # noqa: E402
from rule import SCHEDULES, Rule, first_search, of_preset  # noqa: E402

from sparse_attn.config import PRESETS  # noqa: E402
from sparse_attn.schedule import StepKind, plan  # noqa: E402
from sparse_attn.token_layout import TokenLayout  # noqa: E402

LAYOUT = TokenLayout(before=9, frames=8, height=9, width=11)


def all_rules():
    return list({rule: None for group in contestants.GROUPS.values() for rule in group})


@pytest.fixture
def qkv():
    """Queries and keys that prefer some blocks: [2, 3, 801, 16]."""
    drift = torch.randn(2, 3, LAYOUT.tokens, 16).cumsum(2) * 0.15
    return tuple(drift + torch.randn(2, 3, LAYOUT.tokens, 16) for _ in range(3))


@pytest.mark.parametrize("tail", ["none", "pooled"])
def test_everything_kept_is_dense_attention(qkv, tail, monkeypatch):
    keep = torch.ones(2, 3, 13, 13, dtype=torch.bool)
    dense = F.scaled_dot_product_attention(*qkv)
    torch.testing.assert_close(rivals.attention(*qkv, keep, tail), dense, atol=2e-5, rtol=1e-4)
    monkeypatch.setattr(rivals, "CHUNK_BYTES", 1)
    torch.testing.assert_close(rivals.attention(*qkv, keep, tail), dense, atol=2e-5, rtol=1e-4)


def test_tail_joins_the_softmax_as_one_pseudo_key_per_block(qkv):
    q, k, v = qkv
    keep = torch.rand(2, 3, 13, 13) < 0.4
    keep[..., 0] = True
    tokens = keep.repeat_interleave(64, 2).repeat_interleave(64, 3)
    tokens = tokens[:, :, : LAYOUT.tokens, : LAYOUT.tokens]
    blocks = [x.split(64, dim=2) for x in (k, v)]
    k_mean, v_mean = (torch.stack([b.mean(2) for b in x], 2) for x in blocks)
    size = torch.tensor([b.shape[2] for b in blocks[0]]).float().log()
    rows = (~keep).repeat_interleave(64, 2)[:, :, : LAYOUT.tokens]
    logits = torch.cat([
        (q @ k.mT / 4).masked_fill(~tokens, float("-inf")),
        (q @ k_mean.mT / 4 + size).masked_fill(~rows, float("-inf")),
    ], -1)  # fmt: skip
    expected = logits.softmax(-1) @ torch.cat([v, v_mean], 2)
    out = rivals.attention(q, k, v, keep, "pooled")
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("score", rivals.SCORES)
def test_rivals_keep_equally_many_blocks_and_all_text(qkv, score):
    rival = rivals.Rival(Rule("r", density=0.4, score=score), LAYOUT, 0)
    keep, text = rival.choose(0, *qkv), rivals.text_blocks(LAYOUT)
    assert text.nonzero().flatten().tolist() == [0]
    assert keep[:, :, ~text].sum((1, 2, 3)).tolist() == [3 * 12 * 5] * 2
    assert keep[:, :, text].all() and keep[..., text].all()


def test_a_threshold_gives_rows_that_stand_out_more(qkv):
    q, k, v = (x.clone() for x in qkv)
    q[:, :, 256:320] = 0  # a row of blocks without a preference
    rival = rivals.Rival(Rule("r", density=0.4, score="threshold"), LAYOUT, 0)
    rows = rival.choose(0, q, k, v).sum(-1)
    assert (rows[:, :, 4] == 2).all() and rows[:, :, 1:].unique().numel() > 2


def test_a_tail_error_is_what_a_pseudo_key_does_to_the_output(qkv):
    q, k, v = qkv
    dense = F.scaled_dot_product_attention(q, k, v)
    found = rivals.tail_errors(q, k, v)
    for block in (3, 12):  # one of them is not full
        keep = torch.ones(2, 3, 13, 13, dtype=torch.bool)
        keep[..., block] = False
        moved = (rivals.attention(q, k, v, keep, "pooled") - dense).norm(dim=-1)
        # the first order takes the weights' sum, which the pseudo key changes, to stay 1
        place = slice(64 * block, 64 * (block + 1))
        weights = (q @ k.mT / 4).softmax(-1)[..., place].sum(-1)
        lse = (q @ k.mT / 4).logsumexp(-1)
        size = k[:, :, place].shape[2]
        pseudo = (q @ k[:, :, place].mean(2)[..., None] / 4)[..., 0] + math.log(size) - lse
        moved = F.pad(moved * (1 - weights + pseudo.exp()), (0, 13 * 64 - LAYOUT.tokens))
        torch.testing.assert_close(
            found[..., block], moved.unflatten(-1, (-1, 64)).sum(-1), atol=1e-3, rtol=1e-3
        )


def test_radial_reaches_less_far_the_further_in_time():
    layout = TokenLayout(0, 8, 8, 8)  # a block is a frame
    rival = rivals.Rival(Rule("r", density=0.4, score="radial"), layout, 0)
    q = torch.zeros(1, 1, layout.tokens, 4)
    scores = rival.static(0, q, q, q, 3)[0, 0]
    assert (scores[0].diff() < 0).all(), "frames at the same place: the nearer the better"
    wide = TokenLayout(0, 8, 16, 8)  # half a frame
    rival = rivals.Rival(Rule("r", density=0.4, score="radial"), wide, 0)
    q = torch.zeros(1, 1, wide.tokens, 4)
    scores = rival.static(0, q, q, q, 3)[0, 0]
    other_half = scores[0, 1::2]
    assert other_half[0] > other_half[2] > other_half[4]
    assert scores[0, 14] > other_half[0], "the same place at any time before another place"


def test_every_head_is_spatial_or_temporal_by_what_it_looks_at():
    layout = TokenLayout(0, 8, 16, 8)
    place = torch.arange(layout.tokens) // 64
    kinds = torch.stack([place // 2, place % 2])  # frames, halves
    q = 20.0 * F.one_hot(kinds, 8).float()[None]
    rival = rivals.Rival(Rule("r", density=0.5, score="spatial or temporal"), layout, 0)
    keep = rival.choose(0, q, q, q)[0]
    same = [(kind[::64, None] == kind[None, ::64]) for kind in kinds]
    assert keep[0][same[0]].all() and keep[1][same[1]].all()
    assert not keep[0][same[1]].all()


def test_a_rival_is_dense_up_to_the_step_of_the_first_search(qkv):
    for score, chosen in (("pooled", [2, 3]), ("random", [1])):
        rival = rivals.Rival(Rule("r", density=0.4, score=score), LAYOUT, 1)
        seen = []
        rival.choose = lambda *a, r=rival, s=seen: (
            s.append(r.steps[0]) or torch.ones(2, 3, 13, 13, dtype=torch.bool)
        )
        outs = [rival.attend(0, *qkv) for _ in range(4)]
        assert [out is None for out in outs] == [True, True, False, False]
        assert seen == chosen and rival.density() == 1.0


def test_sol_ops_threshold_takes_the_share_of_blocks_that_was_asked_for(qkv):
    q, k, _ = (x.repeat(1, 1, 2, 1) for x in qkv)
    for density in (0.25, 0.5):
        tau, exact = sol_op.threshold_for(q, k, density)
        assert -9 < tau < 9 and abs(float(exact.float().mean()) - density) < 0.02


def test_a_name_means_one_rule_and_questions_begin_with_their_base():
    named = {rule.name: rule for rule in all_rules()}
    assert len(named) == len(all_rules())
    for group in contestants.QUESTIONS.values():
        assert len(group) > 1 and group[0] in (
            contestants.PAPER, contestants.PLAIN, contestants.TWO
        )  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_rule_of_the_pack_has_a_configuration(schedule):
    for rule in all_rules():
        if rule.score != "mass":
            continue
        asked = rule.but(rule.name, density=rule.density or 0.2)
        steps, first = first_search(rule, schedule)
        if rule.warmup is None and rule.again and rule.again[0] < first / steps:
            with pytest.raises(ValueError, match="must lie from the warm-up"):
                asked.config(schedule)
            continue
        config = asked.config(schedule)
        assert config.blocks == {"block_q": rule.block_q, "block_k": rule.block_k}
        assert config.pooled == (rule.order != "raster")
    with pytest.raises(ValueError, match="no blocks of 64x32"):
        Rule("fine", 0.2, block_k=32).config("20")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_user_gets(name):
    found, expected = of_preset(name).config("50"), PRESETS[name]
    for field in (
        "search_points",
        "head_adaptive",
        "tail",
        "search_gap",
        "block_size",
        "precision",
    ):
        assert getattr(found, field) == getattr(expected, field)
    assert found.warmup == pytest.approx(expected.warmup)
    assert found.sparsity == pytest.approx(expected.sparsity)
    assert found.by_similarity == expected.by_similarity and found.min_tokens == 0


@pytest.mark.parametrize("schedule", ["4", "6", "8"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_on_few_steps_does_what_its_user_gets(name, schedule):
    steps = int(schedule)
    sigmas = [1 - i / steps for i in range(steps + 1)]
    found, expected = (
        plan(sigmas, lambda sigma: 1 - sigma, config)
        for config in (of_preset(name).config(schedule), PRESETS[name])
    )
    assert found == expected
    assert first_search(of_preset(name), schedule)[1] == expected.kinds.index(StepKind.SEARCH)


def test_a_search_that_a_cache_has_skipped_is_counted_where_it_took_place():
    letters = {"D": "dense", "S": "search", "s": "sparse", "f": "forecast", "-": "skipped"}
    letters["R"] = "search_again"
    planned = [letters[x] for x in "DDSssfsSss"]
    told = SimpleNamespace(
        step_kinds=lambda: planned,
        was_skipped=lambda step: step in (2, 3, 5, 7, 9),
        schedule=SimpleNamespace(sparse_search=False),
    )
    assert run_forecast.kinds_done(told) == [letters[x] for x in "DD--Sfs-R-"]


LATENT = (4, 16, 20)


@pytest.fixture(scope="module")
def subject(comfyui):
    """Two seeds of the tiny model at 320 tokens."""
    return generation.Subject(models.MODELS["tiny"], str(comfyui), 2, LATENT)


@pytest.fixture(scope="module")
def dense(subject):
    return subject.dense(8)


def test_scenes_and_noise_are_sampled_seed_by_seed(subject, dense):
    noise = torch.randn(16, *LATENT, generator=torch.manual_seed(1))[None]
    alone = check_model.generate(subject.model, subject.prompts[1:], LATENT, 8, 0, None, noise)
    alone = generation.video.decode(alone).clamp(0, 1)
    assert float((alone - dense[1:]).abs().max()) < 1e-3
    assert float((dense[0] - dense[1]).abs().mean()) > 0.05


@pytest.mark.parametrize("rule", [contestants.TWO, contestants.PAPER], ids=lambda rule: rule.name)
def test_the_packs_rules_run_through_its_installation(subject, dense, rule):
    run = subject.run(rule.but(rule.name, density=0.45), "8")
    assert sorted(run.recall) == list(range(6)) and all(0.3 < x <= 1 for x in run.recall.values())
    assert run.searches == 6 and 0.3 < run.density < 0.6
    assert (run.similar is None) == (rule.tail == "none")
    assert 0.001 < float((run.video - dense).abs().mean()) < 0.2
    everything = subject.run(rule.but("all", density=1.0, head_adaptive=False), "8")
    assert float((everything.video - dense).abs().max()) < 2e-3


def test_a_rivals_rule_runs_through_the_same_override(subject, dense):
    run = subject.run(contestants.SOL.but("sol", density=0.45), "8")
    assert run.density == pytest.approx(0.4, abs=0.01) and not run.recall
    assert 0.001 < float((run.video - dense).abs().mean()) < 0.2
    everything = subject.run(contestants.SLA.but("all", density=1.0), "8")
    assert float((everything.video - dense).abs().max()) < 2e-3


def test_the_emulation_is_compared_on_what_a_dense_step_saw(subject):
    seen = compare_sol.seen_at(subject, 5, 8)
    assert sorted(seen) == list(range(6)) and seen[0][0].shape == (2, 4, 320, 64)
    assert not torch.equal(seen[0][0], compare_sol.seen_at(subject, 4, 8)[0][0])

    def dense(q, k, v, tau, scale):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads).transpose(1, 2)

    found = compare_sol.compare(subject.layout, *seen[3], 0.5, dense)
    assert found["error_theirs"] < 1e-3 < found["error_ours"] < 1
    assert found["density_ours"] == pytest.approx(0.4)  # two of five blocks


# of 8 steps the first is plainly dense: nothing of it is kept for the search
@pytest.mark.parametrize("schedule", ["4", "8"])
def test_a_first_step_of_all_blocks_is_the_dense_one_and_one_of_few_is_not(comfyui, schedule):
    subject = generation.Subject(models.MODELS["tiny"], str(comfyui), 1, (2, 16, 20))
    rule = contestants.NOW.but("now", density=0.4)
    dense, whole, few = (
        subject.run(rule.but("r", first_density=share), schedule).video for share in (0.0, 1.0, 0.4)
    )
    assert float((whole - dense).abs().max()) < 1e-3 < float((few - dense).abs().max())


def test_a_model_that_stays_dense_is_no_result(comfyui):
    image = generation.Subject(models.MODELS["tiny"], str(comfyui), 1, (1, 16, 20))
    with pytest.raises(RuntimeError, match=r"Not every layer was sparse:\n(.|\n)*one frame"):
        image.run(contestants.ONE.but("image", density=0.4), "8")


@pytest.mark.parametrize("name", models.MODELS)
def test_weights_are_committed_and_of_the_model(name, comfyui):
    spec = models.MODELS[name]
    assert spec.path.stat().st_size <= 16e6
    model = models.load(spec, str(comfyui)).model.diffusion_model
    assert type(model).__name__ == {"wan": "WanModel", "hunyuan": "HunyuanVideo"}[spec.family]
    assert model.num_heads == spec.heads
    if spec.family == "hunyuan":
        assert model.hidden_size == spec.heads * spec.head_dim
        assert len(model.double_blocks) == spec.double
        assert len(model.double_blocks) + len(model.single_blocks) == spec.layers
    else:
        assert (model.dim, len(model.blocks)) == (spec.heads * spec.head_dim, spec.layers)


def test_all_weights_of_the_lab_fit_40_megabytes():
    specs = models.MODELS.values()
    assert {spec.path for spec in specs} >= set(models.WEIGHTS.iterdir())
    assert sum(spec.path.stat().st_size for spec in specs) <= 40e6


@pytest.mark.parametrize("name", train_models.RECIPES)
def test_a_training_makes_the_model_and_ends_at_its_size(name, tmp_path):
    spec = train_models.RECIPES[name]
    options = Namespace(comfyui="", out=tmp_path, minutes=1.0, more="--seed 5")
    args = train.parser().parse_args(train_models.command(name, options)[2:])
    assert (args.family, args.heads, args.head_dim) == (spec.family, spec.heads, spec.head_dim)
    assert (args.layers, args.rich, args.name, args.seed) == (spec.layers, spec.rich, name, 5)
    assert spec.family == "wan" or args.double == spec.double
    stages = train.stages(args)
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    assert (stages[-1].frames, stages[-1].height, stages[-1].width) == spec.latent
    assert train.WORLDS[args.world] is spec.world
