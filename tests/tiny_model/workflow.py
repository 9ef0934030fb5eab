"""Writes the tiny model's workflow, which `python run.py serve` puts into ComfyUI's sidebar."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from tests.workflows.workflow_builder import NODES, Column, Graph  # noqa: E402

NODES |= {
    "AdaSpaTinyPrompt": ("", "text:STRING", "CONDITIONING:CONDITIONING"),
    "AdaSpaTinyDecode": ("samples:LATENT", "scale:INT", "IMAGE:IMAGE"),
    "KSampler": (
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT",
        "seed:INT steps:INT cfg:FLOAT sampler_name:COMBO scheduler:COMBO denoise:FLOAT",
        "LATENT:LATENT",
    ),
    "SaveAnimatedWEBP": (
        "images:IMAGE",
        "filename_prefix:STRING fps:FLOAT lossless:BOOLEAN quality:INT method:COMBO",
        "",
    ),
}
NOTE = """## The tiny model

It knows one small world: shapes that move over a background. Change the words and press Run.

**Compare.** Open the advanced settings of AdaSpa Attention, switch *enabled* off and run again with
the same seed.

On a CPU a run takes a few minutes, on a GPU a second or two."""


def graph() -> Graph:
    graph = Graph("tiny_model")
    column = Column(0, 380)
    note = graph.add("MarkdownNote", column.next(300), [NOTE], title="Start here")
    loader = graph.add("UNETLoader", column.next(90), ["tiny_wan.safetensors", "default"])
    graph.group("Model", [note, loader])
    column = Column(500, 400)
    positive = graph.add(
        "AdaSpaTinyPrompt",
        column.next(180),
        ["a large red star moving left slowly over a navy gradient"],
        title="Prompt",
    )
    negative = graph.add("AdaSpaTinyPrompt", column.next(120), [""], title="Negative prompt")
    latent = graph.add("EmptyHunyuanLatentVideo", column.next(150), [416, 320, 61, 1])
    graph.group("Prompt and size", [positive, negative, latent])
    adaspa = graph.add(
        "AdaSpaAttention",
        Column(1020, 400).next(760),
        ["Quality", 0.7, "64", 0.2, "0.6", False, "", 0, 1, 4096, "auto", "auto", True, "auto", 0,
         "pooled", "similarity"],
        model=(loader, "MODEL"),
    )  # fmt: skip
    sampler = graph.add(
        "KSampler",
        Column(1500, 340).next(330),
        [1, "fixed", 20, 1, "euler", "simple", 1],
        model=(adaspa, "model"),
        positive=(positive, "CONDITIONING"),
        negative=(negative, "CONDITIONING"),
        latent_image=(latent, "LATENT"),
    )
    graph.group("Sample", [adaspa, sampler])
    column = Column(1920, 760)
    report = graph.add(
        "AdaSpaReport",
        column.next(760),
        [3, 0],
        samples=(sampler, "LATENT"),
        adaspa=(adaspa, "adaspa"),
    )
    column = Column(2760, 460)
    images = graph.add("AdaSpaTinyDecode", column.next(90), [4], samples=(report, "samples"))
    saved = graph.add(
        "SaveAnimatedWEBP",
        column.next(560),
        ["tiny", 12, False, 85, "default"],
        images=(images, "IMAGE"),
    )
    graph.group("Report", [report])
    graph.group("Video", [images, saved])
    for node in graph.nodes:
        if node["type"].startswith("AdaSpaTiny"):
            node["properties"] = {"Node name for S&R": node["type"]}
    return graph


if __name__ == "__main__":
    (FOLDER / "workflows").mkdir(exist_ok=True)
    (FOLDER / "workflows" / "tiny_model.json").write_text(graph().as_json(), encoding="utf-8")
