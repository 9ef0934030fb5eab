"""A video model in ComfyUI whose answers are known, and the trace of a run with it."""

import torch

from sparse_attn.forecast.forecaster import Forecaster
from sparse_attn.forecast.plan import Level
from tests.host.host_fixtures import VIDEO, conditioning

QUADRATIC = Level(2, 1, 1e-3)
# however far off the forecasts are
BLIND = Level(1, 2, float("inf"))
STEPS = 16
# what QUADRATIC forecasts of them where it fits
EXPECTED = [4, 6, 8, 10, 12, 14]


class Answers:
    """Stands in for the network: latents that are a polynomial in sigma, another for each prompt.

    Args:
        jump: sigma below which positive prompts are answered otherwise.
    """

    def __init__(self, degree=2, jump=-1.0):
        generator = torch.Generator().manual_seed(3)
        self.factors = torch.randn(degree + 1, 16, 1, 1, 1, generator=generator)
        self.jump, self.sigmas = jump, []

    def __call__(self, apply_model, args):
        x, sigma = args["input"], float(args["timestep"][0])
        self.sigmas.append(sigma)
        value = sum(factor * sigma**i for i, factor in enumerate(self.factors))
        if x.ndim != 5:
            # a flat pack of latents
            value = value[:1, 0, 0]
        prompts = args["cond_or_uncond"]
        return torch.cat(
            [
                (value * (1 + prompt) + 3 * (sigma < self.jump) * (not prompt)).expand_as(part)
                for prompt, part in zip(prompts, x.chunk(len(prompts)), strict=True)
            ]
        )


class Told(list):
    """The statistics of every run in which steps could have been forecast."""

    def __init__(self, monkeypatch):
        super().__init__()
        init = Forecaster.__init__

        def noted(forecaster, *args):
            init(forecaster, *args)
            self.append(forecaster.statistics)

        monkeypatch.setattr(Forecaster, "__init__", noted)


def answering(model, answers):
    model = model.clone()
    model.set_model_unet_function_wrapper(answers)
    return model


def trace(
    model, *, steps=STEPS, cfg=3.0, sampler="euler", scheduler="simple", positive=None, shape=VIDEO,
    begin=None, **options,
):  # fmt: skip
    """Latent and prediction of every step of a run by ComfyUI's KSampler, and its result.

    Args:
        sampler: name, or a sampler object.
        positive: prompts, or None for one.
        begin: latent to begin with, or None for an empty one.
    """
    import comfy.sample
    import comfy.samplers

    seen = []

    def note(step, x0, x, total):
        seen.extend((flat(x), flat(x0)))

    latent = torch.zeros(shape) if begin is None else begin
    noise = comfy.sample.prepare_noise(latent, 1)
    texts = positive or conditioning(7, 0), conditioning(9, 1)
    with torch.no_grad():
        if isinstance(sampler, str):
            out = comfy.sample.sample(
                model, noise, steps, cfg, sampler, scheduler, *texts, latent, callback=note,
                disable_pbar=True, seed=1, **options,
            )  # fmt: skip
        else:
            sampling = model.get_model_object("model_sampling")
            sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
            out = comfy.sample.sample_custom(
                model, noise, cfg, sampler, sigmas, *texts, latent, callback=note,
                disable_pbar=True, seed=1, **options,
            )  # fmt: skip
    return [*seen, flat(out)]


def flat(latent) -> torch.Tensor:
    """A copy, of a nest of latents as one row."""
    parts = latent.unbind() if latent.is_nested else [latent]
    return latent.clone() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def assert_same_trace(found, expected, tolerance=1e-4):
    """Fail unless two traces agree in every step to `tolerance` of the largest value."""
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = ((a - b).abs().max() / b.abs().max()).item()
        assert error <= tolerance, f"{error:.1e} in part {i}"
