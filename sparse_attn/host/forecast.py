"""Installs AdaSpa Skip Steps on a ModelPatcher: forecasts at the level of the guided prediction.

Every sampler asks its guider for that prediction, whatever happens below: several prompts, context
windows, areas, several devices. What happens above, masks among them, is done to a forecast too.
"""

import time
from collections.abc import Callable, Hashable
from math import prod

import comfy.patcher_extension
import torch

from ..forecast.forecaster import Forecaster
from ..forecast.plan import Level, plan_forecasts
from ..run.report import forecast_lines
from ..run.state import RunState
from ..schedule import StepCounter, place
from ..sentences import Sentence
from . import status
from .guard import go_on_without_us
from .sampling import SAMPLING
from .sigmas import progress_of
from .travelling import Uncopied, listener

# under this key the forecasts of a run travel through transformer_options
FORECASTING = KEY = "adaspa_forecast"
# hooks by which a sampler reads the predictions before guidance, as those of CFG++ do
READS = ("sampler_post_cfg_function", "sampler_pre_cfg_function", "sampler_cfg_function")
BEFORE_GUIDANCE = Sentence("skip_guidance")
FAILED = Sentence("skip_failed")
COMPUTED = "computed"
# nodes that skip steps themselves, by what they put into the options
SKIPPERS = {"easycache": "EasyCache or LazyCache", "spectrum_h3_binding": "Spectrum"}


def install(model, level: Level | None, node_id: str | None = None):
    """Return a clone of `model` whose steps are forecast, or all computed without a level.

    Args:
        model: a ModelPatcher. A second installation replaces the first.
        node_id: the node that shows progress, or None.
    """
    patched = model.clone()
    wrappers = comfy.patcher_extension.WrappersMP
    for kind in (wrappers.OUTER_SAMPLE, wrappers.PREDICT_NOISE):
        patched.remove_wrappers_with_key(kind, KEY)
    if level is not None:
        patched.add_wrapper_with_key(wrappers.OUTER_SAMPLE, KEY, _outer_sample(level, node_id))
        patched.add_wrapper_with_key(wrappers.PREDICT_NOISE, KEY, _predict_noise)
    return patched


def _outer_sample(level: Level, node_id: str | None):
    """One sampler run: its forecasts begin and end here."""

    def wrapper(
        executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *args, **kwargs
    ):  # fmt: skip
        forecasting, told = None, callback
        try:
            guider = executor.class_obj
            shapes = kwargs.get("latent_shapes") or ()
            forecasting = Forecasting(level, guider, sigmas.tolist(), shapes, node_id)
            guider.model_options.setdefault("transformer_options", {})[FORECASTING] = forecasting
            told = forecasting.listener(callback)
        except Exception as error:
            go_on_without_us(error)
            if forecasting is not None:
                forecasting.failed = True
        try:
            return executor(
                noise, latent_image, sampler, sigmas, denoise_mask, told, *args, **kwargs
            )
        finally:
            try:
                if forecasting is not None:
                    forecasting.end()
            except Exception as error:
                go_on_without_us(error)

    return wrapper


def _predict_noise(executor, x, timestep, model_options=None, seed=None):
    options = (model_options or {}).get("transformer_options", {})
    forecasting = options.get(FORECASTING)
    if forecasting is None or forecasting.failed:
        return executor(x, timestep, model_options or {}, seed)
    found = None
    try:
        found = forecasting.forecast(x, timestep, model_options)
    except Exception as error:
        forecasting.give_up(error)
    if found is not None:
        return found
    began = time.perf_counter()
    found = executor(x, timestep, model_options, seed)
    try:
        forecasting.learn(timestep, found, began)
    except Exception as error:
        forecasting.give_up(error)
    return found


class Forecasting(Uncopied):
    """The forecasts of one sampling, beside AdaSpa's run if there is one.

    Args:
        sigmas: noise levels at which the steps begin, and at which the last one ends.
        shapes: of the latents that are packed into one, or of the only one.
    """

    def __init__(self, level: Level, guider, sigmas: list[float], shapes, node_id: str | None):
        self.level, self.guider, self.sigmas = level, guider, sigmas
        self.shapes, self.node_id = shapes, node_id
        self.run: RunState | None = None
        self.forecaster: Forecaster | None = None
        self.failed = False

    def begin(self, options: dict) -> Forecaster:
        """Decide at the first prediction, when AdaSpa has its plan, which steps may be forecast."""
        known = options.get("transformer_options", {})
        sampling = known.get(SAMPLING)
        if sampling is not None:
            self.run = sampling.run
            schedule, counter = sampling.run.schedule, sampling.run.steps
            where = schedule.first_step, schedule.total_steps
        else:
            found = self.guider.model_patcher.get_model_object("model_sampling")
            schedule, counter = None, StepCounter(self.sigmas)
            where = place(tuple(self.sigmas), lambda sigma: progress_of(found, sigma))
        plan = plan_forecasts(self.sigmas, *where, schedule)
        parts = [prod(shape[1:]) for shape in self.shapes]
        packed = self.shapes if len(self.shapes) > 1 else ()
        channels = [prod(shape[2:]) for shape in packed for _ in range(shape[1])]
        self.forecaster = Forecaster(self.level, plan, counter, parts, channels)
        if self.run is not None:
            self.run.statistics.forecast = self.forecaster.statistics
        for key, name in SKIPPERS.items():
            if key in options or key in known:
                self.forecaster.refuse(Sentence("skip_another", name=name))
        return self.forecaster

    def listener(self, callback: Callable | None) -> Callable:
        """What a sampler tells of its steps, for us and for `callback`."""

        def note(*said):
            if self.forecaster is not None:
                self.forecaster.counter.spoken()

        return listener(note, self.give_up, callback)

    def give_up(self, error: Exception) -> None:
        """Compute every step from here on, after an error that nobody expected."""
        self.failed = True
        go_on_without_us(error)
        if self.forecaster is not None:
            self.forecaster.refuse(FAILED)

    def forecast(self, x: torch.Tensor, timestep, options: dict) -> torch.Tensor | None:
        """The guided prediction, or None where it is to be computed.

        Args:
            options: those of the call, by which a sampler may ask for more.
        """
        sigma = float(timestep.flatten()[0])
        forecaster = self.forecaster or self.begin(options)
        if any(options.get(read) != self.guider.model_options.get(read) for read in READS):
            forecaster.refuse(BEFORE_GUIDANCE)
        before = forecaster.step
        run = self.run and self.run.statistics
        owed = run is not None and run.owes_search(forecaster.counter.of(sigma))
        found = forecaster.forecast(sigma, _regime(self.guider, x, sigma), owed)
        if forecaster.step != before:
            self.tell(forecaster)
        return found

    def learn(self, timestep, found: torch.Tensor, began: float) -> None:
        """Take in a prediction that was computed, since `began`."""
        forecaster, run = self.forecaster, self.run and self.run.statistics
        if self.failed or forecaster is None:
            # what declined the forecast has failed
            return
        # a node beside ours may have answered for the model: nothing is to be learned from that
        skipped = run is not None and run.was_skipped(forecaster.step)
        if not skipped and forecaster.learn(float(timestep.flatten()[0]), found):
            forecaster.statistics.seconds.append(time.perf_counter() - began)

    def tell(self, forecaster: Forecaster, done: bool = False) -> None:
        """Show on the node where the run is, or in the end what it came to."""
        told, plan, step = forecaster.statistics, forecaster.plan, forecaster.step
        kinds = (
            self.run.statistics.step_kinds() if self.run else told.kinds([COMPUTED] * told.steps)
        )
        number, total = str(plan.first_step + step + 1), str(plan.total_steps)
        said = [Sentence(f"step_{kinds[step]}", step=number, total=total)]
        if done:
            said = forecast_lines(told)
        status.show_steps(self.node_id, said, kinds, plan.first_step, step, done)

    def end(self) -> None:
        """Say what the forecasts came to."""
        self.guider.model_options.get("transformer_options", {}).pop(FORECASTING, None)
        if self.forecaster is not None:
            status.log.info("AdaSpa: %s", " ".join(forecast_lines(self.forecaster.statistics)))
            self.tell(self.forecaster, done=True)


def _regime(guider, x: torch.Tensor, sigma: float) -> Hashable:
    """What the guided prediction depends on beside x and sigma: model, size, prompts and hooks."""
    active = []
    for conds in getattr(guider, "conds", {}).values():
        for cond in conds or ():
            active.append(_is_active(cond.get("timestep_start"), cond.get("timestep_end"), sigma))
            # a LoRA whose strength has a schedule of its own
            for hook in getattr(cond.get("hooks"), "hooks", ()):
                active += [sigma <= key.start_t for key in hook.hook_keyframe.keyframes]
            control = cond.get("control")
            while control is not None:
                start, end = control.timestep_range or (None, None)
                active.append(_is_active(start, end, sigma))
                control = control.previous_controlnet
    model = id(getattr(guider, "inner_model", None))
    return model, tuple(x.shape), x.dtype, x.device, tuple(active)


def _is_active(start: float | None, end: float | None, sigma: float) -> bool:
    return (start is None or sigma <= start) and (end is None or sigma >= end)
