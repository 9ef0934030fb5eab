"""Whole generations with the seeds as a batch: the dense one, and a rule's from the search on."""

import check_model
import models
import procedural_video as video
import torch
from attention import Captured, Run


class Subject:
    """One model with its prompts, ready to be sampled.

    Scene i is generated from noise of seed i, on a CPU as ComfyUI does.
    """

    def __init__(self, spec, comfyui, folder, seeds: int):
        self.spec = spec
        self.layout = spec.layout
        self.scenes = models.scenes(spec, seeds)
        self.prompts = [video.prompt(scene) for scene in self.scenes]
        self.model = models.load(spec, comfyui, folder)
        self.conds = self.prepared_conds()
        import comfy.model_management

        self.device = comfy.model_management.get_torch_device()

    def prepared_conds(self) -> dict:
        """What ComfyUI's sampler hands the model next to latent and time, for all prompts."""
        seen = {}

        def wrapper(apply_model, given):
            seen.update(given["c"])
            return apply_model(given["input"], given["timestep"], **given["c"])

        self.model.set_model_unet_function_wrapper(wrapper)
        models.generate(self.model, self.prompts, self.spec.latent, 1, 0)
        del self.model.model_options["model_function_wrapper"]
        seen.pop("transformer_options")
        return seen

    def sigmas(self, steps: int):
        import comfy.samplers

        sampling = self.model.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, "simple", steps).to(self.device)

    def noise(self) -> torch.Tensor:
        one = (16, *self.spec.latent)
        noise = [torch.randn(one, generator=torch.manual_seed(i)) for i in range(len(self.scenes))]
        return torch.stack(noise).to(self.device)

    @torch.no_grad()
    def euler(self, x, sigmas, start: int, attend, begin=None, after=None):
        """From the latents before step `start` to the end."""
        attention = models.override(self.spec, attend)
        options = {"optimized_attention_override": attention}
        for step in range(start, len(sigmas) - 1):
            if begin is not None:
                begin(step)
            sigma, following = sigmas[step], sigmas[step + 1]
            denoised = self.model.model.apply_model(
                x, sigma.expand(len(x)), transformer_options=dict(options), **self.conds
            )
            x = x + (x - denoised) / sigma * (following - sigma)
            if after is not None:
                after(step, x)
        return x


class Path:
    """The dense generation of one schedule, with what its search steps saw.

    Args:
        firsts: steps at which some rule searches first.
    """

    def __init__(self, subject: Subject, steps: int, firsts):
        self.subject, self.steps = subject, steps
        self.sigmas = subject.sigmas(steps)
        self.captured = {first: Captured(subject.layout) for first in firsts}
        self.after: dict[int, torch.Tensor] = {}
        self.now = -1
        x = subject.noise() * self.sigmas[0]
        x = subject.euler(x, self.sigmas, 0, self._look, self._begin, self._after)
        self.video = video.decode(x).clamp(0, 1)

    def _begin(self, step):
        self.now = step

    def _look(self, layer, q, k, v):
        if self.now in self.captured:
            self.captured[self.now].keep(layer, q, k, v)

    def _after(self, step, x):
        if step in self.captured:
            self.after[step] = x

    def run(self, rule, first: int, record=False) -> tuple[torch.Tensor, Run]:
        """Videos [n, 3, F, Y, X] of a rule that searches first at step `first`."""
        run = Run(rule, self.captured[first], first, self.steps, record)
        x = self.subject.euler(
            self.after[first], self.sigmas, first + 1, run.attend, run.begin
        )  # fmt: skip
        return video.decode(x).clamp(0, 1), run


def same_as_comfyui(subject: Subject, steps: int) -> float:
    """Largest difference between our dense sampling and ComfyUI's, for the first seed."""
    ours = Path(subject, steps, ()).video[:1]
    latent = check_model.generate(subject.model, subject.prompts[:1], subject.spec.latent, steps, 0)
    return float((ours.cpu() - video.decode(latent).clamp(0, 1)).abs().max())
