"""The lab's models: where they lie, how their tokens are laid out, whose attention they take.

    spec = MODELS["joint"]
    model = load(spec, comfyui)
    attention = override(spec, attend)
    latent = check_model.generate(model, [prompt], spec.latent, steps, seed, attention)
    frames = video.decode(latent)

`attend(layer, q, k, v)` is called for every self-attention over the video, with [B, H, L, D], and
returns [B, H, L, D], or None where the host shall attend.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "tiny_model"
WEIGHTS = ROOT / "tests" / "lab" / "weights"
sys.path[:0] = [str(path) for path in (ROOT, TINY) if str(path) not in sys.path]

import check_model  # noqa: E402
import procedural_video as video  # noqa: E402
import rendered_video  # noqa: E402

from sparse_attn.token_layout import TokenLayout  # noqa: E402
from tests.tools import comfy_inprocess  # noqa: E402

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class LabModel:
    """One trained model.

    Args:
        latent: (T, H, W) of the latents it is sampled at, which it was trained at last.
        text: tokens of text in every self-attention call, in front of the video; 0 where the model
            reads text by cross-attention.
        double: layers of the first block type; only joint models have two types.
        layers: self-attention layers over the video, of all types.
        rich: whether its scenes have textures, see `procedural_video.random_scene`.
        world: the module that draws its scenes.
        recipe: arguments of `tests/tiny_model/train.py` that train it; minutes come on top.
        known: latent frames that are given, of held-out clips of `natural_clips.py`; 0 for a model
            that is told by text what to show.
    """

    name: str
    family: str
    heads: int
    head_dim: int
    layers: int
    latent: tuple[int, int, int]
    text: int = 0
    double: int = 0
    rich: bool = False
    world: ModuleType = video
    recipe: str = ""
    known: int = 0

    @property
    def path(self) -> Path:
        """Of the weights."""
        return (
            TINY / "tiny_wan.safetensors.xz"
            if self.name == "tiny"
            else WEIGHTS / f"{self.name}.safetensors.xz"
        )

    @property
    def layout(self) -> TokenLayout:
        return self.layout_at(self.latent)

    def layout_at(self, latent) -> TokenLayout:
        """`before` is the text; the grid is (T, H / 2, W / 2): patches are 1 x 2 x 2."""
        frames, height, width = latent
        return TokenLayout(self.text, frames, height // 2, width // 2)


# Shapes are learned from single frames, many of them. What a noise level hides goes with the root of
# the number of frames that show the same thing: hence the shifts. Half of the single frames are plain:
# clouds and textures are easy, and drown the shapes.
RECIPE = (
    "--rich --bits 4 --qk-gain 1.3 --gate 0.3 --lr 2.5e-3 --ema 0.995 --workers 5 --scored 32 "
    "--log-every 200 --heads 3 --head-dim 128 "
    "--stages 1x40x{0}x128:0.42:3:0.5,4x40x{0}x24:0.23:6,16x40x{0}x6:0.35:12 --check 16x40x{0}x20 "
)

MODELS = {
    "tiny": LabModel("tiny", "wan", heads=4, head_dim=64, layers=6, latent=(16, 40, 52)),
    "wan128": LabModel(
        "wan128", "wan", heads=3, head_dim=128, layers=6, latent=(16, 40, 56), rich=True,
        recipe=RECIPE.format(56) + "--family wan --layers 6 --ffn 1024",
    ),
    "joint": LabModel(
        "joint", "hunyuan", heads=3, head_dim=128, layers=5, latent=(16, 40, 52), rich=True,
        text=video.TEXT_TOKENS, double=1,
        recipe=RECIPE.format(52) + "--family hunyuan --layers 5 --double 1",
    ),
    # 16,128 tokens; what was asked for cannot be read back
    "solid": LabModel(
        "solid", "wan", heads=3, head_dim=128, layers=6, latent=(16, 56, 72), rich=True,
        world=rendered_video,
        recipe="--rich --world rendered --bits 4 --qk-gain 1.3 --gate 0.3 --lr 2.5e-3 --ema 0.995 "
        "--workers 5 --log-every 200 --heads 3 --head-dim 128 --family wan --layers 6 --ffn 1024 "
        "--stages 1x56x72x64:0.3:3:0.2,4x56x72x16:0.25:6,16x56x72x4:0.45:12 --again 2 "
        "--check 16x56x72x20",
    ),
    # 20,480 tokens; `train_natural.py` trains it
    "natural": LabModel(
        "natural", "wan", heads=3, head_dim=128, layers=7, latent=(20, 64, 64), known=4
    ),
}  # fmt: skip
CLIPS = "python tests/lab/natural_clips.py --out .adaspa/natural/clips.zip"  # what `known` takes


def load(spec: LabModel, comfyui: str):
    """The model as ComfyUI's loader gives it."""
    comfy_inprocess.start(comfyui)
    return check_model.load(spec.path, comfyui)


def override(spec: LabModel, attend: Attend):
    """An `optimized_attention_override` that hands self-attention over the video to `attend`.

    `layer` counts all blocks of the model in the order in which they run. Text comes first in
    the sequence where the model is joint: tokens [0, spec.text) of q, k and v.
    """

    def by_number(layer, q, k, v):
        kind, index = layer
        return attend(index + spec.double * (kind == "single"), q, k, v)

    return check_model.over_video(by_number, spec.text)


def scenes(spec: LabModel, count: int) -> list:
    """The same scenes in every run; `spec.world.prompt(scene)` says what they show."""
    frames, aspect = video.FRAMES_PER_LATENT * spec.latent[0], spec.latent[2] / spec.latent[1]
    return [
        spec.world.random_scene(random.Random(i), frames, aspect, spec.rich) for i in range(count)
    ]
