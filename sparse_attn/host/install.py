"""Installs AdaSpa on a ModelPatcher: two wrappers, nothing on the model, nothing on the module."""

import comfy.model_management
import comfy.model_prefetch
import comfy.patcher_extension

from ..config import AdaSpaConfig
from ..run_handle import RunHandle
from ..run_state import RunState
from ..schedule import plan
from . import messages
from .families import family_of
from .override import CONTEXT, ModelCall, attention_override
from .progress import progress_of

KEY = "adaspa"
OVERRIDE = "optimized_attention_override"


def install(model, config: AdaSpaConfig, node_id: str | None = None):
    """Return a clone of `model` that samples with AdaSpa, and the handle of its runs.

    Args:
        model: a ModelPatcher. A second installation replaces the first.
        node_id: the node that shows progress, or None.
    """
    handle = RunHandle(config)
    patched = model.clone()
    wrappers = comfy.patcher_extension.WrappersMP
    for kind, wrapper in (
        (wrappers.OUTER_SAMPLE, _outer_sample(handle, node_id)),
        (wrappers.APPLY_MODEL, _apply_model(handle, node_id)),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        if config.enabled:
            patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched, handle


def why_not(model) -> str:
    """Say why a ModelPatcher's model will run dense, or return an empty string."""
    return family_of(model.get_model_object("diffusion_model"))[1]


def _outer_sample(handle: RunHandle, node_id):
    """One sampler run: its state is born here and freed here, also on error or interrupt."""

    def wrapper(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        run = handle.current = _begin(handle, executor.class_obj.model_patcher, sigmas)
        handle.runs.append(run.statistics)
        try:
            out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        except BaseException:
            run.free()
            line = "AdaSpa: the run was stopped"
            messages.send(node_id, run.statistics, line, max(run.step, 0), True)
            raise
        else:
            run.end()
            messages.log.info("AdaSpa: %s", run.statistics.summary())
            last = len(run.schedule.kinds) - 1
            messages.send(node_id, run.statistics, "\n".join(run.statistics.lines()), last, True)
            return out
        finally:
            handle.current = None

    return wrapper


def _begin(handle: RunHandle, patcher, sigmas) -> RunState:
    sampling = patcher.get_model_object("model_sampling")
    schedule = plan(sigmas.tolist(), lambda sigma: progress_of(sampling, sigma), handle.config)
    device = patcher.load_device
    on_gpu = device.type == "cuda"
    return RunState(
        handle.config,
        schedule,
        handle.dense_choice,
        # ComfyUI 0.35 and later record allocations per block; ours outlive it
        getattr(comfy.model_prefetch, "pause_malloc_graph", None) or RunState.NO_CONTEXT,
        comfy.model_management.get_free_memory(device) if on_gpu else None,
    )


def _apply_model(handle: RunHandle, node_id):
    """One call of the diffusion model: put our override on top and give it its context."""

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None,
                transformer_options=None, **inputs):  # fmt: skip
        run = handle.current
        if run is None or not run.schedule.kinds:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **inputs)
        # the run's dictionary is shared by its steps; ours lives for this call
        options = dict(transformer_options or {})
        step = run.schedule.step_of(float(t.flatten()[0]))
        if run.enter_step(step):
            line = messages.progress_line(run.statistics, step)
            messages.send(node_id, run.statistics, line, step, False)
        model = executor.class_obj.diffusion_model
        # a compiled model is a wrapper of another class
        model = getattr(model, "_orig_mod", model)
        family, reason = family_of(model)
        layout = None
        if family is not None:
            run.statistics.model = family.name
            known = {**inputs, "c_crossattn": c_crossattn, "transformer_options": options}
            layout, reason = _layout(family, model, x, known)
        previous = options.get(OVERRIDE)
        options[CONTEXT] = ModelCall(
            run, step, model, family, layout, reason,
            None if previous is attention_override else previous,
        )  # fmt: skip
        options[OVERRIDE] = attention_override
        return executor(x, t, c_concat, c_crossattn, control, options, **inputs)

    return wrapper


def _layout(family, model, x, inputs):
    """Return the token layout, or None and the reason there is none."""
    shape = getattr(x, "shape", ())
    if inputs.get("latent_shapes"):
        # video and audio packed into one flat latent, the video first
        shape = inputs["latent_shapes"][0]
    if len(shape) != 5:
        return None, f"a latent of shape {list(shape)} is not a video"
    try:
        found = family.read(model, shape, inputs)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # a newer ComfyUI may have changed the model; dense is right, a guess is not
        return None, f"the rule for {family.name} no longer fits this ComfyUI ({error})"
    return (None, found) if isinstance(found, str) else (found, "")
