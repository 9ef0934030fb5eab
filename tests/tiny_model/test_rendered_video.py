"""The renderer's world is solid: what is nearer hides, throws shadows, and moves more."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import procedural_video as video
import rendered_video as world
from rendered_video import Scene, Thing

ROWS, COLUMNS = 60, 80
RED = Thing("ball", "red", "large", "", "standing", 0.4, 0.0, -0.6, 0.0)
BLUE = replace(RED, colour="blue", kind="box", radius=0.5, z=1.5)
BARE = Scene((RED,), (), "clouds", "grey", "", 2, 1.2, 0.3)


def painted(scene: Scene, frames: int = 1, columns: int = COLUMNS) -> torch.Tensor:
    """[3, F, Y, X]"""
    return world.render([scene], frames, ROWS, columns)[0]


def like(clip: torch.Tensor, colour: str) -> torch.Tensor:
    """[F, Y, X] bool: pixels of a colour's hue, whatever light falls on them."""
    wanted = torch.tensor(video.COLOURS[colour])[:, None, None, None]
    unit = clip / clip.norm(dim=0).clamp(min=1e-6)
    return (unit * wanted / wanted.norm()).sum(0) > 0.97


def middle(mask: torch.Tensor) -> torch.Tensor:
    """[F]: the mean column of each frame's pixels."""
    columns = torch.arange(mask.shape[-1]).float()
    return (mask * columns).sum((1, 2)) / mask.sum((1, 2))


@pytest.mark.parametrize("kind", world.KINDS)
def test_the_nearer_thing_hides_the_farther_one_in_either_order(kind):
    near, far = replace(RED, kind=kind), replace(BLUE, kind=kind)
    alone = like(painted(replace(BARE, things=(near,))), "red")
    for things in ((near, far), (far, near)):
        both = painted(replace(BARE, things=things))
        assert torch.equal(like(both, "red"), alone)
        behind = like(both, "blue")
        assert behind.any() and not (behind & alone).any()
    hidden = like(painted(replace(BARE, things=(far,))), "blue")
    assert (hidden & alone).any(), "the nearer one covers a part of the farther one"


def test_a_thing_throws_a_shadow_to_the_side_that_the_sun_is_not_on():
    empty = painted(replace(BARE, things=()))
    for sun in (1.2, -1.2):
        clip = painted(replace(BARE, sun=sun))
        floor = ~like(clip, "red")
        darker = (clip.sum(0) < 0.75 * empty.sum(0)) & floor
        assert int(darker.sum()) > 10
        side = middle(darker) - middle(like(clip, "red"))
        assert float(side) * sun < -3, "the sun at the right throws it to the left"
    grey = empty[:, 0, ROWS - 1].mean() / clip[:, 0, ROWS - 1].mean()
    assert float(grey) == pytest.approx(1, abs=0.01), "elsewhere the floor is as before"


def test_what_is_nearer_moves_more_under_a_moving_camera():
    things = (replace(RED, x=-0.5), replace(BLUE, kind="ball", radius=0.4, x=0.9))
    clip = painted(replace(BARE, things=things, camera="moving right"), 9)
    near, far = (middle(like(clip, colour)) for colour in ("red", "blue"))
    moved = near[0] - near[-1], far[0] - far[-1]
    assert moved[0] > moved[1] > 1, "both to the left"
    # by the depths of their centres, as a pinhole camera has it
    c, s = torch.tensor(world.PITCH).cos(), torch.tensor(world.PITCH).sin()
    depths = [c * (world.BACK + t.z) + s * (world.HEIGHT - t.half[1]) for t in things]
    assert float(moved[0] / moved[1]) == pytest.approx(float(depths[1] / depths[0]), rel=0.15)


@pytest.mark.parametrize(
    ("move", "grows", "goes"),
    [
        ("moving left", 0, -1),
        ("moving right", 0, 1),
        ("coming nearer", 1, 0),
        ("going away", -1, 0),
    ],
)
def test_things_move_as_the_sentence_says(move, grows, goes):
    clip = like(painted(replace(BARE, things=(replace(RED, z=0.3, move=move),)), 12), "red")
    area, place = clip.sum((1, 2)).float(), middle(clip)
    assert float(area[-1] / area[0] - 1) * grows >= 0.1 * abs(grows)
    assert float(place[-1] - place[0]) * goes >= 3 * abs(goes)


def test_the_floor_is_finer_with_distance():
    scene = replace(BARE, things=(), floor="stripes")
    rows = painted(scene, columns=240).mean(0)[0]
    edges = [int((row > row.mean()).int().diff().abs().sum()) for row in (rows[30], rows[-1])]
    assert edges[0] > 1.5 * edges[1] > 2


def test_scenes_are_those_of_their_seed_and_stay_in_view():
    scenes = [world.random_scene(random.Random(i), 32, 1.3) for i in range(24)]
    assert scenes == [world.random_scene(random.Random(i), 32, 1.3) for i in range(24)]
    assert len(set(map(world.prompt, scenes))) > 20
    rows = world.parameters(scenes)
    first = world.paint(rows[:1], 2, 24, 32)
    assert torch.equal(first, world.paint(rows[:1], 2, 24, 32))
    assert first.shape == (1, 3, 2, 24, 32) and first.min() >= 0 and first.max() <= 1
    for scene in scenes[:4]:
        ends = world.parameters([replace(scene, posts=())])
        # the ends of a clip of 32 frames, as two frames that lie 31 apart
        ends[:, 9:12] *= 31
        for start in (12, 12 + world.PRIMITIVE):
            ends[:, start + 8 : start + 10] *= 31
        clip = world.paint(ends, 2, 48, 62)[0]
        without = world.paint(world.parameters([replace(scene, things=(), posts=())]), 1, 48, 62)[0]
        if not scene.camera:
            assert ((clip - without).abs().amax(0) > 0.1).sum((1, 2)).min() > 8


def test_scenes_are_painted_together_as_alone(monkeypatch):
    rows = world.parameters([world.random_scene(random.Random(i), 4, 1.3) for i in range(3)])
    together = world.paint(rows, 2, 24, 32)
    monkeypatch.setattr(world, "MOST_RAYS", 1)
    torch.testing.assert_close(world.paint(rows, 2, 24, 32), together)


def test_sentences_say_what_is_there_in_words_that_are_told_apart():
    things = (replace(RED, texture="striped", move="coming nearer"), BLUE)
    scene = replace(BARE, things=things, posts=((0.0, 4.0, 0.6),), camera="turning left")
    text = world.prompt(scene)
    assert text == (
        "a large striped red ball coming nearer and a large blue box standing "
        "over grey clouds with posts camera turning left"
    )
    clauses = dict(video.words_of(text))
    assert (clauses["red"], clauses["blue"], clauses["posts"]) == (0, 1, 2)
    longest = max(
        (world.prompt(world.random_scene(random.Random(i), 32, 1.3)) for i in range(300)), key=len
    )
    assert len(longest.split()) <= video.TEXT_TOKENS


def test_latents_of_the_rendered_world_are_about_as_large_as_the_models_expect():
    scenes = [world.random_scene(random.Random(i), 4, 1.3) for i in range(6)]
    latent = video.encode(world.render(scenes, 4, 40, 52))
    assert abs(float(latent.mean())) < 0.4 and 0.4 < float(latent[:, (0, 8, 12)].std()) < 1.6


def test_a_training_draws_it_with_its_text():
    import train

    args = train.parser().parse_args(["--out", ".", "--world", "rendered", "--rich"])
    stage = train.Stage(2, 12, 16, 2, 1.0, 3.0)
    latent, text = next(train.batches(args, stage, torch.device("cpu"), workers=0))
    assert latent.shape == (2, 16, 2, 12, 16) and text.shape == (2, video.TEXT_TOKENS, 64)
    rng = random.Random(f"{args.seed} 2 0")
    scene = world.random_scene(rng, 4, 16 / 12)
    expected = video.encode(world.render([scene], 4, 24, 32))
    torch.testing.assert_close(latent[:1], expected)
