"""No mask ever meets another layer's q, another part's of the video, or another sampling's."""

import importlib
import random
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparse_attn.host.model_call import ONE_GRAPH, UNKNOWN_LAYER
from sparse_attn.host.override import attention_override
from sparse_attn.host.sampling import UNNAMED
from sparse_attn.run.state import IN_VAIN, LET_GO, RunState
from tests.host.family_cases import CASES
from tests.host.family_models import build
from tests.host.host_fixtures import (
    VIDEO,
    assert_same_video,
    calls,
    conditioning,
    kept_dense,
    sample,
    sparse,
)
from tests.host.test_families import sample as sample_case

# a case of every model
ONE_EACH = {case.model: name for name, case in reversed(CASES.items())}


class Truth:
    """Where this thread really is, noted by hooks of the test, against what each call's key says."""

    def __init__(self, monkeypatch):
        self.here = threading.local()
        self.met = defaultdict(set)
        self.layers = defaultdict(set)
        attend = RunState.attend

        def noted(run, call):
            if call.key is not None:
                where = self.inside(), getattr(self.here, "part", None)
                self.met[id(run), call.key].add((*where, threading.get_ident()))
                self.layers[self.inside()].add(call.layer)
            return attend(run, call)

        monkeypatch.setattr(RunState, "attend", noted)

    def inside(self):
        stack = getattr(self.here, "stack", None)
        return stack[-1] if stack else None

    def watch(self, block, number):
        def enter(module, inputs):
            self.here.stack = [*getattr(self.here, "stack", []), number]

        def leave(module, inputs, outputs):
            self.here.stack = self.here.stack[:-1]

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave, always_call=True)

    def holds(self):
        return bool(self.met) and all(len(places) == 1 for places in self.met.values())


@pytest.fixture
def truth(monkeypatch):
    return Truth(monkeypatch)


LISTS = (
    "blocks", "transformer_blocks", "double_blocks", "single_blocks", "visual_transformer_blocks",
    "vace_blocks",
)  # fmt: skip


def lists_of(model):
    """The lists of blocks of a diffusion model, by the attribute that holds each."""
    found = {name: getattr(model, name) for name in LISTS if hasattr(model, name)}
    return {
        name: list(blocks.values() if hasattr(blocks, "values") else blocks)
        for name, blocks in found.items()
    }


def in_every_call(patcher, wrapper):
    """Add a wrapper of every call of the model, inside ours."""
    import comfy.patcher_extension

    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    patcher.add_wrapper_with_key(kind, "a test", wrapper)


# ---- blocks that are skipped, repeated, moved and left out


def answered_elsewhere(override, left_out, truth):
    """An override that answers the video's self-attention of some blocks without asking ours."""

    def answer(func, q, k, v, heads, *args, **kwargs):
        if q.shape != k.shape or truth.inside() not in left_out:
            return override(func, q, k, v, heads, *args, **kwargs)
        if kwargs.get("skip_output_reshape") or not kwargs.get("skip_reshape"):
            return v
        return v.transpose(1, 2).flatten(2)

    return answer


def disturb(patcher, truth, seed):
    """Let every call of the model skip, repeat, move and leave out blocks at random."""
    draw = random.Random(seed)
    model = patcher.model.diffusion_model
    numbers, count = {}, 0
    for name, blocks in lists_of(model).items():
        for block in blocks:
            numbers[block] = name, count
            truth.watch(block, numbers[block])
            count += 1

    def twice(block):
        forward = block.forward

        def repeated(*args, **kwargs):
            forward(*args, **kwargs)
            return forward(*args, **kwargs)

        return repeated

    def wrapper(executor, x, t, c_concat, c_crossattn, control, options, **inputs):
        left_out = {number for number in numbers.values() if draw.random() < 0.2}
        options = {**options}
        key = "optimized_attention_override"
        options[key] = answered_elsewhere(options[key], left_out, truth)
        repeated = [block for block in numbers if draw.random() < 0.2]
        for block in repeated:
            block.forward = twice(block)
        moved = {}
        for name in lists_of(model):
            blocks = getattr(model, name)
            # what else reads these lists would not bear it
            movable = name in ("transformer_blocks", "blocks") and not hasattr(blocks, "values")
            if movable and not hasattr(model, "vace_blocks") and draw.random() < 0.5:
                moved[name] = blocks
                some = draw.sample(list(blocks), draw.randint(1, len(blocks)))
                setattr(model, name, torch.nn.ModuleList(some))
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **inputs)
        finally:
            for name, blocks in moved.items():
                setattr(model, name, blocks)
            for block in repeated:
                del block.forward

    in_every_call(patcher, wrapper)
    return numbers


@pytest.mark.parametrize("name", ONE_EACH)
def test_whatever_a_pass_does_no_state_meets_another_blocks_call(comfyui, truth, name):
    case = CASES[ONE_EACH[name]]
    for seed in range(3):
        # a model of its own: hooks and lists are changed
        model, handle = sparse(build(name), search_points=(0.5,))
        numbers = disturb(model, truth, seed)
        out = sample_case(model, case, steps=6)
        assert torch.isfinite(out).all()
    assert truth.holds()
    # without several blocks in sight nothing would be proved
    assert len({where for places in truth.met.values() for where, *_ in places}) > 1
    assert None not in {where for places in truth.met.values() for where, *_ in places}
    own = {number: set(layers) for number, layers in truth.layers.items()}
    assert all(own.values()) and len(own) <= len(numbers)
    assert UNKNOWN_LAYER not in kept_dense(handle)


def compile_model(model, part, **options):
    """Compile a model with ComfyUI's own helper, whole or block by block."""
    helpers = pytest.importorskip("comfy_api.torch_helpers")
    torch.compiler.reset()
    if part == "blocks":
        diffusion = model.model.diffusion_model
        options["keys"] = [
            f"diffusion_model.{list_name}.{key}"
            for list_name in lists_of(diffusion)
            for key in dict(getattr(diffusion, list_name).named_children())
        ]
    helpers.set_torch_compile_wrapper(model=model, backend="eager", **options)


# those that publish their blocks' numbers run sparse in one graph too
COMPILED = {
    "whole": ("wan", "ltxv", "cosmos", "mochi", "minimax", "vace", "hunyuan"),
    "whole as one graph": ("wan", "vace"),
    "blocks": ("wan", "ltxv", "cosmos", "mochi", "minimax", "vace", "hunyuan"),
    "blocks as one graph each": ("ltxv", "hunyuan"),
}


@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for part, names in COMPILED.items() for name in names]
)
def test_a_compiled_model_tells_its_layers(comfyui, monkeypatch, name, part):
    case = CASES[ONE_EACH[name]]
    seen = []
    attend = RunState.attend

    def noted(run, call):
        seen.append(call.layer)
        return attend(run, call)

    monkeypatch.setattr(RunState, "attend", noted)
    model, _ = sparse(build(name), sparsity=0.0)
    expected = sample_case(model, case)
    layers = list(seen)
    seen.clear()
    model, handle = sparse(build(name), sparsity=0.0)
    compile_model(model, part.split()[0], fullgraph="one graph" in part)
    assert_same_video(sample_case(model, case), expected)
    torch.compiler.reset()
    assert seen == layers and len(set(seen)) > 1
    assert UNKNOWN_LAYER not in kept_dense(handle)


def test_a_graph_that_does_not_tell_its_layers_runs_dense_and_says_so_at_once(comfyui, monkeypatch):
    from sparse_attn.host import status

    said = []
    monkeypatch.setattr(status, "send", lambda node, run, text, step, done: said.append(text))
    case = CASES[ONE_EACH["ltxv"]]
    expected = sample_case(build("ltxv"), case)
    model, handle = sparse(build("ltxv"))
    compile_model(model, "whole", fullgraph=True)
    assert_same_video(sample_case(model, case), expected, 1e-6)
    torch.compiler.reset()
    assert kept_dense(handle)[ONE_GRAPH] == 4 and not calls(handle)
    assert said[0][-1] == f"Everything will run dense: {ONE_GRAPH}."


def test_two_copies_of_the_pack_have_operators_of_their_own(comfyui):
    """ComfyUI loads a pack by its path, and a folder may lie there twice."""
    from sparse_attn.host import override
    from tests.tools import comfy_inprocess

    pack = comfy_inprocess.load_pack()
    other = importlib.import_module(f"{pack.__name__}.sparse_attn.host.override")
    assert other is not override and other._operator._qualname != override._operator._qualname


def test_a_compiled_graph_without_a_run_calls_the_hosts_attention():
    """Its operator outlives the run that it was traced in."""
    torch.compiler.reset()

    def attention(q, k, v, heads, mask=None, scale=None, skip_output_reshape=False, **kwargs):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale
        )  # fmt: skip
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def block(q, k, v, mask, **kwargs):
        return attention_override(attention, q * 2, k, v, 2, mask, **kwargs) + 1

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    q, k, v = torch.randn(3, 2, 8, 16).unbind(0)
    mask = torch.randn(2, 1, 1, 8)
    for more in ({}, {"scale": 0.5}, {"skip_output_reshape": True}):
        assert_same_video(compiled(q, k, v, mask, **more), block(q, k, v, mask, **more), 1e-5)
    # the operator has no gradients, and the host's attention has
    leaf = v.clone().requires_grad_()
    compiled(q, k, leaf, mask).sum().backward()
    assert leaf.grad is not None and leaf.grad.norm() > 0
    torch.compiler.reset()


def test_an_operator_returns_none_of_its_inputs():
    """As an override that skips the attention of a block does."""
    torch.compiler.reset()

    def skipped(q, k, v, heads, **kwargs):
        return v

    compiled = torch.compile(
        lambda v: attention_override(skipped, v, v, v, 2), backend="aot_eager", fullgraph=True
    )
    v = torch.randn(1, 8, 16)
    out = compiled(v)
    torch.compiler.reset()
    assert torch.equal(out, v) and out.data_ptr() != v.data_ptr()


def test_a_call_from_nowhere_runs_dense_and_says_so(comfyui, monkeypatch):
    """As where a node runs the attention of a block in a thread of its own."""
    from sparse_attn.host import override

    case = CASES["ltx"]
    expected = sample_case(build("ltxv"), case)

    def elsewhere(wanted):
        def wrapper(executor, x, t, c_concat, c_crossattn, control, options, **inputs):
            ours, key = options["optimized_attention_override"], "optimized_attention_override"

            def threaded(*args, **kwargs):
                with ThreadPoolExecutor(1) as pool:
                    return pool.submit(ours, *args, **kwargs).result()

            return executor(
                x, t, c_concat, c_crossattn, control, {**options, key: threaded}, **inputs
            )

        return wrapper

    assert override.attention_override
    model, handle = sparse(build("ltxv"), sparsity=0.9)
    in_every_call(model, elsewhere(model))
    assert_same_video(sample_case(model, case), expected, 1e-6)
    assert calls(handle) == {}
    assert kept_dense(handle)[UNKNOWN_LAYER] == 2 * 2


# ---- parts of the video

WIDE = (1, 16, 3, 16, 96)


def tiled(model, truth, cut, draw=None):
    """A model whose input another node's wrapper cuts into four tiles, in any order.

    Args:
        cut: cut(tile) -> what the model gets.
    """
    model = model.clone()

    def wrapper(apply_model, args):
        whole = args["input"]
        out = torch.zeros_like(whole)
        order = list(range(4))
        if draw is not None:
            draw.shuffle(order)
        for number in order:
            place = slice(24 * number, 24 * number + 24)
            truth.here.part = number
            out[..., place] = apply_model(cut(whole[..., place]), args["timestep"], **args["c"])
        truth.here.part = None
        return out

    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("texts", [(7, 7), (7, 9)], ids=["batched", "split"])
def test_every_tile_has_patterns_of_its_own(load, truth, order, texts):
    draw = random.Random(1)
    if order == "after":
        model, handle = sparse(load("wan_h64"))
        model = tiled(model, truth, lambda tile: tile, draw)
    else:
        model, handle = sparse(tiled(load("wan_h64"), truth, lambda tile: tile, draw))
    out = sample(model, WIDE, texts=texts)
    assert torch.isfinite(out).all()
    assert truth.holds()
    # four tiles, two layers, two prompts
    assert len(truth.met) == 16
    assert calls(handle) == {"search": 16, "sparse": 48}
    assert any(" in 4 parts of the video, " in line for line in handle.latest().lines())


PIECES = {
    "copies": lambda tile: tile.clone(),
    "of other strides": lambda tile: tile.transpose(3, 4).contiguous().transpose(3, 4),
    "padded": lambda tile: torch.nn.functional.pad(tile, (0, 2))[..., :24],
}


@pytest.mark.parametrize("cut", PIECES)
def test_tiles_whose_place_nobody_knows_run_dense_and_say_so(load, truth, cut):
    dense = sample(tiled(load("wan_h64"), truth, PIECES[cut]), WIDE)
    model, handle = sparse(load("wan_h64"))
    out = sample(tiled(model, truth, PIECES[cut], random.Random(1)), WIDE)
    assert_same_video(out, dense, 1e-6)
    reason = "a part of the video (3x16x24 of 3x16x96) whose place is not known"
    # four steps and tiles, two prompts and layers
    assert kept_dense(handle)[reason] == 64 and calls(handle) == {}


def test_tiles_of_a_guider_run_dense_and_say_so(load):
    """They come as copies, in a call of the host for each."""
    import comfy.samplers

    class Tiles(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            return torch.cat(
                [
                    super(Tiles, self).predict_noise(tile, timestep, model_options, seed)
                    for tile in x.chunk(4, -1)
                ],
                -1,
            )

    model, handle = sparse(load("wan_h64"))
    guided(Tiles(model))
    assert calls(handle) == {}
    assert any("whose place is not known" in reason for reason in kept_dense(handle))


def guided(guider, shape=WIDE, steps=4):
    import comfy.samplers

    guider.set_conds(conditioning(7, 0), conditioning(9, 1))
    guider.set_cfg(5.0)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    sampler = comfy.samplers.sampler_object("euler")
    with torch.no_grad():
        return guider.sample(noise, torch.zeros(shape), sampler, sigmas, disable_pbar=True, seed=1)


def test_rows_of_one_prompt_with_the_names_of_two_run_dense(load):
    """A wrapper that takes the prompts apart, and leaves what the host says of them as it was."""

    def apart(model):
        def wrapper(apply_model, args):
            rows = range(len(args["input"]))
            parts = [
                apply_model(args["input"][i : i + 1], args["timestep"][i : i + 1], **each(args, i))
                for i in rows
            ]
            return torch.cat(parts)

        def each(args, i):
            return {**args["c"], "c_crossattn": args["c"]["c_crossattn"][i : i + 1]}

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return model

    expected = sample(apart(load("wan_h64")), texts=(7, 7))
    model, handle = sparse(load("wan_h64"))
    assert_same_video(sample(apart(model), texts=(7, 7)), expected, 1e-6)
    assert kept_dense(handle)[UNNAMED] == 16 and calls(handle) == {}


@pytest.mark.parametrize("length", [7, 9], ids=["batched", "split"])
def test_areas_of_prompts_are_parts_of_the_video(load, truth, length):
    import comfy.sample

    areas = [(16, 16, 0, 0), (16, 16, 0, 8)]
    texts = [part for i, area in enumerate(areas) for part in conditioning(7, i, area=area)]

    def run(model):
        noise = torch.randn(VIDEO, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return comfy.sample.sample(
                model, noise, 4, 5.0, "euler", "simple", texts, conditioning(length, 5),
                torch.zeros(VIDEO), disable_pbar=True, seed=1,
            )  # fmt: skip

    expected = run(load("wan_h64"))
    model, handle = sparse(load("wan_h64"), sparsity=0.0)
    assert_same_video(run(model), expected)
    # two layers; two areas of each prompt, and the negative one for all
    assert calls(handle) == {"search": 10, "sparse": 30}
    assert handle.latest().memory.parts == {("area", 3, 16, 16)}
    assert len(handle.latest().memory.conditionings) == 5
    assert len({key[1] for _, key in truth.met}) == 3


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
    leave = RunState._let_go

    def noted(run):
        leave(run)
        found.append(sum(layer.pattern is not None for layer in run.layers.values()))

    monkeypatch.setattr(RunState, "_let_go", noted)
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
