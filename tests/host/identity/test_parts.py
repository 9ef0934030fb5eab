"""No mask ever meets another part of the video."""

import random

import pytest
import torch

from sparse_attn.host.sampling import UNNAMED
from tests.host.host_fixtures import (
    VIDEO,
    assert_same_video,
    calls,
    conditioning,
    kept_dense,
    sample,
    sparse,
)
from tests.host.identity.truth import WIDE, guided, in_every_call


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


@pytest.mark.parametrize("change", ["names", "frames"])
def test_calls_of_more_videos_or_tokens_have_patterns_of_their_own(load, truth, change):
    """Every step calls once more, with one name for two prompts, or two frames behind the video."""
    pictures = torch.randn(1, 16, 2, 16, 24)

    def outside(apply_model, args):
        x, sigma, c = args["input"], args["timestep"], args["c"]
        truth.here.part = "changed"
        frames = {"time_dim_concat": pictures.expand(len(x), -1, -1, -1, -1)}
        apply_model(x, sigma, **{**c, **(frames if change == "frames" else {})})
        truth.here.part = "plain"
        return apply_model(x, sigma, **c)

    def inside(execute, x, t, c_concat, c_crossattn, control, options, **more):
        if change == "names" and truth.here.part == "changed":
            first = {name: options[name][:1] for name in ("uuids", "cond_or_uncond")}
            options = {**options, **first}
        return execute(x, t, c_concat, c_crossattn, control, options, **more)

    model, handle = sparse(load("wan_h64"))
    model = model.clone()
    model.set_model_unet_function_wrapper(outside)
    in_every_call(model, inside)
    sample(model, texts=(7, 7))
    assert truth.holds()
    # of two layers: two prompts, and once more the pair or each of them
    assert len(truth.met) == 2 * (3 if change == "names" else 4)
    assert calls(handle) == {"search": 8, "sparse": 24}
    assert not handle.latest().warnings
