"""How long samplers take, with AdaSpa and with it off, and what this process knows of it."""

import time
from collections.abc import Hashable

import torch

from ..config import AdaSpaConfig
from ..run.pace import Pace
from ..run.statistics import RunStatistics
from ..schedule import Schedule, StepKind
from .guard import go_on_without_us
from .travelling import Uncopied

# kept until ComfyUI restarts
PACE = Pace()
# under this key AdaSpa's wrappers lie on a model
KEY = "adaspa"
# under this key a clock travels through transformer_options
CLOCK = "adaspa_clock"


class Clock(Uncopied):
    """Seconds from the first step of a sampler to its result; loading models comes before."""

    took: float | None = None


def start_clock(guider) -> Clock:
    """Put a clock into the options of a guider, for `time_sampler`."""
    options = guider.model_options.setdefault("transformer_options", {})
    options[CLOCK] = clock = Clock()
    return clock


def drop_clock(guider) -> None:
    guider.model_options.get("transformer_options", {}).pop(CLOCK, None)


def time_sampler(executor, guider, sigmas, extra_args, *args, **kwargs):
    """Wrap ComfyUI's sampler: note in the clock how long it takes, until its result is computed."""
    clock, began = None, 0.0
    try:
        clock = extra_args.get("model_options", {}).get("transformer_options", {}).get(CLOCK)
        began = time.perf_counter()
    except Exception as error:
        go_on_without_us(error)
    out = executor(guider, sigmas, extra_args, *args, **kwargs)
    try:
        if clock is not None:
            if isinstance(out, torch.Tensor):
                # waits for the device, after the last step
                out.flatten()[:1].cpu()
            clock.took = time.perf_counter() - began
    except Exception as error:
        go_on_without_us(error)
    return out


def work_of(guider, sampler, noise) -> Hashable:
    """What decides how long a step takes: the model and its nodes, latent, guidance and sampler."""
    patcher = guider.model_patcher
    model = patcher.get_model_object("diffusion_model")
    method = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    prompts = tuple(len(conds or ()) for conds in getattr(guider, "conds", {}).values())
    what = type(model).__name__, patcher.model_size(), tuple(noise.shape), method
    return *what, getattr(guider, "cfg", None), prompts, _nodes_on(patcher)


def _nodes_on(patcher) -> frozenset:
    """What other nodes have put on a model, as far as names and numbers tell them apart."""
    options = {**patcher.model_options}
    options.update(options.pop("transformer_options", {}))
    wrappers = {
        (kind, key)
        for kind, found in patcher.wrappers.items()
        for key in found
        if found[key] and key != KEY
    }
    return frozenset(wrappers | {(name, _told_apart(value)) for name, value in options.items()})


def _told_apart(made) -> Hashable:
    """What tells a function, an object of a node, or several, from others."""
    if isinstance(made, bool | int | float | str):
        return made
    if isinstance(made, dict):
        # by names alone: to print a tensor waits for the GPU
        made = sorted(made.items(), key=lambda part: str(part[0]))
    if isinstance(made, list | tuple):
        return tuple(map(_told_apart, made))
    if (name := getattr(made, "__qualname__", None)) is not None:
        return name
    public = {name: x for name, x in getattr(made, "__dict__", {}).items() if name[0] != "_"}
    numbers = {name: x for name, x in public.items() if isinstance(x, bool | int | float | str)}
    return type(made).__qualname__, frozenset(numbers.items())


def with_sigmas(work: Hashable, sigmas: torch.Tensor) -> Hashable:
    """What decides how long a run takes."""
    return work, *(round(sigma, 4) for sigma in sigmas.tolist())


def off_run(
    config: AdaSpaConfig, work: Hashable, sigmas: torch.Tensor, took: float | None
) -> RunStatistics:
    """The statistics of a run with AdaSpa off; the process remembers its seconds."""
    steps = len(sigmas) - 1
    schedule = Schedule((StepKind.DENSE,) * steps, 0, steps, tuple(sigmas.tolist()))
    sampled = with_sigmas(work, sigmas)
    if took is not None and steps > 0:
        PACE.off[sampled] = took
        PACE.dense_steps.setdefault(work, (took / steps, None))
    return RunStatistics(config, schedule, sampled=sampled, took=took, finished=True)
