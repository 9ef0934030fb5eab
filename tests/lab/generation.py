"""Whole generations with the seeds as a batch, through ComfyUI's own sampler."""

from dataclasses import dataclass, field
from pathlib import Path

import check_model
import first_step
import models
import procedural_video as video
import sol_op
import torch
from continuation import continued
from natural_clips import Clips
from rivals import Rival
from rule import OP_SCORES, Rule, first_search


@dataclass
class Run:
    """What a rule did in one generation.

    Args:
        video: [n, 3, F, Y, X] in [0, 1].
        density: mean share of block pairs kept. searches: after the first, over all layers.
        recall: by layer, at its latest search; a rival has none.
        similar: share of heads whose blocks are of similar tokens, or None.
    """

    video: torch.Tensor
    density: float = 1.0
    searches: int = 0
    recall: dict[int, float] = field(default_factory=dict)
    similar: float | None = None


class Subject:
    """One model with its prompts, ready to be sampled.

    Scene i is generated from noise of seed i, drawn on a CPU as ComfyUI does.

    Args:
        seeds: which, or how many from 0 on.
        latent: (T, H, W) of the latents, None for the model's own.
    """

    def __init__(self, spec, comfyui, seeds: int | list[int], latent=None):
        self.spec, self.latent = spec, latent or spec.latent
        self.layout = spec.layout_at(self.latent)
        self.seeds = range(seeds) if isinstance(seeds, int) else seeds
        drawn = models.scenes(spec, max(self.seeds) + 1)
        self.scenes = [drawn[i] for i in self.seeds]
        self.prompts = [spec.world.prompt(scene) for scene in self.scenes]
        self.model = models.load(spec, comfyui)

    def noise(self) -> torch.Tensor:
        one = (16, *self.latent)
        drawn = (torch.randn(one, generator=torch.manual_seed(i)) for i in self.seeds)
        return torch.stack(list(drawn))

    def sample(self, model, steps: int, attention=None) -> torch.Tensor:
        """Videos [n, 3, F, Y, X] in [0, 1] of a ModelPatcher, seed by seed."""
        found = check_model.generate(
            model, self.prompts, self.latent, steps, 0, attention, self.noise()
        )
        return video.decode(found).clamp(0, 1)

    @property
    def readable(self) -> bool:
        """Whether what was asked for can be read back from a video."""
        return self.spec.world is video

    def dense(self, steps: int) -> torch.Tensor:
        return self.sample(self.model, steps)

    def run(self, rule: Rule, schedule: str) -> Run:
        steps, first = first_search(rule, schedule)
        if rule.score == "mass":
            return self._pack(rule.config(schedule), steps, rule.first_density)
        if rule.score in OP_SCORES:
            rival = sol_op.Op(rule, first)
        else:
            rival = Rival(rule, self.layout, first)
        found = self.sample(self.model, steps, models.override(self.spec, rival.attend))
        return Run(found, rival.density())

    def _pack(self, config, steps: int, first_density: float = 0.0) -> Run:
        from sparse_attn.host.install import install

        patched, handle = install(self.model, config)
        with first_step.at_density(first_density):
            found = self.sample(patched, steps)
        told = handle.latest()
        patterns = {layer: pattern for (layer, _), pattern in sorted(told.patterns.items())}
        if len(patterns) != self.spec.layers:
            raise RuntimeError("\n".join(["Not every layer was sparse:", *told.lines()]))
        searches = sum(kind.value == "search" for kind in told.schedule.kinds)
        figures = told.as_dict()
        return Run(
            found, figures["density"], (searches - 1) * len(patterns),
            {layer: sum(p.recall) / len(p.recall) for layer, p in patterns.items()},
            figures["heads_by_similarity"],
        )  # fmt: skip


class Continuation(Subject):
    """The model of natural clips: a seed is a held-out clip and its noise, its first frames are given.

    Videos are the frames that come after those.

    Args:
        clips: file of `natural_clips.py`.
    """

    def __init__(self, spec, comfyui, seeds: int | list[int], latent, clips: Path):
        self.spec, self.latent = spec, latent or spec.latent
        self.layout = spec.layout_at(self.latent)
        held_out = Clips(clips, "held out")
        frames, height, width = self.latent
        size = video.FRAMES_PER_LATENT * frames, 2 * height, 2 * width
        long = held_out.of_length(size[0])
        self.seeds = range(seeds) if isinstance(seeds, int) else seeds
        if max(self.seeds) >= len(long):
            raise ValueError(
                f"{clips.name} has {len(long)} clips that are held out and long enough."
            )
        chosen = [long[seed] for seed in self.seeds]
        self.prompts = [held_out.names[number] for number in chosen]
        self.given = video.encode(torch.stack([held_out.window(n, *size) for n in chosen]))
        self.model = models.load(spec, comfyui)

    @property
    def readable(self) -> bool:
        return False

    def sample(self, model, steps: int, attention=None) -> torch.Tensor:
        found = continued(model, self.given, self.spec.known, steps, 0, attention, self.noise())
        return video.decode(found[:, :, self.spec.known :]).clamp(0, 1)


def subject(name: str, comfyui, seeds: int | list[int], latent=None, clips: Path | None = None):
    """A `Subject` of one of the lab's models.

    Raises:
        ValueError: it continues clips and there are none.
    """
    spec = models.MODELS[name]
    if not spec.known:
        return Subject(spec, comfyui, seeds, latent)
    if clips is None or not clips.is_file():
        raise ValueError(
            f"{name} continues clips: `{models.CLIPS}` makes them, `run_lab.py --clips FILE` takes them."
        )
    return Continuation(spec, comfyui, seeds, latent, clips)
