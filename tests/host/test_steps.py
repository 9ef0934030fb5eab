"""Which step each call of the model belongs to, and what the step does."""

from collections import Counter

import pytest
import torch

from sparse_attn.config import PRESETS
from sparse_attn.run.serving import LAST_STEP
from sparse_attn.run.state import RunState
from tests.host.host_fixtures import (
    CROSS_ATTENTION,
    VIDEO,
    assert_same_video,
    calls,
    conditioning,
    kept_dense,
    sample,
    sparse,
)


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
        ("Balanced", 4, "steps 1 dense, 2 search, 3-4 sparse"),
        ("Balanced", 6, "steps 1 dense, 2 search, 3-6 sparse"),
        ("Balanced", 8, "steps 1 dense, 2 search, 3-4 sparse, 5 search, 6-8 sparse"),
        ("Fast", 4, "steps 1 dense, 2 search, 3-4 sparse"),
        ("Fast", 5, "steps 1 dense, 2 search, 3-5 sparse"),
        ("Fast", 8, "steps 1 dense, 2 search, 3-4 sparse, 5 search, 6-8 sparse"),
        ("Quality", 8, "steps 1-2 dense, 3 search, 4-5 sparse, 6 search, 7-8 sparse"),
    ],
)
def test_presets_on_short_schedules(load, name, steps, expected):
    model, handle = preset(load("wan_h64"), name)
    sample(model, steps=steps, cfg=1.0)
    assert describe(handle) == expected
    kinds = [kind.value for kind in handle.latest().schedule.kinds]
    # a later search only chooses, on few steps the first one too; its step then runs sparse
    full = 0 if handle.latest().schedule.sparse_search else 1
    again = kinds.count("search") - full
    done = {"dense": kinds.count("dense"), "search": full, "search_again": again}
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
    assert describe(handle) == "steps 1 dense, 2 search, 3-4 sparse"
    dense = 2 * expected.count(0)
    # one search; the same step's second evaluation already runs sparse
    assert calls(handle) == {"dense": dense, "search": 2, "sparse": 2 * len(expected) - dense - 2}


@pytest.mark.parametrize("sampler", ["heun", "dpm_2"])
def test_samplers_of_two_evaluations_equal_dense_when_all_is_kept(load, sampler):
    expected = sample(load("wan_h64"), sampler=sampler, cfg=1.0)
    model, _ = sparse(load("wan_h64"), sparsity=0.0, warmup=0.25)
    assert_same_video(sample(model, sampler=sampler, cfg=1.0), expected)


def test_second_evaluation_of_a_step_does_not_search_again(load):
    model, handle = sparse(load("wan_h64"), search_points=(0.25, 0.5))
    sample(model, sampler="dpm_2", cfg=1.0)
    assert describe(handle) == "steps 1-3 search, 4 sparse"
    # seven evaluations, two layers; steps 1 and 2 search anew
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
    assert first.schedule.describe() == "steps 1 dense, 2 search, 3-4 sparse"
    assert second.schedule.describe() == "steps 5 search, 6-8 sparse"
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
    assert first.schedule.describe() == "steps 1-4 dense"
    assert second.schedule.describe() == "steps 5 dense, 6 search, 7-8 sparse"


def test_denoise_below_one_starts_in_the_middle_of_the_schedule(load):
    model, handle = sparse(load("wan_h64"), warmup=0.2)
    sample(model, steps=4, cfg=1.0, denoise=0.5)
    assert describe(handle) == "steps 5 search, 6-8 sparse"
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
    if handle.runs:
        assert describe(handle) == "no steps"
        assert "Every call ran dense" in handle.latest().summary()


def test_percent_window_keeps_both_ends_dense(load):
    model, handle = sparse(load("wan_h64"), start_percent=0.25, end_percent=0.75)
    sample(model, steps=8, cfg=1.0)
    assert describe(handle) == "steps 1-2 dense, 3 search, 4-6 sparse, 7-8 dense"


@pytest.mark.parametrize("scheduler", ["normal", "beta", "sgm_uniform"])
def test_schedulers_do_not_move_the_first_search(load, scheduler):
    model, handle = sparse(load("wan_h64"), warmup=0.25)
    sample(model, steps=8, cfg=1.0, scheduler=scheduler)
    assert describe(handle) == "steps 1-2 dense, 3 search, 4-8 sparse"


def test_later_search_chooses_a_new_mask(load):
    model, handle = sparse(load("wan_h64"), search_points=(0.5,))
    sample(model, steps=4, cfg=1.0)
    assert describe(handle) == "steps 1 search, 2 sparse, 3 search, 4 sparse"
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
    assert describe(handle) == "steps 1-2 dense, 3 search, 4-8 sparse"
    assert calls(handle) == {"dense": 4, "search": 2, "sparse": 10}
    # the middle of the schedule lies where the shift put it
    assert handle.latest().schedule.sigmas[4] == pytest.approx(shift / (shift + 1), abs=1e-3)


SAMPLERS = [
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2",
    "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast",
    "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu",
    "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm", "ipndm_v",
    "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "er_sde",
    "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2",
]  # fmt: skip
# these take sigmas of their own, leave steps of the list out, and the second tries some again
OWN_SIGMAS = ("dpm_fast", "dpm_adaptive")


def test_every_sampler_of_comfyui_is_tried(comfyui):
    import comfy.samplers

    assert set(comfy.samplers.KSampler.SAMPLERS) <= set(SAMPLERS)


@pytest.mark.any_comfyui
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, pytest.param(20, marks=pytest.mark.long)])
def test_every_sampler_searches_once_and_never_goes_back(load, steps_seen, sampler, steps):
    model, handle = sparse(load("wan_h64"), warmup=0.25)
    out = sample(model, steps=steps, cfg=1.0, sampler=sampler)
    assert torch.isfinite(out).all()
    assert steps_seen == sorted(steps_seen) or sampler == "dpm_adaptive"
    if sampler not in OWN_SIGMAS:
        assert set(steps_seen) == set(range(steps))
        assert handle.latest().skipped() == []
    # a call of the model each conditioning
    prompts = len(handle.latest().memory.conditionings) or 1
    kinds = Counter()
    for step in steps_seen[::prompts]:
        kind = handle.latest().schedule.kind(step).value
        if kind != "dense" and not kinds["search"]:
            # the first that is not dense, in a step after which another comes
            kind = "search" if step < steps - 1 else "dense"
        elif kind == "search":
            kind = "sparse"
        kinds[kind] += 2 * prompts
    assert calls(handle) == kinds
    reasons = set(kept_dense(handle)) - ({LAST_STEP} if sampler in OWN_SIGMAS else set())
    assert reasons == ({CROSS_ATTENTION} if steps_seen else set())


def test_a_sampler_that_looks_two_sigmas_ahead_searches_in_its_own_step(load, steps_seen):
    model, handle = sparse(load("wan_h64"), warmup=0.4)
    sample(model, steps=5, cfg=1.0, sampler="heunpp2")
    assert describe(handle) == "steps 1-2 dense, 3 search, 4-5 sparse"
    # by sigma 0 1 2, 1 2 3, 2 3 4, 3 4, 4
    assert steps_seen == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    # nothing is sparse before the search of step 2, whose first evaluation is the fourth but one
    assert calls(handle) == {"dense": 8, "search": 2, "sparse": 14}


# ---- lists of sigmas that do not fall


def sample_sigmas(model, sigmas, latent=None, sampler="euler"):
    import comfy.sample
    import comfy.samplers

    latent = torch.zeros(VIDEO) if latent is None else latent
    with torch.no_grad():
        return comfy.sample.sample_custom(
            model, torch.zeros(VIDEO), 1.0, comfy.samplers.sampler_object(sampler),
            torch.tensor(sigmas), conditioning(7, 0), conditioning(9, 1), latent,
            disable_pbar=True, seed=1,
        )  # fmt: skip


def falling(model, steps):
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, "simple", steps)


def test_a_run_that_adds_noise_is_planned_from_its_beginning(load, steps_seen):
    from comfy_extras.nodes_custom_sampler import FlipSigmas

    model, handle = preset(load("wan_h64"), "Balanced")
    (sigmas,) = FlipSigmas.execute(falling(model, 8)).args
    latent = torch.randn(VIDEO, generator=torch.Generator().manual_seed(5))
    sample_sigmas(model, sigmas.tolist(), latent)
    assert steps_seen == list(range(8))
    assert describe(handle) == "steps 1 dense, 2 search, 3-4 sparse, 5 search, 6-8 sparse"
    assert calls(handle) == {"dense": 2, "search": 2, "search_again": 2, "sparse": 12}
    assert "skipped by" not in "\n".join(handle.latest().lines())


LISTS = {
    "restart": [1.0, 0.9, 0.7, 0.3, 0.8, 0.6, 0.3, 0.0],
    "two phases": [0.05, 0.5, 0.9, 0.6, 0.3, 0.0],
    "repeated": [1.0, 0.8, 0.8, 0.8, 0.5, 0.5, 0.0],
    "equal": [0.7] * 6,
}


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpm_2"])
@pytest.mark.parametrize("name", LISTS)
def test_a_list_that_turns_or_stays_is_walked_step_by_step(load, steps_seen, name, sampler):
    model, handle = sparse(load("wan_h64"), warmup=0.3)
    steps = len(LISTS[name]) - 1
    sample_sigmas(model, LISTS[name], sampler=sampler)
    assert steps_seen == sorted(steps_seen) and set(steps_seen) == set(range(steps))
    assert describe(handle).startswith("steps 1-2 dense, 3 search, 4-")
    assert calls(handle)["search"] == 2
    assert handle.latest().skipped() == []


# ---- runs of single steps


def test_step_by_step_samplers_search_nothing_that_nobody_uses(load):
    """Each step of a schedule is a run of its own, as with SplitSigmas or looped samplers."""
    model, handle = preset(load("wan_h64"), "Balanced")
    for step in range(4):
        sample(model, cfg=1.0, start_step=step, last_step=step + 1, disable_noise=step > 0,
               force_full_denoise=step == 3)  # fmt: skip
        assert describe(handle) == f"step {step + 1} dense"
        assert calls(handle) == {"dense": 2}


def test_a_single_step_takes_over_the_pattern_of_the_first_expert(load):
    from sparse_attn.config import AdaSpaConfig
    from sparse_attn.host.install import install

    config = AdaSpaConfig(min_tokens=64, sparsity=0.6, warmup=0.0, dense_attention="host")
    high, first = install(load("wan_h64"), config)
    low, second = install(load("wan_h64"), config, first=first)
    sample(high, steps=4, cfg=1.0, last_step=1)
    # kept for the second, so also a single step searches
    assert calls(first) == {"search": 2}
    sample(low, steps=4, cfg=1.0, last_step=1)
    assert calls(second) == {"sparse": 2}


def test_a_pattern_that_does_not_fit_is_not_searched_for_in_the_last_step(load):
    from sparse_attn.config import AdaSpaConfig
    from sparse_attn.host.install import install

    config = AdaSpaConfig(min_tokens=64, sparsity=0.6, warmup=0.0, dense_attention="host")
    high, first = install(load("wan_h64"), config)
    low, second = install(load("wan_h64"), config, first=first)
    sample(high, steps=4, cfg=1.0, last_step=1)
    sample(low, (1, 16, 5, 16, 24), steps=4, cfg=1.0, start_step=3, disable_noise=True)
    assert calls(second) == {"dense": 2}
    assert kept_dense(second)[LAST_STEP] == 2
