"""Installs AdaSpa on a ModelPatcher: wrappers, nothing on the model, nothing on the module."""

import threading
from functools import partial

import comfy.model_management
import comfy.model_prefetch
import comfy.patcher_extension
import torch

from ..config import AdaSpaConfig
from ..run.estimate import why_not_worth
from ..run.handle import RunHandle
from ..run.state import RunState
from ..run.statistics import Fingerprint, RunStatistics
from ..run.verdict import named, numbers
from ..schedule import plan
from ..sentences import Sentence
from . import pattern_requests, status, timing
from .backend_history import publish
from .calling_block import inner_of
from .families import family_of
from .guard import go_on_without_us
from .model_call import CAPTURED, CONTEXT, Declined, ModelCall, captured
from .override import attention_override, this_thread
from .sampling import SAMPLING, WRAPPED, Sampling
from .sigmas import progress_of
from .timing import KEY

# the list of entries of a call of the model, in its options
ENTERED = "adaspa_entered"
OVERRIDE = "optimized_attention_override"


def install(
    model, config: AdaSpaConfig, node_id: str | None = None, *,
    first: RunHandle | None = None, part: str = "",
):  # fmt: skip
    """Return a clone of `model` that samples with AdaSpa, and the handle of its runs.

    Args:
        model: a ModelPatcher. A second installation replaces the first.
        node_id: the node that shows progress, or None.
        first: the handle of the expert that samples before this model.
        part: which of several models, for people.
    """
    handle = RunHandle(config, first, part)
    patched = model.clone()
    wrappers = comfy.patcher_extension.WrappersMP
    outer = _outer_sample if config.enabled else _outer_sample_off
    for kind, wrapper in (
        (wrappers.OUTER_SAMPLE, outer(handle, node_id)),
        (wrappers.SAMPLER_SAMPLE, timing.time_sampler),
        (wrappers.APPLY_MODEL, _apply_model(node_id) if config.enabled else None),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        if wrapper is not None:
            patched.add_wrapper_with_key(kind, KEY, wrapper)
    # a pattern request of an earlier installation was for that one's runs
    for request in (pattern_requests.BEGIN, pattern_requests.SAVE):
        patched.remove_attachments(request)
    patched.set_attachments(pattern_requests.HANDLE, handle)
    return patched, handle


def why_not(model) -> str:
    """Say why a ModelPatcher's model will run dense, or return an empty string."""
    return family_of(model.get_model_object("diffusion_model"))[1]


def fingerprint(latent) -> Fingerprint:
    """Tells one run's latent from another's, also where it has several parts."""
    return Fingerprint.of(*(latent.unbind() if latent.is_nested else [latent]))


def _outer_sample(handle: RunHandle, node_id):
    """One sampler run: its state is born here and freed here, also on error or interrupt."""

    def wrapper(
        executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *args, **kwargs
    ):  # fmt: skip
        sampling, out, told, clock = None, None, callback, None
        try:
            guider = executor.class_obj
            work = timing.work_of(guider, sampler, noise)
            run = _begin(handle, guider.model_patcher, sigmas, work)
            sampling = Sampling(run, tuple(noise.shape), guider)
            handle.runs.append(run.statistics)
            sampling.enter()
            told = sampling.listener(callback)
            clock = timing.start_clock(guider)
        except Exception as error:
            go_on_without_us(error, None if sampling is None else sampling.run)
        try:
            out = executor(
                noise, latent_image, sampler, sigmas, denoise_mask, told, *args, **kwargs
            )
            return out
        finally:
            if sampling is not None:
                try:
                    _end(sampling, handle, node_id, out, sigmas, clock)
                except Exception as error:
                    go_on_without_us(error)

    return wrapper


def _end(sampling: Sampling, handle: RunHandle, node_id, out, sigmas, clock) -> None:
    """End a run that returned `out`, or None where it was interrupted."""
    run, guider, statistics = sampling.run, sampling.guider, sampling.run.statistics
    try:
        if out is None:
            run.stop()
            tell_the_end(node_id, statistics, max(run.step, 0))
            return
        try:
            pattern_requests.end(run, guider.model_patcher, handle)
        except Exception as error:
            # the video is whole, and what is known of it is told all the same
            go_on_without_us(error)
            statistics.warn(f"an error in AdaSpa after the last step, {error!r}")
            statistics.finished = True
        statistics.results.append(fingerprint(out))
        if sampling.denoised is not None:
            # as the sampler's second output has it
            denoised = guider.model_patcher.model.process_latent_out(sampling.denoised.cpu())
            statistics.results.append(fingerprint(denoised))
        if clock is not None:
            statistics.took = clock.took
            statistics.sampled = timing.with_sigmas(run.work, sigmas)
            statistics.seconds_off = timing.PACE.off.get(statistics.sampled)
        tell_the_end(node_id, statistics, len(run.schedule.kinds) - 1)
        handle.note(handle.metadata)
    finally:
        run.free()
        sampling.leave()
        timing.drop_clock(guider)


def _outer_sample_off(handle: RunHandle, node_id):
    """One sampler run with AdaSpa off, which is timed and otherwise left alone."""

    def wrapper(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider, work, clock = executor.class_obj, None, None
        try:
            work = timing.work_of(guider, sampler, noise)
            clock = timing.start_clock(guider)
        except Exception as error:
            go_on_without_us(error)
        out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        try:
            if clock is not None:
                timing.drop_clock(guider)
                run = timing.off_run(handle.config, work, sigmas, clock.took)
                run.part, run.results = handle.part, [fingerprint(out)]
                handle.runs.append(run)
                tell_the_end(node_id, run, len(run.schedule.kinds) - 1)
                handle.note(handle.metadata)
        except Exception as error:
            go_on_without_us(error)
        return out

    return wrapper


def tell_the_end(node_id: str | None, statistics: RunStatistics, step: int) -> None:
    """Log how a run that ended in `step` went, and show it on the node."""
    status.log.info("AdaSpa: %s", statistics.summary())
    said = [*named(statistics), *numbers(statistics)]
    status.send(node_id, statistics, said, step, True)


def _begin(handle: RunHandle, patcher, sigmas, work) -> RunState:
    sampling = patcher.get_model_object("model_sampling")
    # a loaded pattern, else the one of the expert that sampled before
    carried = patcher.get_attachment(pattern_requests.BEGIN) or handle.carried()
    keeps = handle.keeps_pattern or patcher.get_attachment(pattern_requests.SAVE) is not None
    begins, progress = carried is not None, partial(progress_of, sampling)
    schedule = plan(
        sigmas.tolist(), progress, handle.config, keeps_pattern=keeps, begins_with_pattern=begins
    )
    device = patcher.load_device
    free = comfy.model_management.get_free_memory(device) if device.type == "cuda" else None
    # ComfyUI 0.35 and later record allocations per block; ours outlive it
    outlives = getattr(comfy.model_prefetch, "pause_malloc_graph", None) or RunState.NO_CONTEXT
    choice, pace = handle.dense_choice, timing.PACE
    run = RunState(handle.config, schedule, choice, outlives, free, carried, pace, work)
    run.statistics.part = handle.part
    # the new run's takes its place
    handle.pattern = None
    return run


def _apply_model(node_id):
    """One call of the diffusion model: put our override on top and give it its context."""

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None,
                transformer_options=None, **inputs):  # fmt: skip
        run, options, leave, before = None, transformer_options, None, this_thread.options
        try:
            sampling = (transformer_options or {}).get(SAMPLING)
            if sampling is not None and sampling.run.schedule.kinds and not sampling.run.given_up:
                run = sampling.run
                known = {**inputs, "c_crossattn": c_crossattn}
                model = executor.class_obj.diffusion_model
                options, leave = _enter(sampling, model, x, t, transformer_options, known, node_id)
        except Exception as error:
            go_on_without_us(error, run)
        this_thread.options = options
        try:
            out = executor(x, t, c_concat, c_crossattn, control, options, **inputs)
        finally:
            this_thread.options = before
        try:
            if leave is not None:
                leave()
        except Exception as error:
            go_on_without_us(error, run)
        return out

    return wrapper


def _enter(sampling: Sampling, model, x, t, options, inputs, node_id) -> tuple:
    """Begin a call of the diffusion model.

    Args:
        x, t, inputs: what it is called with. options: its `transformer_options`.

    Returns:
        The options that it is to get, and what to do once it has answered, or None.
    """
    # the run's dictionary is shared by its steps; ours lives for this call
    run, options = sampling.run, dict(options)
    previous = options.get(OVERRIDE)
    previous = None if previous is attention_override else previous
    options[OVERRIDE] = attention_override
    if captured(t.device):
        # which step it is lies on the device, and to read it would break the capture
        options[CONTEXT] = Declined(run, max(run.step, 0), previous, CAPTURED)
        return options, None
    step = run.steps.of(float(t.flatten()[0]))
    first = run.step < 0
    new = run.enter_step(step)
    # a compiled model is a wrapper of another class
    model = inner_of(model)
    layout = announce = None
    family, reason = family_of(model)
    if family is not None:
        run.statistics.model = family.name
        layout, reason = _layout(family, model, x, {**inputs, "transformer_options": options})
    place, unplaced = sampling.place_of(x, options)
    options.pop(WRAPPED, None)
    if family is None or layout is None:
        call = Declined(run, step, previous, reason)
    else:
        announce = _announcer(run, layout, node_id) if first else None
        call = ModelCall(
            run, step, previous, model, family, layout, sampling.callers_in(family, model),
            place, unplaced, announce, inputs, attention_override,
        )  # fmt: skip
    if new and announce is None:
        said = status.progress(run.statistics, step) + run.expected()
        status.send(node_id, run.statistics, said, step, False)
    options[CONTEXT] = call
    publish(options, run, step)
    entered = _noting_entry(options)

    def leave():
        sampling.tells_entry |= bool(entered)
        # a cache may answer without the model, but not in a run's first call
        if entered or not sampling.tells_entry:
            run.statistics.entered.add(step)
            call.count_unseen(entered[0] if entered else options)
        if announce is not None:
            # said here if no attention call was ours
            announce([])

    return options, leave


def _noting_entry(options: dict) -> list[dict]:
    """Let the model, if it is entered, leave its `transformer_options` in the list returned."""
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    wrappers = dict(options.get("wrappers") or {})
    # the last one is the innermost
    wrappers[kind] = {**wrappers.get(kind, {}), KEY: [_note_entry]}
    options["wrappers"], options[ENTERED] = wrappers, []
    return options[ENTERED]


def _note_entry(executor, *args, **inputs):
    # a graph that holds the model would be parted, or made anew for every call of it
    if not torch.compiler.is_compiling():
        try:
            options = this_thread.options or {}
            given = [x for x in (*args, *inputs.values()) if isinstance(x, dict) and CONTEXT in x]
            options[ENTERED].append(given[0] if given else options)
        except Exception as error:
            go_on_without_us(error)
    return executor(*args, **inputs)


def _announcer(run: RunState, layout, node_id):
    """Return announce(expected), which says once, before the first attention, what to expect."""
    waits, step = threading.Lock(), run.step

    def announce(expected):
        if waits.acquire(blocking=False):
            say(expected)

    def say(expected):
        run.statistics.expected = " ".join(expected)
        said = status.progress(run.statistics, step) + expected
        status.send(node_id, run.statistics, said, step, False)

    if reason := why_not_worth(layout, run.config):
        waits.acquire()
        say([Sentence("leave_off", why=reason)])
    return announce


def _layout(family, model, x, inputs):
    """Return the token layout, or None and the reason there is none."""
    shape = getattr(x, "shape", ())
    if inputs.get("latent_shapes"):
        # video and audio packed into one flat latent, the video first
        shape = inputs["latent_shapes"][0]
    if len(shape) != 5:
        return None, Sentence("why_latent", shape=str(list(shape)))
    try:
        found = family.read(model, shape, inputs)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # a newer ComfyUI may have changed the model; dense is right, a guess is not
        return None, Sentence("why_rule", name=family.name, error=str(error))
    return (None, found) if isinstance(found, str) else (found, "")
