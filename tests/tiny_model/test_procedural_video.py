import asyncio
import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

TINY = Path(__file__).resolve().parent
sys.path.insert(0, str(TINY))

import check_model  # noqa: E402
import networks  # noqa: E402
import procedural_video as video  # noqa: E402
import train  # noqa: E402
import training_data  # noqa: E402

WEIGHTS = TINY / "tiny_wan.safetensors.xz"
RED = [-1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -1.0]


def scenes(count, seed=0, things=None, rich=False):
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = video.random_scene(rng, frames=32, aspect=1.3, rich=rich)
        found += [scene] if things in (None, len(scene.things)) else []
    return found


def test_every_latent_is_recovered_exactly_from_its_video():
    latent = torch.randn(2, 16, 3, 4, 6, dtype=torch.float64)
    pixels = video.decode(latent)
    assert pixels.shape == (2, 3, 6, 8, 12)
    assert torch.allclose(video.encode(pixels), latent, atol=1e-12)


def test_a_video_loses_only_fine_colour():
    frames = video.render(scenes(8), 8, 80, 104)
    again = video.decode(video.encode(frames))
    assert check_model.psnr(again, frames) > 34
    brightness = (again - frames).sum(1)
    assert brightness.abs().max() < 1e-5


def test_training_latents_are_of_the_size_of_the_noise():
    latent = video.encode(video.render(scenes(64), 8, 40, 52))
    deviation = latent.std((0, 2, 3, 4))
    assert 0.5 < deviation.max() < 1.5 and deviation.min() > 0.02
    assert latent.mean((0, 2, 3, 4)).abs().max() < 0.3


@pytest.mark.parametrize("rich", [False, True])
def test_rendered_scenes_read_back(rich):
    """The detector must be right on perfect videos, or it cannot judge a model's."""
    right = 0
    chosen = scenes(16, things=1, rich=rich)
    for scene, clip in zip(chosen, video.render(chosen, 32, 80, 104), strict=True):
        thing, found = scene.things[0], video.describe(clip)[0]
        keys = ("colour", "shape", "direction", "speed")
        right += all(found[key] == getattr(thing, key) for key in keys)
    assert right >= 15


def test_an_empty_background_holds_nothing():
    clip = torch.full((3, 8, 40, 52), 0.2)
    assert video.describe(clip) == []


def test_a_thing_moves_the_way_its_sentence_says():
    base = scenes(1, things=1)[0]
    for direction, (dx, dy) in video.DIRECTIONS.items():
        thing = video.replace(base.things[0], direction=direction, x=0.65, y=0.5, speed="quickly")
        scene = video.replace(base, things=(thing,), pattern="plain", pan="")
        clip = video.render([scene], 8, 80, 104)[0]
        moved = (clip - clip[:, :1, :1, :1]).abs().sum(0) > 0.3
        y, x = (torch.nonzero(m).float().mean(0) for m in (moved[0], moved[-1]))
        drift = (x - y) / 80
        expected = torch.tensor([dy, dx]) * video.SPEEDS["quickly"] * 7
        assert torch.allclose(drift, expected, atol=0.02), direction


def moved(scene, frames=8):
    """How far each pixel's brightness changes over the clip."""
    clip = video.render([scene], frames, 80, 104)[0].sum(0)
    return (clip - clip[:1]).abs().amax(0)


def test_the_front_thing_hides_the_one_behind():
    first, second = (
        video.replace(scenes(1, things=1)[0].things[0], colour=c, shape="square", x=0.65, y=0.5)
        for c in ("red", "blue")
    )
    scene = video.replace(scenes(1)[0], things=(first, second), pattern="plain", pan="")
    middle = video.render([scene], 1, 80, 104)[0, :, 0, 40, 52]
    assert torch.allclose(middle, torch.tensor(video.COLOURS["red"]))


@pytest.mark.parametrize("texture", video.TEXTURES)
def test_a_texture_moves_and_turns_with_its_thing(texture):
    """Seen from the thing nothing changes: frames differ by a shift only."""
    thing = video.replace(
        scenes(1, things=1)[0].things[0], texture=texture, shape="circle", size="large", radius=0.2,
        direction="right", speed="quickly", x=0.65, y=0.5,
    )  # fmt: skip
    # 0.023 frame heights a frame are 23 pixels of a frame of 1,000
    clip = video.render(
        [video.replace(scenes(1)[0], things=(thing,), pattern="plain", pan="")], 3, 1000, 1300
    )[0]
    assert torch.allclose(clip[:, 0, :, :-46], clip[:, 2, :, 46:], atol=1e-3)
    dark = clip[0, 0, 300:700, 450:850] < 0.5 * clip[0, 0].max()
    assert bool(texture) == (dark.float().mean() > 0.3)


@pytest.mark.parametrize("pan, shift", [("left", (0, 1)), ("up", (1, 0))])
def test_clouds_pan_with_the_camera(pan, shift):
    thing = video.replace(scenes(1)[0].things[0], x=9.0, y=9.0)
    scene = video.replace(scenes(1)[0], things=(thing,), pattern="clouds", pan=pan)
    # 0.012 frame heights a frame are 12 pixels of a frame of 1,000
    before, after = video.render([scene], 2, 1000, 1000)[0].unbind(1)
    down, right = (12 * s for s in shift)
    assert torch.allclose(
        before[:, : 1000 - down, : 1000 - right], after[:, down:, right:], atol=1e-3
    )
    assert moved(video.replace(scene, pan="")).max() == 0


def test_the_tiny_models_world_knows_no_textures():
    words = {w for s in scenes(200) for w in video.prompt(s).split()}
    assert not words & {"striped", "dotted", "clouds"}
    rich = {w for s in scenes(200, rich=True) for w in video.prompt(s).split()}
    assert {"striped", "dotted", "clouds"} <= rich


def test_words_are_the_same_on_every_machine():
    """The weights were trained on these signs; a change makes the model deaf."""
    embedding = video.embed_prompt("a large red star")
    assert embedding.shape == (video.TEXT_TOKENS, video.TEXT_DIM)
    assert embedding[2, :8].tolist() == RED
    assert embedding[4:].eq(0).all() and video.embed_prompt("").eq(0).all()


def test_no_two_words_share_a_vector():
    words = {w for scene in scenes(400, rich=True) for w in video.words_of(video.prompt(scene))}
    vectors = {tuple(video.word_vector(*w)) for w in words}
    assert len(vectors) == len(words) > 60


def test_a_colour_belongs_to_its_clause():
    first = video.embed_prompt("a red circle and a blue star")
    second = video.embed_prompt("a blue circle and a red star")
    assert {tuple(r) for r in first.tolist()} != {tuple(r) for r in second.tolist()}


def test_every_sentence_fits():
    assert max(len(video.prompt(s).split()) for s in scenes(400, rich=True)) <= video.TEXT_TOKENS


def test_training_reads_text_as_the_node_does():
    data = training_data.Data(seed=0, rich=False, count=4, frames=32, aspect=1.3)
    prompts = [video.prompt(s) for s in scenes(4)] + [""]
    expected = torch.stack([video.embed_prompt(p) for p in prompts])
    assert torch.equal(data.text(prompts).float(), expected)


@pytest.mark.parametrize(("plain", "expected"), [(0.0, 2 / 3), (0.5, 1 / 3), (1.0, 0.0)])
def test_a_share_of_rich_scenes_is_plain(plain, expected):
    data = training_data.Data(seed=0, rich=True, count=1500, frames=2, aspect=1.3, plain=plain)
    parameters, _ = data.batch(random.Random(1))
    textured = parameters[:, -4].gt(0).float().mean()
    # five standard errors of 1,500 draws
    assert abs(float(textured) - expected) < 0.065


def test_noise_levels_cover_the_schedule():
    sigma = train.draw_sigma(20_000, 6.0, "cpu")
    assert 0 <= sigma.min() < 0.05 and 0.99 < sigma.max() <= 1
    assert 0.75 < sigma.median() < 0.95


def test_stages_have_a_size_a_share_and_a_shift_of_their_own():
    words = [
        "--out",
        "x",
        "--shift",
        "9",
        "--stages",
        "1x40x52x128:0.5:3:0.5,2x40x52x9:0.2:5,5x20x26x4:0.3",
    ]
    images, pairs, clips = train.stages(train.parser().parse_args(words))
    assert images == train.Stage(1, 40, 52, count=128, share=0.5, shift=3.0, plain=0.5)
    assert pairs == train.Stage(2, 40, 52, count=9, share=0.2, shift=5.0)
    assert (clips.shift, clips.tokens) == (9.0, 650)


def test_pooled_text_tells_whose_word_it_is():
    """The same words in other clauses are another vector; padding is none; the scale is kept."""
    prompts = ["a red ring and a blue star", "a blue ring and a red star", "a red ring", ""]
    text = torch.stack([video.embed_prompt(p) for p in prompts])
    found = networks.pooled(text)
    assert found.shape == (4, networks.POOLED_DIM) and not found[3].any()
    assert torch.equal(networks.pooled(text[2, :3]), found[2])
    near, far = (F.cosine_similarity(found[0], found[i], dim=0) for i in (1, 2))
    assert far < near < 0.97
    # a word is signs and a few zeros, words are nearly uncorrelated
    assert found[:3].square().mean(1).min() > 0.5 and found[:3].square().mean(1).max() < 2


def test_muon_steps_are_orthogonal():
    weights = [torch.zeros(32, 48, requires_grad=True), torch.zeros(48, 32, requires_grad=True)]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    train.Muon(weights).step(lr=1.0, weight_decay=0.0)
    for weight in weights:
        spread = torch.linalg.svdvals(weight.detach()) / (0.2 * 48**0.5)
        assert spread.min() > 0.6 and spread.max() < 1.3


def test_block_masses_and_recall_of_a_known_pattern():
    """Keys of one block match queries of the same block, and nothing else."""
    q = torch.zeros(1, 1, 4 * 64, 4)
    q[0, 0, torch.arange(256), torch.arange(256) // 64] = 20.0
    masses = check_model.block_masses(q, q)
    assert torch.allclose(masses[0, 0], 64 * torch.eye(4), atol=1e-3)
    assert torch.equal(check_model.keep_largest(masses, 0.25)[0, 0], torch.eye(4).bool())


def test_weights_are_small_and_carry_their_configuration():
    assert WEIGHTS.stat().st_size <= 8_500_000
    found = networks.header(networks.content(WEIGHTS))
    config = json.loads(found.pop("__metadata__")["config"])["transformer"]
    assert config == {"num_heads": 4, "text_dim": video.TEXT_DIM}
    assert {entry["dtype"] for entry in found.values()} == {"BF16"}


@pytest.fixture(scope="module")
def tiny(comfyui):
    return check_model.load(WEIGHTS, str(comfyui))


def test_the_stock_loader_recognises_it(tiny):
    wan = tiny.model.diffusion_model
    assert type(wan).__name__ == "WanModel"
    assert (wan.num_heads, wan.dim // wan.num_heads, len(wan.blocks)) == (4, 64, 6)
    assert tiny.get_model_object("model_sampling").shift == 8.0


def test_training_and_sampling_agree_on_noise_and_target(tiny):
    """The exact velocity of training gives the video back in ComfyUI's own formulas."""
    sampling = tiny.get_model_object("model_sampling")
    latent, noise = torch.randn(2, 1, 16, 2, 4, 4)
    sigma = torch.tensor([0.7])
    noisy = sampling.noise_scaling(sigma, noise, latent)
    assert torch.allclose(noisy, torch.lerp(latent, noise, 0.7), atol=1e-6)
    assert torch.allclose(sampling.timestep(sigma), 1000 * sigma)
    denoised = sampling.calculate_denoised(sigma, noise - latent, noisy)
    assert torch.allclose(denoised, latent, atol=1e-6)


SMALL = {
    "wan": {"heads": 2, "head_dim": 64, "layers": 2, "ffn": 64},
    "hunyuan": {"heads": 1, "head_dim": 128, "layers": 3, "double": 1},
}


@pytest.mark.parametrize("family", SMALL)
def test_a_trained_model_is_loaded_and_resumed_as_it_was(family, comfyui, tmp_path):
    path = tmp_path / "small.safetensors"
    trainer, args = small_trainer(family, comfyui, tmp_path)
    stage = train.Stage(2, 8, 10, count=2, share=1.0, shift=args.shift)
    batch = next(train.batches(args, stage, "cpu"))
    losses = [float(trainer.step(*batch, 3e-3, stage.shift)) for _ in range(12)]
    assert losses[-1] < losses[0]
    image = train.Stage(1, 8, 10, count=2, share=1.0, shift=3.0)
    assert trainer.step(*next(train.batches(args, image, "cpu")), 3e-3, image.shift).isfinite()
    trainer.save(path, 16)

    model = check_model.load(path, str(comfyui)).model.diffusion_model.float()
    latent, sigma = torch.randn(2, 16, 2, 8, 10), torch.tensor([300.0, 800.0])
    text = torch.stack([video.embed_prompt("a large red star")] * 2)
    inputs = [latent, sigma, text] + [networks.pooled(text)] * (family == "hunyuan")
    args.resume = path
    resumed = train.Trainer(args, torch.device("cpu")).model
    with torch.no_grad():
        found, expected = (m(*inputs, transformer_options={}) for m in (model, resumed))
    assert expected.abs().max() > 0.01
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_large_matrices_are_packed_and_come_back_half_a_step_off_at_most(bits, tmp_path):
    wide = torch.randn(256, 512) * torch.logspace(-2, 1, 256)[:, None]
    wide[7] = 0
    state = {"wide": wide, "small": torch.randn(8), "thin": torch.randn(2, 64)}
    path = tmp_path / "w.safetensors"
    networks.save(state, path, {"config": "{}"}, bits)
    assert path.stat().st_size < wide.numel() * (bits + 0.25) / 8 + 2000
    found, metadata = networks.read(path)
    assert metadata == {"config": "{}"} and found.keys() == state.keys()
    groups = wide.unflatten(1, (-1, 64))
    step = (
        (groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).expand_as(groups).flatten(1)
    )
    error = (found["wide"].float() - wide).abs()
    # a scale is float16 and a weight bf16
    assert (error <= 0.505 * step + 0.005 * wide.abs()).all()
    assert (error > 0.2 * step).float().mean() > 0.3, "no other bits than were asked for"
    assert torch.equal(found["small"], state["small"].bfloat16())


@pytest.mark.parametrize("name", ["w.safetensors", "w.safetensors.xz"])
def test_what_was_rounded_once_is_stored_without_loss(name, tmp_path):
    state = {"wide": networks.rounded(torch.randn(256, 256), 4)}
    networks.save(state, tmp_path / name, {"config": "{}"}, 4)
    assert (tmp_path / name).read_bytes().startswith(b"\xfd7zXZ") == name.endswith(".xz")
    found, metadata = networks.read(tmp_path / name)
    assert torch.equal(found["wide"], state["wide"].bfloat16()) and metadata == {"config": "{}"}


def small_trainer(family, comfyui, out, **changes):
    args = train.parser().parse_args(["--out", str(out), "--no-compile", "--family", family])
    vars(args).update(SMALL[family], comfyui=str(comfyui), rich=True, workers=0, gate=0.3)
    vars(args).update(changes)
    return train.Trainer(args, torch.device("cpu")), args


def test_a_stage_in_few_bits_computes_with_weights_as_they_will_be_stored(comfyui, tmp_path):
    trainer, args = small_trainer("wan", comfyui, tmp_path, heads=4)
    stage = train.Stage(1, 8, 8, count=2, share=1.0, shift=3.0)
    batch = next(train.batches(args, stage, "cpu"))
    for bits in (16, 4):
        trainer.bits = bits
        assert trainer.step(*batch, 3e-3, stage.shift).isfinite()
        large = [
            (weight, master)
            for weight, master in zip(trainer.weights, trainer.masters, strict=True)
            if networks.is_large(master)
        ]
        assert large
        for weight, master in large:
            assert torch.equal(weight, networks.rounded(master, 4)) == (bits == 4)
    stored, losses = train.fewest_bits(trainer, args, stage)
    assert stored == 16 and losses == {16: losses[16]}
    args.bits = 4
    stored, losses = train.fewest_bits(trainer, args, stage)
    assert list(losses) == [16, 8, 6, 5, 4]
    assert stored == min(bits for bits, loss in losses.items() if loss <= 1.01 * losses[16])


def test_a_short_small_run_shows_the_colours_and_the_directions(tiny):
    prompts = ["a large yellow circle moving right quickly over plain navy",
               "a large red circle moving left quickly over plain forest"]  # fmt: skip
    frames = video.decode(check_model.generate(tiny, prompts, (8, 20, 26), steps=8, seed=3))
    found = [video.describe(clip)[0] for clip in frames]
    assert [f["colour"] for f in found] == ["yellow", "red"]
    assert [f["direction"] for f in found] == ["right", "left"]


@pytest.fixture(scope="module")
def nodes(comfyui):
    """The nodes as ComfyUI loads them: the folder is a package under a name of its own."""
    spec = importlib.util.spec_from_file_location("tiny_model_nodes", TINY / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    spec.loader.exec_module(package)
    extension = asyncio.run(package.comfy_entrypoint())
    return {n.GET_SCHEMA().node_id: n for n in asyncio.run(extension.get_node_list())}


def test_prompt_node_gives_what_training_used(nodes):
    (((embedding, _),),) = nodes["AdaSpaTinyPrompt"].execute(text="a small blue ring").args
    assert torch.equal(embedding[0], video.embed_prompt("a small blue ring"))


def test_decode_node_undoes_the_latent_format(nodes):
    """Latents leave the sampler with Wan21's mean and deviation; the node takes them off."""
    import comfy.latent_formats

    clip = video.render(scenes(1), 8, 40, 52)
    latent = comfy.latent_formats.Wan21().process_out(video.encode(clip))
    (frames,) = nodes["AdaSpaTinyDecode"].execute(samples={"samples": latent}, scale=1).args
    assert frames.shape == (8, 40, 52, 3)
    assert check_model.psnr(frames.movedim(-1, 0), clip[0]) > 34
    (large,) = nodes["AdaSpaTinyDecode"].execute(samples={"samples": latent}, scale=4).args
    assert large.shape == (8, 160, 208, 3) and large.min() >= 0 and large.max() <= 1
