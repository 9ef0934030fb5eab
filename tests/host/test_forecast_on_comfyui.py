"""Skip Steps under ComfyUI's own samplers and guiders, with a model whose answers are known."""

import pytest
import torch

from sparse_attn.forecast.forecaster import MANY_EVALUATIONS, OFF_THE_LIST
from tests.forecast.polynomial_model import (
    BLIND,
    EXPECTED,
    QUADRATIC,
    STEPS,
    Answers,
    Told,
    answering,
    assert_same_trace,
    trace,
)
from tests.host.family_models import build
from tests.host.host_fixtures import VIDEO, conditioning
from tests.host.host_fixtures import sample as comfy_sample
from tests.host.test_batches import LONG, windowed
from tests.host.test_caches import cached
from tests.host.test_guidance import (
    guided,
    normalising,
    one_prompt,
    perturbing,
    three_prompts,
    two_positives,
)
from tests.host.test_guidance import skipping as slg

pytestmark = pytest.mark.any_comfyui


@pytest.fixture
def told(comfyui, monkeypatch):
    return Told(monkeypatch)


def skipping(model, level=QUADRATIC):
    from sparse_attn.host.forecast import install

    return install(model, level)


SAMPLERS = [
    "euler", "euler_ancestral", "heun", "heunpp2", "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpm_2",
    "dpm_2_ancestral", "lms", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "ddpm", "lcm", "ipndm", "ipndm_v", "deis",
    "res_multistep", "res_multistep_ancestral", "gradient_estimation", "er_sde", "seeds_2",
    "seeds_3", "sa_solver", "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2",
]  # fmt: skip
GUIDANCE = "the sampler reads what the model returns before guidance"
REFUSED = {
    "euler_cfg_pp": GUIDANCE, "euler_ancestral_cfg_pp": GUIDANCE, "dpmpp_2m_cfg_pp": GUIDANCE,
    "dpmpp_2s_ancestral_cfg_pp": GUIDANCE, "res_multistep_cfg_pp": GUIDANCE,
    "res_multistep_ancestral_cfg_pp": GUIDANCE, "gradient_estimation_cfg_pp": GUIDANCE,
    "dpm_fast": OFF_THE_LIST, "dpm_adaptive": OFF_THE_LIST,
}  # fmt: skip


def test_every_sampler_of_comfyui_is_looked_at(comfyui):
    import comfy.samplers

    known = {name for name in comfy.samplers.SAMPLER_NAMES if not name.endswith("_gpu")}
    assert known <= {*SAMPLERS, *REFUSED}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_polynomial_model_is_forecast_exactly(load, told, sampler):
    plain, answers = Answers(), Answers()
    expected = trace(answering(load("wan_h64"), plain), sampler=sampler)
    found = trace(skipping(answering(load("wan_h64"), answers)), sampler=sampler)
    assert_same_trace(found, expected)
    (run,) = told
    assert sorted(run.forecast) == EXPECTED and not run.why_not
    # two prompts of other lengths
    assert len(plain.sigmas) - len(answers.sigmas) == 2 * run.evaluations
    assert run.evaluations >= len(EXPECTED)


@pytest.mark.parametrize("sampler", REFUSED)
def test_samplers_that_need_more_are_left_alone(load, told, sampler):
    expected = trace(answering(load("wan_h64"), Answers()), sampler=sampler)
    found = trace(skipping(answering(load("wan_h64"), Answers())), sampler=sampler)
    assert all(map(torch.equal, found, expected))
    (run,) = told
    assert not run.forecast and run.why_not == REFUSED[sampler]


def test_every_line_on_its_node_is_a_sentence(load, told, monkeypatch):
    from sparse_attn.host import status

    lines = []
    monkeypatch.setattr(status, "show_steps", lambda node, said, *steps: lines.extend(said))
    for sampler in ("euler", "euler_cfg_pp", "dpm_fast"):
        trace(skipping(answering(load("wan_h64"), Answers())), sampler=sampler)
    codes = {line.code for line in lines}
    assert {"step_computed", "step_forecast", "skipped_none_why", "skip_errors"} <= codes
    reasons = [line.values["why"] for line in lines if "why" in line.values]
    assert {why.code for why in reasons} == {"skip_guidance", "skip_off_the_list"}


def run_both(
    load, told, around=lambda model: model, level=QUADRATIC, run=trace, jump=-1.0, **options
):
    """A run without and one with Skip Steps; returns both traces, and what the second one told."""
    expected = run(around(answering(load("wan_h64"), Answers(jump=jump))), **options)
    answers = Answers(jump=jump)
    found = run(skipping(around(answering(load("wan_h64"), answers)), level), **options)
    return found, expected, told[-1]


def test_off_is_the_model_as_it_came(load, told):
    expected = trace(answering(load("wan_h64"), Answers()))
    on = skipping(answering(load("wan_h64"), Answers()), BLIND)
    off = skipping(on, None)
    assert all(map(torch.equal, trace(off), expected)) and not told
    assert "adaspa_forecast" not in str(off.wrappers)


def test_a_second_installation_takes_the_place_of_the_first(load, told):
    trace(skipping(skipping(answering(load("wan_h64"), Answers()), BLIND)))
    (run,) = told
    assert sorted(run.forecast) == EXPECTED


@pytest.mark.parametrize(
    "where", ["__init__", "listener", "begin", "forecast", "learn", "tell", "end"]
)
def test_an_error_of_ours_leaves_the_rest_computed(load, told, monkeypatch, where):
    from sparse_attn.host.forecast import Forecasting

    calls = []

    def broken(self, *args, **kwargs):
        calls.append(where)
        raise RuntimeError("broken")

    monkeypatch.setattr(Forecasting, where, broken)
    expected = trace(answering(load("wan_h64"), Answers()))
    found = trace(skipping(answering(load("wan_h64"), Answers())))
    assert_same_trace(found, expected)
    # once in a run, and where the end is told
    assert calls == [where] * (2 if where == "tell" else 1)
    assert not [run for run in told if run.forecast and where != "end"]


def test_few_steps_have_the_bits_of_before(load, told):
    found, expected, run = run_both(load, told, steps=11)
    assert all(map(torch.equal, found, expected))
    assert run.why_not == "11 steps are too few, 12 are needed"


def test_what_nobody_foresees_is_noticed_at_the_next_computed_step(load, told):
    sampling = load("wan_h64").get_model_object("model_sampling")
    jump = float(sampling.percent_to_sigma(0.45))
    found, expected, run = run_both(load, told, jump=jump)
    assert run.withheld and max(run.errors.values()) > QUADRATIC.limit
    # the last step is computed, and before it forecasts have come back
    assert_same_trace(found[-1:], expected[-1:])
    assert max(run.forecast) > min(run.withheld)


def test_prompts_that_take_turns_begin_anew_without_a_surprise(load, told):
    shares = (0.0, 0.5, 1.0)
    prompts = [
        entry
        for i in range(2)
        for entry in conditioning(7, i, start_percent=shares[i], end_percent=shares[i + 1])
    ]
    sampling = load("wan_h64").get_model_object("model_sampling")
    found, expected, run = run_both(
        load, told, jump=float(sampling.percent_to_sigma(0.5)), positive=prompts
    )
    assert_same_trace(found, expected)
    assert run.forecast and not run.withheld and max(run.errors.values()) < QUADRATIC.limit


def test_a_scheduled_lora_begins_anew_without_a_surprise(load, told):
    import comfy.hooks

    group = comfy.hooks.create_hook_lora({}, 1.0, 0.0)
    keys = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.2, 0.45)):
        keys.add(comfy.hooks.HookKeyframe(strength, start))
    group.set_keyframes_on_hooks(keys)
    sampling = load("wan_h64").get_model_object("model_sampling")
    found, expected, run = run_both(
        load, told, jump=float(sampling.percent_to_sigma(0.45)),
        positive=conditioning(7, 0, hooks=group),
    )  # fmt: skip
    assert_same_trace(found, expected)
    assert run.forecast and not run.withheld and max(run.errors.values()) < QUADRATIC.limit


def test_a_mask_is_laid_over_a_forecast_too(load, told):
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., 8:, :] = 1
    begin = torch.randn(VIDEO, generator=torch.Generator().manual_seed(5))
    found, expected, run = run_both(load, told, begin=begin, noise_mask=mask)
    assert_same_trace(found, expected)
    assert sorted(run.forecast) == EXPECTED


def test_context_windows_are_below_a_forecast(load, told):
    found, expected, run = run_both(load, told, windowed, shape=LONG)
    assert_same_trace(found, expected)
    assert sorted(run.forecast) == EXPECTED


@pytest.mark.parametrize("guidance", [slg, perturbing, normalising])
def test_guidance_of_other_kinds_is_below_a_forecast(load, told, guidance):
    found, expected, run = run_both(load, told, guidance)
    assert_same_trace(found, expected)
    assert sorted(run.forecast) == EXPECTED


@pytest.mark.parametrize("guider", [three_prompts, two_positives, one_prompt])
def test_other_guiders(load, told, guider):
    def run(model):
        with torch.no_grad():
            return [guided(guider(model), STEPS)]

    found, expected, run = run_both(load, told, run=run)
    assert_same_trace(found, expected)
    assert sorted(run.forecast) == EXPECTED


def test_each_of_two_samplers_begins_anew(load, told):
    def halves(model):
        first = trace(model, start_step=0, last_step=8, force_full_denoise=False)
        return first + trace(
            model, begin=first[-1], start_step=8, last_step=STEPS, disable_noise=True
        )

    found, expected, second = run_both(load, told, run=halves)
    assert_same_trace(found, expected)
    first = told[-2]
    # the last of eight steps is computed, and three points are found anew
    assert first.numbers(first.forecast) == [4, 6] and second.numbers(second.forecast) == [11, 13]


def test_a_sampler_that_thinks_at_one_noise_level_is_left_alone(load, told):
    import comfy.samplers

    def thinks(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i, sigma in enumerate(sigmas[:-1]):
            for _ in range(5):
                x0 = model(x, sigma * x.new_ones(len(x)), **extra_args)
                x = x + 0.1 * (x0 - x)
            callback({"i": i, "denoised": x0, "x": x, "sigma": sigma})
        return x

    sampler = comfy.samplers.KSAMPLER(thinks)
    found, expected, run = run_both(load, told, sampler=sampler)
    assert all(map(torch.equal, found, expected)) and run.why_not == MANY_EVALUATIONS


@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("first", [True, False])
def test_caches_of_the_host_are_left_to_themselves(load, told, node, first):
    model = load("wan_h64")
    cache = {"threshold": 0.2, "start": 0.15}
    expected = trace(cached(model, node, **cache), cfg=1.0)
    both = (
        cached(skipping(model), node, **cache) if first else skipping(cached(model, node, **cache))
    )
    assert all(map(torch.equal, trace(both, cfg=1.0), expected))
    assert told[-1].why_not == "EasyCache or LazyCache skips steps already"


def test_a_node_that_forecasts_itself_is_left_to_itself(load, told):
    model = answering(load("wan_h64"), Answers())
    model.model_options["spectrum_h3_binding"] = object()
    trace(skipping(model))
    assert not told[-1].forecast and told[-1].why_not == "Spectrum skips steps already"


def test_a_stopped_run_leaves_nothing_behind(load, told):
    model = skipping(answering(load("wan_h64"), Answers()))
    expected = trace(model)

    def stop(step, x0, x, total):
        assert torch.isfinite(x0).all()
        if step == 7:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        comfy_sample(model, callback=stop, steps=STEPS)
    assert told[-1].forecast == {4, 6}
    assert all(map(torch.equal, trace(model), expected))
    assert "adaspa_forecast" not in model.model_options["transformer_options"]


def test_video_with_sound_is_one_pack_and_each_of_them_counts(comfyui, told):
    from comfy.nested_tensor import NestedTensor

    from sparse_attn.host.forecast import Forecasting

    video, sound = (1, 128, 3, 4, 6), (1, 8, 20, 16)
    latent = NestedTensor([torch.zeros(video), torch.zeros(sound)])
    seen, begin = [], Forecasting.begin

    def noted(self, options):
        seen.append(begin(self, options).parts)
        return self.forecaster

    model = build("ltxav")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forecasting, "begin", noted)
        expected, found = (
            trace(made, begin=latent, cfg=1.0)
            for made in (answering(model, Answers()), skipping(answering(model, Answers())))
        )
    assert_same_trace(found, expected)
    assert seen == [[128 * 3 * 4 * 6, 8 * 20 * 16]] and sorted(told[-1].forecast) == EXPECTED
