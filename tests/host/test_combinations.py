"""Nodes combined at random: with everything kept the video is dense, and every call is accounted for."""

import gc
import random
import weakref
from collections import Counter
from functools import partial

import pytest
import torch

from sparse_attn.run.state import RunState
from tests.host.host_fixtures import assert_same_video, conditioning, sparse
from tests.host.test_batches import windowed
from tests.host.test_caches import cached
from tests.host.test_guidance import normalising, perturbing, skipping

pytestmark = pytest.mark.any_comfyui

# five frames of 6 x 12 tokens
LONG = (1, 16, 5, 12, 24)
# graphs that are quick and have every node, kind of prompt and model at least once
SEEDS = 3, 5, 7, 13, 23, 24, 26, 30, 31, 33, 35


def around_each_call(wrapper):
    """A node that calls the model in its own way: wrapper(call(x, sigma), x, sigma)."""

    def node(model):
        def wrapped(apply_model, args):
            def call(x, sigma):
                return apply_model(x, sigma, **args["c"])

            return wrapper(call, args["input"], args["timestep"])

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapped)
        return model

    return node


def in_tiles(call, x, sigma):
    return torch.cat([call(tile, sigma) for tile in x.split(12, -1)], -1)


def in_copied_tiles(call, x, sigma):
    return torch.cat([call(tile.clone(), sigma) for tile in x.split(12, -1)], -1)


def twice(call, x, sigma):
    return (call(x, sigma) + call(x * 1.01, sigma)) / 2


def mirrored(call, x, sigma):
    return call(x.flip(-1), sigma).flip(-1)


def another_override(model):
    def override(func, *args, **named):
        return func(*args, **named)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def a_block_twice(model):
    def patch(args, extra):
        out = extra["original_block"](args)
        return extra["original_block"]({**args, **{key: out[key] for key in out if key in args}})

    model = model.clone()
    model.set_model_patch_replace(patch, "dit", "double_block", 0)
    return model


NODES = {
    **{node.__name__: node for node in (skipping, perturbing, normalising, another_override, a_block_twice)},
    **{f"calls {how.__name__}": around_each_call(how) for how in (in_tiles, in_copied_tiles, twice, mirrored)},
    **{node: partial(cached, node=node, threshold=0.3, start=0.1) for node in ("EasyCacheNode", "LazyCacheNode")},
    "windows": partial(windowed, length=3),
    "moving windows": partial(windowed, schedule="looped_uniform", length=3, closed_loop=True),
}  # fmt: skip
SAMPLERS = (
    "euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2m_sde", "res_multistep_cfg_pp", "uni_pc",
)  # fmt: skip


def with_a_hook(prompt):
    import comfy.hooks

    group = comfy.hooks.create_hook_lora({}, 1.0, 0.0)
    return [[text, {**more, "hooks": group}] for text, more in prompt]


def prompts_of(kind):
    """Positive prompts."""
    first, second = conditioning(7, 0), conditioning(7, 5)
    mask = torch.zeros(1, 16, 24)
    mask[:, 4:12, 6:18] = 1
    more = {
        "one": {},
        "in turn": {"start_percent": 0.5},
        "masked": {"mask": mask, "mask_strength": 0.8},
        "an area": {"area": ("percentage", 1.0, 0.5, 0.5, 0.0, 0.5, 0.25), "strength": 1.0},
        "hooked": {},
    }[kind]
    if kind == "one":
        return first
    if kind == "in turn":
        first = conditioning(7, 0, end_percent=0.5)
    second = [[text, {**entry, **more}] for text, entry in second]
    return first + (with_a_hook(second) if kind == "hooked" else second)


def graph(seed):
    """A graph drawn at random: a model, nodes on it, where AdaSpa stands, prompts, sampler, settings."""
    draw = random.Random(seed)
    nodes = draw.sample(sorted(NODES), draw.choice((1, 2, 2, 3)))
    for kind in ("calls", "Cache"):
        # a model has room for one of these
        for node in [node for node in nodes if kind in node][1:]:
            nodes.remove(node)
    return {
        "name": draw.choice(("wan_h64", "hunyuan")),
        "nodes": nodes,
        "place": draw.randint(0, len(nodes)),
        # another AdaSpa node before it, in whose place it comes
        "again": draw.random() < 0.2,
        "prompts": draw.choice(("one", "one", "in turn", "masked", "an area", "hooked")),
        "texts": draw.choice((7, 9)),
        "sampler": draw.choice(SAMPLERS),
        "split": draw.random() < 0.3,
        "videos": draw.choice((1, 1, 2)),
        "settings": {
            "warmup": draw.choice((0.0, 0.25)),
            "search_points": draw.choice(((), (0.6,))),
            "tail": draw.choice(("pooled", "none")),
            "token_order": draw.choice(("similarity", "position")),
            "block_size": draw.choice(("64", "128x64")),
            "query_stride": draw.choice((1, 4)),
            "dense_layers": draw.choice(((), (), (0,))),
            "dense_attention": draw.choice(("auto", "host")),
        },
    }


def run(model, drawn, steps=4):
    """Sample as the graph says, in one sampler or in two."""
    import comfy.samplers

    shape = (drawn["videos"], *LONG[1:])
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompts_of(drawn["prompts"]), conditioning(drawn["texts"], 1))
    guider.set_cfg(5.0)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    parts = [sigmas[:3], sigmas[2:]] if drawn["split"] else [sigmas]
    latent, noise = (
        torch.zeros(shape),
        torch.randn(shape, generator=torch.Generator().manual_seed(1)),
    )
    sampler = comfy.samplers.sampler_object(drawn["sampler"])
    with torch.no_grad():
        for part in parts:
            latent = guider.sample(noise, latent, sampler, part, disable_pbar=True, seed=1)
            noise = torch.zeros(shape)
    return latent


@pytest.fixture
def accounts(comfyui, monkeypatch):
    """What really came of the attention calls, and every run."""
    from sparse_attn.host import override

    found, serve, init = Counter(), override.serve, RunState.__init__
    runs = found.runs = []
    states = found.states = []

    def noted(context, host, options):
        kept = context.run.statistics.kept_dense
        before = kept.total()
        out = serve(context, host, options)
        found["not ours"] += out is None
        found["videos served"] += 0 if out is None else len(host.q)
        found["kept dense of ours"] += 0 if out is None else kept.total() - before
        return out

    def noted_run(self, *args, **named):
        init(self, *args, **named)
        runs.append(self.statistics)
        states.append(weakref.ref(self))

    monkeypatch.setattr(override, "serve", noted)
    monkeypatch.setattr(RunState, "__init__", noted_run)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_kept_is_dense_and_nothing_is_lost(load, accounts, caplog, seed):
    drawn = graph(seed)

    def build(adaspa):
        model = load(drawn["name"])
        for place, node in enumerate([*drawn["nodes"], None]):
            if adaspa and place == drawn["place"]:
                if drawn["again"]:
                    model, _ = sparse(model, sparsity=0.9)
                model, _ = sparse(model, sparsity=0.0, **drawn["settings"])
            if node is not None:
                model = NODES[node](model)
        return model

    expected = run(build(False), drawn)
    assert not accounts.runs
    assert_same_video(run(build(True), drawn), expected)
    runs = accounts.runs
    assert len(runs) == 1 + drawn["split"] and all(run.finished for run in runs)
    timed = [
        times for run in runs for times in (run.timing.dense, run.timing.search, run.timing.sparse)
    ]
    assert sum(map(len, timed)) == accounts["videos served"]
    told = sum(run.kept_dense.total() + run.beside.total() for run in runs)
    assert told == accounts["not ours"] + accounts["kept dense of ours"]
    for found in runs:
        assert found.lines() and found.patterns.density() in (None, 1.0)
    assert not [record for record in caplog.records if record.exc_info]
    gc.collect()
    assert [state() for state in accounts.states] == len(runs) * [None]


def test_these_graphs_do_what_they_are_for(comfyui):
    drawn = [graph(seed) for seed in SEEDS]
    assert {each["name"] for each in drawn} == {"wan_h64", "hunyuan"}
    assert {node for each in drawn for node in each["nodes"]} >= set(NODES)
    assert {each["prompts"] for each in drawn} == {"one", "in turn", "masked", "an area", "hooked"}
    assert any(each["again"] for each in drawn) and any(each["split"] for each in drawn)
