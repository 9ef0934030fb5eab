"""One installation, many runs: nothing is carried from one to the next."""

import torch

from sparse_attn.run.handle import RUNS_KEPT
from sparse_attn.run.state import RunState
from tests.host.host_fixtures import assert_other_video, assert_same_video, calls, sample, sparse


def test_new_seed_on_the_same_model_equals_a_fresh_model(load):
    model, handle = sparse(load("wan_h64"), warmup=0.25)
    first = sample(model, seed=1)
    second = sample(model, seed=2)
    fresh, _ = sparse(load("wan_h64"), warmup=0.25)
    assert torch.equal(second, sample(fresh, seed=2))
    assert torch.equal(first, sample(model, seed=1))
    assert_other_video(second, first)
    assert len(handle.runs) == 3
    # every run searched for itself: two layers, two prompts
    assert all(len(run.timing.search) == 4 for run in handle.runs)


def test_another_video_size_on_the_same_model_searches_anew(load):
    model, handle = sparse(load("wan_h64"))
    sample(model)
    larger = (1, 16, 5, 16, 24)
    out = sample(model, larger)
    fresh, _ = sparse(load("wan_h64"))
    assert torch.equal(out, sample(fresh, larger))
    assert [run.tokens for run in handle.runs] == [288, 480]


def test_each_run_begins_with_nothing_and_ends_with_nothing(load, monkeypatch):
    import sparse_attn.host.install as install

    runs = []

    class Watched(RunState):
        def __init__(self, *args):
            super().__init__(*args)
            runs.append(self)

    monkeypatch.setattr(install, "RunState", Watched)
    model, _ = sparse(load("wan_h64"), search_points=(0.5,))
    for seed in (1, 2):
        sample(model, seed=seed)
        run = runs[-1]
        assert not run.layers and not run.layers.following and not run.readback._patterns
        assert run.statistics.finished
    assert runs[0] is not runs[1]


def test_handle_keeps_few_runs_and_no_tensor_of_the_model(load):
    model, handle = sparse(load("wan_h64"))
    for seed in range(RUNS_KEPT + 2):
        sample(model, steps=2, cfg=1.0, seed=seed)
    assert len(handle.runs) == RUNS_KEPT
    for run in handle.runs:
        for pattern in run.patterns.values():
            assert pattern.block_map.device.type == "cpu"
            assert pattern.block_map.dtype == torch.uint8
            # five blocks of 64 in 288 tokens, four heads
            assert pattern.block_map.shape == (4, 5, 5)


def weights_patch(model):
    name = "diffusion_model.blocks.0.self_attn.v.weight"
    shape = model.model.diffusion_model.blocks[0].self_attn.v.weight.shape
    change = torch.randn(shape, generator=torch.Generator().manual_seed(8)) * 0.1
    return {name: ("diff", (change,))}


def test_lora_after_the_node_is_the_same_as_before(load):
    after, handle = sparse(load("wan_h64"))
    after = after.clone()
    assert after.add_patches(weights_patch(after), 1.0)
    out = sample(after)
    # the clone reports to the node's own handle
    assert calls(handle) == {"search": 4, "sparse": 12}

    before = load("wan_h64")
    before.add_patches(weights_patch(before), 1.0)
    model, _ = sparse(before)
    assert_same_video(out, sample(model))
    assert_other_video(out, sample(sparse(load("wan_h64"))[0]))


def test_second_installation_replaces_the_first(load):
    once, first = sparse(load("wan_h64"), sparsity=0.4)
    twice, second = sparse(once, sparsity=0.8)
    out = sample(twice)
    assert not first.runs
    assert calls(second) == {"search": 4, "sparse": 12}
    alone, _ = sparse(load("wan_h64"), sparsity=0.8)
    assert torch.equal(out, sample(alone))
    # the first model is as it was
    sample(once)
    assert len(first.runs) == 1


def test_switched_off_leaves_the_model_as_it_is(load):
    model, handle = sparse(load("wan_h64"), enabled=False)
    assert torch.equal(sample(model), sample(load("wan_h64")))
    # which is timed, and no more
    assert [(run.config.enabled, bool(run.patterns)) for run in handle.runs] == [(False, False)]
    on, _ = sparse(load("wan_h64"))
    off, handle = sparse(on, enabled=False)
    assert torch.equal(sample(off), sample(load("wan_h64")))
    assert [(run.config.enabled, bool(run.patterns)) for run in handle.runs] == [(False, False)]


def test_installing_leaves_the_given_model_untouched(load):
    model = load("wan_h64")
    expected = sample(model)
    sparse(model)
    assert not model.wrappers and "adaspa" not in str(model.model_options)
    assert torch.equal(sample(model), expected)


def test_two_installations_of_one_model_run_side_by_side(load):
    base = load("wan_h64")
    low, low_handle = sparse(base, sparsity=0.4)
    high, high_handle = sparse(base, sparsity=0.8)
    sample(low)
    sample(high)
    assert low_handle.latest().patterns.density() > high_handle.latest().patterns.density() + 0.2
