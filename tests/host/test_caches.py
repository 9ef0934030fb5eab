"""Caches that skip steps: ours keeps its place in the schedule, and the report counts what ran."""

import pytest
import torch

from sparse_attn.run.state import RunState
from tests.host.host_fixtures import assert_other_video, assert_same_video, calls, sample, sparse

STEPS = 10
ORDERS = ["before", "after"]


@pytest.fixture
def attended(monkeypatch):
    """The steps in which a layer ran sparse or searched."""
    seen = []
    attend = RunState.attend

    def noted(self, call):
        if call.key is not None:
            seen.append(call.step)
        return attend(self, call)

    monkeypatch.setattr(RunState, "attend", noted)
    return seen


def cached(model, node, threshold=3.0, start=0.0, end=0.95):
    """ComfyUI's cache node; under this threshold it skips as soon as it can."""
    from comfy_extras import nodes_easycache

    return getattr(nodes_easycache, node).execute(model, threshold, start, end, False).args[0]


def both(load, node, order, cache=None, name="wan_h64", **fields):
    """A model with the cache node before or after ours, and our handle."""
    cache = cache or {}
    if order == "before":
        return sparse(cached(load(name), node, **cache), **fields)
    model, handle = sparse(load(name), **fields)
    return cached(model, node, **cache), handle


@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_skipped_search_takes_place_at_the_next_step_that_runs(load, attended, node, order):
    model, handle = both(load, node, order, warmup=0.2)
    out = sample(model, steps=STEPS)
    assert torch.isfinite(out).all()
    run = handle.latest()
    assert run.schedule.describe() == "steps 1-2 dense, 3 search, 4-10 sparse"
    skipped = run.skipped()
    assert 2 in skipped and not {0, 1} & set(skipped)
    ran = [step for step in range(2, STEPS) if step not in skipped]
    assert sorted(set(attended)) == ran
    # two layers, two prompts
    assert calls(handle) == {"dense": 8, "search": 4, "sparse": 4 * (len(ran) - 1)}
    assert {pattern.step for pattern in run.patterns.values()} == {ran[0]}
    assert f", {len(skipped)} of them skipped by a cache, density" in run.summary()
    (line,) = [line for line in run.lines() if line.startswith("Skipped by a cache: ")]
    assert line.startswith(f"Skipped by a cache: {len(skipped)} steps, 3")
    assert line.endswith(f"; searched at step {ran[0] + 1}")
    assert run.as_dict()["steps_skipped"] == skipped


@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("name", ["wan_h64", "hunyuan"])
def test_a_cache_skips_as_without_ours_when_all_is_kept(load, node, name):
    expected = sample(cached(load(name), node), steps=STEPS)
    model, handle = both(load, node, "before", name=name, sparsity=0.0, warmup=0.2)
    assert_same_video(sample(model, steps=STEPS), expected)
    assert handle.latest().skipped()
    # else the cache would have had no say
    assert_other_video(expected, sample(load(name), steps=STEPS))


@pytest.mark.parametrize("node, start", [("EasyCacheNode", 0.25), ("LazyCacheNode", 0.35)])
def test_a_later_search_that_was_skipped_is_made_up_for(load, node, start):
    # EasyCache looks at two steps first, LazyCache at one
    cache = {"start": start, "end": 0.75}
    model, handle = both(load, node, "after", cache, search_points=(0.5,))
    sample(model, steps=STEPS, cfg=1.0)
    run = handle.latest()
    assert run.schedule.describe() == "steps 1 search, 2-5 sparse, 6 search, 7-10 sparse"
    skipped = run.skipped()
    assert 5 in skipped
    after = next(step for step in range(6, STEPS) if step not in skipped)
    assert {pattern.step for pattern in run.patterns.values()} == {after}
    # two layers; a search of the later kind only chooses
    ran = STEPS - len(skipped)
    assert calls(handle) == {"search": 2, "search_again": 2, "sparse": 2 * (ran - 1)}


def test_a_skipped_step_does_not_count_as_a_fast_one(load):
    model, handle = both(load, "EasyCacheNode", "after", warmup=0.2)
    sample(model, steps=STEPS)
    run = handle.latest()
    # EasyCache enters the model also in a step that it skips
    assert len(run.steps) == STEPS - len(run.skipped())


def test_a_cache_that_never_skips_changes_nothing(load):
    plain, _ = sparse(load("wan_h64"), warmup=0.2)
    model, handle = both(load, "EasyCacheNode", "after", {"threshold": 0.0}, warmup=0.2)
    assert torch.equal(sample(model), sample(plain))
    assert handle.latest().skipped() == []
    assert "by a cache" not in "\n".join(handle.latest().lines())


def test_prompts_that_share_a_call_are_skipped_together(load):
    model, handle = both(load, "EasyCacheNode", "before", warmup=0.2)
    sample(model, steps=STEPS, texts=(7, 7))
    run = handle.latest()
    ran = STEPS - len(run.skipped())
    assert run.skipped()
    assert calls(handle) == {"dense": 8, "search": 4, "sparse": 4 * (ran - 3)}


def test_nothing_is_said_of_skips_where_no_attention_reaches_us(load, monkeypatch):
    from sparse_attn.host import install

    def elsewhere(func, *args, **kwargs):
        return func(*args, **kwargs)

    # as a pack does that patches the attention modules themselves
    monkeypatch.setattr(install, "attention_override", elsewhere)
    model, handle = sparse(load("wan_h64"))
    sample(model, cfg=1.0)
    assert handle.latest().skipped() == []
    assert len(handle.latest().steps) == 4


def test_an_interrupted_run_skipped_nothing_that_was_to_come(load):
    class Failure(RuntimeError):
        pass

    def stop(step, *args):
        if step == 1:
            raise Failure

    model, handle = sparse(load("wan_h64"))
    with pytest.raises(Failure):
        sample(model, callback=stop)
    assert handle.latest().skipped() == []
