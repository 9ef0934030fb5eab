"""No mask ever meets another sampling's q, and what a step does not use goes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sparse_attn.run.serving import IN_VAIN, LET_GO, Serving
from tests.host.host_fixtures import VIDEO, assert_same_video, calls, kept_dense, sample, sparse
from tests.host.identity.truth import guided, in_every_call

# ---- samplings beside each other


def test_two_threads_that_sample_clones_of_one_model_do_not_meet(load, truth):
    model, handle = sparse(load("wan_h64"), search_points=(0.5,))
    alone = {seed: sample(model.clone(), seed=seed) for seed in (1, 2)}
    made = calls(handle)
    truth.met.clear()
    together = threading.Barrier(2)

    def run(seed):
        def at_the_same_time(*said):
            # step by step, and to the end: a sampling that ends takes the shared model's patcher away
            together.wait(60)

        return sample(model.clone(), seed=seed, callback=at_the_same_time)

    with ThreadPoolExecutor(2) as threads:
        found = dict(zip((1, 2), threads.map(run, (1, 2)), strict=True))
    for seed, out in found.items():
        assert_same_video(out, alone[seed], 1e-6)
    assert truth.holds()
    runs = list(handle.runs)[-2:]
    assert all(run.schedule == runs[0].schedule and run.finished for run in runs)
    for run in runs:
        kinds = {kind: len(getattr(run.timing, kind)) for kind in made}
        assert kinds == made


def test_options_that_are_copied_whole_belong_to_the_same_run(load):
    """Nodes copy a model's options to change some of them for a call."""
    import copy

    def wrapper(executor, x, t, c_concat, c_crossattn, control, options, **inputs):
        return executor(x, t, c_concat, c_crossattn, control, copy.deepcopy(options), **inputs)

    import comfy.samplers

    class Copies(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            return super().predict_noise(x, timestep, copy.deepcopy(model_options), seed)

    model, handle = sparse(load("wan_h64"))
    in_every_call(model, wrapper)
    guided(Copies(model), VIDEO)
    assert calls(handle) == {"search": 4, "sparse": 12}


def test_nothing_of_a_sampling_stays_in_the_models_options(load):
    model, _ = sparse(load("wan_h64"))
    model.set_model_unet_function_wrapper(lambda apply_model, args: apply_model(
        args["input"], args["timestep"], **args["c"]
    ))  # fmt: skip
    wrapper = model.model_options["model_function_wrapper"]
    before = set(model.model_options["transformer_options"])
    sample(model)
    assert model.model_options["model_function_wrapper"] is wrapper
    assert set(model.model_options["transformer_options"]) == before


# ---- what a step does not use


def travelling(model, new_at):
    """A guider whose prompts are new, by their uuid, in some of its steps."""
    import uuid

    import comfy.samplers

    class Travel(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            if new_at(self.step):
                for conds in self.conds.values():
                    for cond in conds:
                        cond["uuid"] = uuid.uuid4()
            self.step += 1
            return super().predict_noise(x, timestep, model_options, seed)

    guider = Travel(model)
    guider.step = 0
    return guider


def test_prompts_that_are_new_at_every_step_are_not_searched_for_ever(load):
    held = {}
    for steps in (6, 24):
        model, handle = sparse(load("wan_h64"))
        guided(travelling(model, lambda step: True), VIDEO, steps)
        run = handle.latest()
        held[steps] = run.memory.held_bytes
        # two layers and prompts; three steps tell that nothing is used again
        assert calls(handle) == {"search": 12, "dense": 4 * (steps - 3)}
        # nothing follows the last step, whatever is new
        assert kept_dense(handle)[IN_VAIN] == 4 * (steps - 4)
        assert LET_GO in run.warnings
    assert held[24] == held[6]


def test_prompts_that_change_now_and_then_are_searched_again(load):
    model, handle = sparse(load("wan_h64"))
    guided(travelling(model, lambda step: step == 4), VIDEO, 8)
    assert calls(handle) == {"search": 8, "sparse": 24}
    assert LET_GO in handle.latest().warnings


@pytest.mark.parametrize("cache", ["gpu", "cpu"])
def test_a_prompt_that_ends_lets_its_patterns_go(load, largest, cache):
    """Guidance in the first steps alone."""
    model, handle = sparse(load("wan_h64"), cache=cache)
    guided(stepwise(model, lambda step: step < 3), VIDEO, 8)
    assert calls(handle) == {"search": 4, "sparse": 2 * 2 * 2 + 2 * 5}
    # the first step begins after none
    assert largest == [0, 4, 4, 4, 4, 2, 2, 2, 2]
    assert LET_GO in handle.latest().warnings


def test_a_prompt_of_every_other_step_keeps_its_patterns(load, largest):
    model, handle = sparse(load("wan_h64"))
    guided(stepwise(model, lambda step: step % 2 == 0), VIDEO, 8)
    assert calls(handle) == {"search": 4, "sparse": 2 * 7 + 2 * 3}
    assert LET_GO not in handle.latest().warnings


@pytest.fixture
def largest(monkeypatch):
    """Layers with a pattern, at the end of every step."""
    found = []
    leave = Serving.leave_step

    def noted(run):
        leave(run)
        found.append(sum(layer.pattern is not None for layer in run.layers.values()))

    monkeypatch.setattr(Serving, "leave_step", noted)
    return found


def stepwise(model, guides):
    """A guider that asks for the negative prompt in some steps."""
    import comfy.samplers

    class Stepwise(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            self.set_cfg(5.0 if guides(self.step) else 1.0)
            self.step += 1
            return super().predict_noise(x, timestep, model_options, seed)

    guider = Stepwise(model)
    guider.step = 0
    return guider
