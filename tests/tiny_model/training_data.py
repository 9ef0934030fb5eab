"""What the small models learn from: batches of procedural video and its text, stage by stage."""

import random
from collections import deque
from dataclasses import dataclass

import procedural_video as video
import rendered_video
import torch

WORLDS = {"shapes": video, "rendered": rendered_video}
POOL = 32  # batches


@dataclass(frozen=True)
class Stage:
    """A part of the training with videos of one size.

    Args:
        frames, height, width: of the latents.
        count: videos per step.
        share: of the whole time.
        shift: of the noise levels.
        plain: share of scenes without textures and clouds where the others have them.
    """

    frames: int
    height: int
    width: int
    count: int
    share: float
    shift: float
    plain: float = 0.0

    @property
    def tokens(self) -> int:
        return self.frames * (self.height // 2) * (self.width // 2)


def stages(args) -> list[Stage]:
    found = []
    for stage in args.stages.split(","):
        size, *rest = stage.split(":")
        share, shift, plain = (*map(float, rest), *(args.shift, 0.0)[len(rest) - 1 :])
        found.append(Stage(*(int(n) for n in size.split("x")), share, shift, plain))
    return found


class Data(torch.utils.data.IterableDataset):
    """Endless batches of scenes and their text, drawn anew each time.

    Args:
        count: scenes per batch.
        frames, aspect: of the video, in pixels.
        plain: share of scenes that are not rich all the same.
        world: whose scenes, a key of `WORLDS`.
    """

    def __init__(
        self, seed: int, rich: bool, count: int, frames: int, aspect: float, plain: float = 0.0,
        world: str = "shapes",
    ):  # fmt: skip
        self.world = WORLDS[world]
        self.seed, self.rich, self.count, self.plain = seed, rich, count, plain
        self.frames, self.aspect = frames, aspect
        self.rows: dict[tuple[str, int], int] = {}
        self.table = torch.zeros(1, video.TEXT_DIM, dtype=torch.int8)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed} {self.count} {worker.id if worker else 0}")
        while True:
            yield self.batch(rng)

    def batch(self, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """What `paint` needs, and text; one prompt in ten is empty."""
        scenes = []
        for _ in range(self.count):
            rich = self.rich and (not self.plain or rng.random() >= self.plain)
            scenes.append(self.world.random_scene(rng, self.frames, self.aspect, rich))
        prompts = [self.world.prompt(s) if rng.random() > 0.1 else "" for s in scenes]
        return self.world.parameters(scenes), self.text(prompts)

    def text(self, prompts: list[str]) -> torch.Tensor:
        """[N, TEXT_TOKENS, TEXT_DIM] int8, the same signs as `embed_prompt`."""
        ids = torch.zeros(len(prompts), video.TEXT_TOKENS, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            for j, word in enumerate(video.words_of(prompt)):
                if word not in self.rows:
                    self.rows[word] = len(self.table)
                    row = torch.tensor([video.word_vector(*word)], dtype=torch.int8)
                    self.table = torch.cat((self.table, row))
                ids[i, j] = self.rows[word]
        return self.table[ids]


def batches(args, stage: Stage, device, seed=None, workers: int | None = None):
    """Endless latents [N, 16, T, H, W] and text of one stage.

    In training `args.again` of the last `POOL` batches follow every new one, where drawing takes as
    long as learning.
    """
    pixels = video.FRAMES_PER_LATENT * stage.frames, 2 * stage.height, 2 * stage.width
    aspect = stage.width / stage.height
    again = 0 if seed else args.again
    seed, workers = seed or args.seed, args.workers if workers is None else workers
    data = Data(seed, args.rich, stage.count, pixels[0], aspect, stage.plain, args.world)
    kept, rng = deque(maxlen=POOL), random.Random(seed)
    for scenes, text in torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers):
        drawn = data.world.paint(scenes.to(device), *pixels)
        kept.append((video.encode(drawn), text.to(device)))
        yield kept[-1]
        yield from (rng.choice(kept) for _ in range(again))
