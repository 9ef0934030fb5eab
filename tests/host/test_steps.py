"""Which step each call of the model belongs to, and what the step does."""

import pytest
import torch

from sparse_attn.config import PRESETS
from sparse_attn.run.state import RunState
from tests.host.host_fixtures import VIDEO, assert_same_video, calls, conditioning, sample, sparse


@pytest.fixture
def steps_seen(monkeypatch):
    """The step of every call of the model."""
    seen = []
    enter_step = RunState.enter_step

    def noted(self, step):
        seen.append(step)
        return enter_step(self, step)

    monkeypatch.setattr(RunState, "enter_step", noted)
    return seen


def describe(handle):
    return handle.latest().schedule.describe()


def preset(model, name):
    config = PRESETS[name]
    names = ("sparsity", "warmup", "search_points", "search_gap")
    return sparse(model, **{name: getattr(config, name) for name in names})


@pytest.mark.parametrize(
    "name, steps, expected",
    [
        ("Balanced", 4, "steps 0 search, 1-3 sparse"),
        ("Balanced", 6, "steps 0 dense, 1 search, 2-5 sparse"),
        ("Balanced", 8, "steps 0 dense, 1 search, 2-3 sparse, 4 search, 5-7 sparse"),
        ("Fast", 4, "steps 0 search, 1-3 sparse"),
        ("Fast", 5, "steps 0 dense, 1 search, 2-4 sparse"),
        ("Fast", 8, "steps 0 dense, 1 search, 2-3 sparse, 4 search, 5-7 sparse"),
        ("Quality", 8, "steps 0-1 dense, 2 search, 3-4 sparse, 5 search, 6-7 sparse"),
    ],
)
def test_presets_on_short_schedules(load, name, steps, expected):
    model, handle = preset(load("wan_h64"), name)
    sample(model, steps=steps, cfg=1.0)
    assert describe(handle) == expected
    kinds = [kind.value for kind in handle.latest().schedule.kinds]
    # a later search only chooses; its step then runs sparse
    again = kinds.count("search") - 1
    done = {"dense": kinds.count("dense"), "search": 1, "search_again": again}
    done["sparse"] = kinds.count("sparse") + again
    # two layers, one prompt
    assert calls(handle) == {kind: 2 * number for kind, number in done.items() if number}


@pytest.mark.parametrize(
    "sampler, expected",
    [
        # a second evaluation at the end of the interval is the next step's sigma
        ("heun", [0, 1, 1, 2, 2, 3, 3]),
        # a second evaluation inside the interval
        ("dpm_2", [0, 0, 1, 1, 2, 2, 3]),
        ("euler", [0, 1, 2, 3]),
    ],
)
def test_kind_of_a_step_follows_sigma(load, steps_seen, sampler, expected):
    model, handle = sparse(load("wan_h64"), warmup=0.25)
    sample(model, sampler=sampler, cfg=1.0)
    assert steps_seen == expected
    assert describe(handle) == "steps 0 dense, 1 search, 2-3 sparse"
    dense = 2 * expected.count(0)
    # one search; the same step's second evaluation already runs sparse
    assert calls(handle) == {"dense": dense, "search": 2, "sparse": 2 * len(expected) - dense - 2}


@pytest.mark.parametrize("sampler", ["heun", "dpm_2"])
def test_samplers_of_two_evaluations_equal_dense_when_all_is_kept(load, sampler):
    expected = sample(load("wan_h64"), sampler=sampler, cfg=1.0)
    model, _ = sparse(load("wan_h64"), sparsity=0.0, warmup=0.25)
    assert_same_video(sample(model, sampler=sampler, cfg=1.0), expected)


def test_second_evaluation_of_a_step_does_not_search_again(load):
    model, handle = sparse(load("wan_h64"), search_points=(0.5, 0.75))
    sample(model, sampler="dpm_2", cfg=1.0)
    assert describe(handle) == "steps 0 search, 1 sparse, 2-3 search"
    # seven evaluations, two layers; steps 2 and 3 search anew
    assert calls(handle) == {"search": 2, "search_again": 4, "sparse": 12}


def halves(model, steps=8, middle=4):
    import comfy.sample

    first = sample(
        model, steps=steps, cfg=1.0, start_step=0, last_step=middle, force_full_denoise=False
    )
    noise = torch.zeros_like(first)
    return comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", conditioning(7, 0), conditioning(9, 1), first,
        start_step=middle, last_step=steps, force_full_denoise=True, disable_noise=True,
        disable_pbar=True, seed=1,
    )  # fmt: skip


def test_second_sampler_counts_on_where_the_first_stopped(load):
    model, handle = sparse(load("wan_h64"), warmup=PRESETS["Balanced"].warmup)
    halves(model)
    first, second = handle.runs
    assert first.schedule.describe() == "steps 0 dense, 1 search, 2-3 sparse"
    assert second.schedule.describe() == "steps 4 search, 5-7 sparse"
    assert first.schedule.total_steps == second.schedule.total_steps == 8
    assert {pattern.step for pattern in first.patterns.values()} == {1}
    assert {pattern.step for pattern in second.patterns.values()} == {4}


def test_two_halves_equal_dense_halves_when_all_is_kept(load):
    expected = halves(load("wan_h64"))
    model, _ = sparse(load("wan_h64"), sparsity=0.0)
    assert_same_video(halves(model), expected)
    # and the halves are one whole run
    assert_same_video(expected, sample(load("wan_h64"), steps=8, cfg=1.0))


def test_warmup_that_reaches_into_the_second_sampler_ends_there(load):
    model, handle = sparse(load("wan_h64"), warmup=0.6)
    halves(model)
    first, second = handle.runs
    assert first.schedule.describe() == "steps 0-3 dense"
    assert second.schedule.describe() == "steps 4 dense, 5 search, 6-7 sparse"


def test_denoise_below_one_starts_in_the_middle_of_the_schedule(load):
    model, handle = sparse(load("wan_h64"), warmup=0.2)
    sample(model, steps=4, cfg=1.0, denoise=0.5)
    assert describe(handle) == "steps 4 search, 5-7 sparse"
    assert handle.latest().schedule.total_steps == 8


@pytest.mark.parametrize("sigmas", [[], [1.0]], ids=["none", "one"])
def test_no_steps_sample_nothing(load, sigmas):
    import comfy.sample
    import comfy.samplers

    model, handle = sparse(load("wan_h64"))
    latent = torch.zeros(VIDEO)
    out = comfy.sample.sample_custom(
        model, latent, 1.0, comfy.samplers.sampler_object("euler"), torch.tensor(sigmas),
        conditioning(7, 0), conditioning(9, 1), latent, disable_pbar=True, seed=1,
    )  # fmt: skip
    assert out.shape == latent.shape
    assert handle.current is None
    if handle.runs:
        assert describe(handle) == "no steps"
        assert "every call ran dense" in handle.latest().summary()


def test_percent_window_keeps_both_ends_dense(load):
    model, handle = sparse(load("wan_h64"), start_percent=0.25, end_percent=0.75)
    sample(model, steps=8, cfg=1.0)
    assert describe(handle) == "steps 0-1 dense, 2 search, 3-5 sparse, 6-7 dense"


@pytest.mark.parametrize("scheduler", ["normal", "beta", "sgm_uniform"])
def test_schedulers_do_not_move_the_first_search(load, scheduler):
    model, handle = sparse(load("wan_h64"), warmup=0.25)
    sample(model, steps=8, cfg=1.0, scheduler=scheduler)
    assert describe(handle) == "steps 0-1 dense, 2 search, 3-7 sparse"


def test_later_search_chooses_a_new_mask(load):
    model, handle = sparse(load("wan_h64"), search_points=(0.5,))
    sample(model, steps=4, cfg=1.0)
    assert describe(handle) == "steps 0 search, 1 sparse, 2 search, 3 sparse"
    # a search of the later kind only chooses; its step then runs sparse
    assert calls(handle) == {"search": 2, "search_again": 2, "sparse": 6}
    assert {pattern.step for pattern in handle.latest().patterns.values()} == {2}
    assert not handle.latest().patterns.exact()
    assert "(estimated)" in handle.latest().summary()


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_shift_of_the_schedule_does_not_move_the_first_search(load, order, shift):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    def shifted(model):
        return ModelSamplingSD3().patch(model, shift)[0]

    if order == "before":
        model, handle = sparse(shifted(load("wan_h64")), warmup=0.25)
    else:
        model, handle = sparse(load("wan_h64"), warmup=0.25)
        model = shifted(model)
    sample(model, steps=8, cfg=1.0)
    assert describe(handle) == "steps 0-1 dense, 2 search, 3-7 sparse"
    assert calls(handle) == {"dense": 4, "search": 2, "sparse": 10}
    # the middle of the schedule lies where the shift put it
    assert handle.latest().schedule.sigmas[4] == pytest.approx(shift / (shift + 1), abs=1e-3)


@pytest.mark.parametrize(
    "sampler",
    [
        "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_3m_sde", "uni_pc", "lcm",
        "res_multistep", "res_multistep_ancestral", "gradient_estimation", "er_sde", "ddim",
        "seeds_2", "sa_solver",
    ],
)  # fmt: skip
def test_every_sampler_searches_once_and_never_goes_back(load, steps_seen, sampler):
    model, handle = sparse(load("wan_h64"), warmup=0.25)
    out = sample(model, steps=8, cfg=1.0, sampler=sampler)
    assert torch.isfinite(out).all()
    assert steps_seen == sorted(steps_seen)
    assert set(steps_seen) == set(range(8))
    made = calls(handle)
    # two layers; a search each, whatever the number of evaluations
    assert made["search"] == 2
    assert sum(made.values()) == 2 * len(steps_seen)
    assert handle.latest().skipped() == []
