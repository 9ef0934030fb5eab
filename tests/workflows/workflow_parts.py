"""What the graphs in workflows/ share: notes, prompts, and the nodes at both ends."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.workflows.workflow_builder import Column, Graph, name_of

HUB = "https://huggingface.co/Comfy-Org"
RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"

SEED = 20250301
GROUP_GAP = 100
# left edges of the columns
NOTES, LOADERS, PROMPTS, PATCH, SAMPLER, REPORT, VIDEO = -640, 0, 500, 1020, 1520, 1940, 2780

MIN_TOKENS = 8192
# the values Balanced stands for, then the advanced ones at their defaults
BALANCED = [
    "Balanced", 0.8, "64", 0.12, "0.45", False, "", 0, 1, MIN_TOKENS, "auto", "auto", True, "auto", 0,
    "pooled", "similarity",
]  # fmt: skip

AVOID = (
    "still picture, flicker, blurry, overexposed, washed out, subtitles, watermark, jpeg blocks, "
    "extra fingers, deformed hands, deformed face, fused limbs, crowd in the background"
)
LIVING_PICTURE = (
    "The scene in the picture comes to life: a light breeze moves hair, cloth and leaves, the "
    "light shifts gently, and the camera moves slowly closer."
)
SOUND = " Sound: soft wind, leaves, distant voices."


def every(frames: int) -> Callable[[int], int]:
    """Latent frames of a clip whose VAE joins that many frames, the first one by itself."""
    return lambda length: (length - 1) // frames + 1


BY_FOURS = every(4)


@dataclass(frozen=True)
class Clip:
    """A video's size.

    Args:
        pixels: edge of a token, in pixels.
        latent_frames: latent frames of a number of frames.
        step: the lengths a model takes are this far apart.
        extra: latent frames in front of the video, such as a reference picture.
    """

    width: int
    height: int
    length: int
    pixels: int = 16
    latent_frames: Callable[[int], int] = BY_FOURS
    step: int = 4
    extra: int = 0

    def frames(self, length: int) -> int:
        return self.latent_frames(length) + self.extra

    @property
    def plane(self) -> tuple[int, int]:
        return self.width // self.pixels, self.height // self.pixels

    def tokens(self, length: int) -> int:
        return self.plane[0] * self.plane[1] * self.frames(length)

    def __str__(self) -> str:
        width, height = self.plane
        return (
            f"{self.tokens(self.length):,} tokens ({width} x {height} x {self.frames(self.length)})"
        )

    def begins(self) -> str:
        length = self.length
        while self.tokens(length - self.step) >= MIN_TOKENS and length > self.step:
            length -= self.step
        return (
            f"At {self.width} x {self.height} that is passed from {length} frames on, "
            "and near the limit there is little to gain."
        )


def unwrap(text: str) -> str:
    """One line per paragraph: the note would show a line break as one."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


TWENTY_STEPS = (
    "*Balanced* skips 80 % of the attention pairs. The first steps and the first search, which finds "
    "out what matters, run in full; the sparse steps reuse what it found, until a second search. "
)


def setting(steps: str) -> str:
    return f"{TWENTY_STEPS}Here: steps {steps}. The line on the node says the same during a run."


def note(intro: str, clip: str, chosen: str, change: str = "", plural=False, more: str = "") -> str:
    nodes = "both AdaSpa Attention nodes" if plural else "the AdaSpa Attention node"
    reports = "two AdaSpa Report nodes pass" if plural else "AdaSpa Report node passes"
    draws = "draw" if plural else "draws"
    change = change or (
        "*preset*: Quality if something looks wrong, Fast if all is well. Then length or size."
    )
    return unwrap(
        f"""## What AdaSpa does here

{intro}

**Where it pays.** {clip}

**Setting.** {chosen}

**Change first.** {change}

**Compare.** The seed is fixed. Run once, then open the advanced settings of {nodes}, switch
*enabled* off and run again: same video, every step in full.

{more}

**Report.** The {reports} the video on untouched and {draws} what was kept, by layer
and head.""".replace("\n\n\n\n", "\n\n")
    )


def measured(stack: str) -> str:
    """What was measured of a family's layers, and of a clip that is hardly longer than the limit.

    Args:
        stack: its name in families_h200.json.
    """
    found = json.loads((RESULTS / "families_h200.json").read_text("utf-8"))["stacks"][stack]
    rows = json.loads((RESULTS / "tiny_model_presets_h200.json").read_text("utf-8"))["rows"]
    tiny = next(row for row in rows if row["preset"] == "Balanced")
    dense, sparse = (1000 * tiny[f"{kind}_call_seconds"] for kind in ("dense", "sparse"))
    times = found["seconds"]
    return (
        f"Measured on an {found['hardware']}: {found['layers']} layers of {found['model']} at "
        f"{found['tokens']:,} tokens ({found['video']}) took {times['dense']:.2f} s in a dense step "
        f"and {times['sparse_0.2']:.2f} s in a sparse one. At {tiny['tokens']:,} tokens, with the "
        f"tiny demo model, one attention took {dense:.1f} ms dense and {sparse:.1f} ms sparse. "
        "Where between the two it begins to pay was not measured."
    )


def where(clip: Clip, stack: str, before: str = "") -> str:
    return (
        f"{before or 'This clip has'} {clip}. Attention time grows with the square of that number, "
        "so large and long clips gain most. Below 8,192 tokens the node steps aside and everything "
        f"runs as usual. {clip.begins()} {measured(stack)}"
    )


MEMORY = (
    "**Memory.** Out of memory while sampling: set *cache* of AdaSpa Attention to cpu. Out of "
    "memory while loading: set *weight_dtype* of the model loader to an fp8 type."
)


def notes(graph: Graph, text: str, height: int = 540) -> None:
    """The two notes at the left; the second lists the files of all loaders."""
    lines = ["ComfyUI offers to download what is missing when you open this workflow.", ""]
    for node in graph.every_node():
        for model in node["properties"].get("models", []):
            line = f"- `models/{model['directory']}`: [{model['name']}]({model['url']})"
            if line not in lines:
                lines.append(line)
    column = Column(NOTES, 540)
    graph.add("MarkdownNote", column.next(height), [text], title="AdaSpa in this workflow")
    files = len(lines) - 2
    graph.add("MarkdownNote", column.next(80 + 30 * files), ["\n".join(lines)], title="Model files")


def loader(graph: Graph, kind: str, at, models: list, *values, title=None) -> dict:
    """A loader of files, whose names are its first values."""
    names = [name_of(model) for model in models]
    return graph.add(kind, at, [*names, *values], title=title, models=models)


def prompts(graph: Graph, column: Column, clip: dict, text: str, avoid: str) -> tuple[dict, dict]:
    positive = graph.add(
        "CLIPTextEncode", column.next(200), [text], title="Prompt", clip=(clip, "CLIP")
    )
    negative = graph.add(
        "CLIPTextEncode", column.next(140), [avoid], title="Negative prompt", clip=(clip, "CLIP")
    )
    return positive, negative


def adaspa(graph: Graph, model: tuple, y: int = 0, title: str | None = None) -> dict:
    at = Column(PATCH, 420, y).next(640)
    return graph.add("AdaSpaAttention", at, BALANCED, title=title, model=model)


def report(graph: Graph, at, samples: tuple, patched: dict, title: str | None = None) -> dict:
    return graph.add(
        "AdaSpaReport", at, [0, 0], title=title, samples=samples, adaspa=(patched, "adaspa")
    )


def sampled(graph: Graph, model: dict, conditioning, latent: tuple, shift: float, values) -> dict:
    """AdaSpa, sampling shift, KSampler and report; the report."""
    patched = adaspa(graph, (model, "MODEL"))
    column = Column(SAMPLER, 340)
    shifted = graph.add("ModelSamplingSD3", column.next(70), [shift], model=(patched, "model"))
    sampler = graph.add(
        "KSampler",
        column.next(290),
        [SEED, "fixed", *values, 1],
        model=(shifted, "MODEL"),
        positive=conditioning[0],
        negative=conditioning[1],
        latent_image=latent,
    )
    shown = report(graph, Column(REPORT, 720).next(640), (sampler, "LATENT"), patched)
    graph.group("Sampling", [patched, shifted, sampler, shown])
    return shown


def sampled_with_guider(
    graph: Graph, guider: dict, sigmas: dict, sampler: str | None, latent: tuple, patched: dict,
    *, column: Column, seed: int = SEED, name: str = "Sampling", title=None, also=(),
) -> dict:  # fmt: skip
    """The nodes around SamplerCustomAdvanced, and the report; without a sampler VOID's own."""
    if sampler is None:
        chosen = graph.add("VOIDSampler", column.next(60))
    else:
        chosen = graph.add("KSamplerSelect", column.next(70), [sampler])
    noise = graph.add("RandomNoise", column.next(90), [seed, "fixed"])
    right = Column(REPORT, 720, patched["pos"][1])
    run = graph.add(
        "SamplerCustomAdvanced",
        right.next(110),
        noise=(noise, "NOISE"),
        guider=(guider, "GUIDER"),
        sampler=(chosen, "SAMPLER"),
        sigmas=(sigmas, "SIGMAS"),
        latent_image=latent,
    )
    shown = report(graph, right.next(640), (run, "output"), patched, title)
    graph.group(name, [patched, guider, sigmas, chosen, noise, run, shown, *also])
    return shown


def save(graph: Graph, column: Column, made: list[dict], images: dict, fps: int, audio=None):
    """Join pictures and sound, save them, and group these nodes with those that made them."""
    sound = {"audio": audio} if audio else {}
    video = graph.add("CreateVideo", column.next(110), [fps, 8], images=(images, "IMAGE"), **sound)
    saved = graph.add(
        "SaveVideo",
        column.next(620),
        [f"video/adaspa_{graph.name}", "auto", "auto"],
        video=(video, "VIDEO"),
    )
    graph.group("Video", [*made, video, saved])


def video_out(
    graph: Graph, samples: tuple, vae: dict, fps: int, before: list | None = None
) -> None:
    column = Column(VIDEO, 560)
    made = []
    if before:
        made.append(graph.add(before[0], column.next(70), before[1], samples=samples, **before[2]))
        samples = (made[0], "LATENT")
    images = graph.add("VAEDecode", column.next(60), samples=samples, vae=(vae, "VAE"))
    save(graph, column, [*made, images], images, fps)
