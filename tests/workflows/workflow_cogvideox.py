"""The graph of CogVideoX 1.5 5B. In ComfyUI's format it is published as VOID, which repaints video."""

from tests.workflows.workflow_builder import Column, Graph
from tests.workflows.workflow_parts import (
    HUB,
    LOADERS,
    MEMORY,
    PROMPTS,
    SAMPLER,
    Clip,
    adaspa,
    loader,
    note,
    notes,
    prompts,
    sampled_with_guider,
    setting,
    video_out,
    where,
)

VOID = f"{HUB}/void-model/resolve/main"
T5 = "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors"

EMPTY_STREET = "An empty cobbled street in the evening, shop windows lit, nobody in sight."


def pairs_of_frames(length: int) -> int:
    """Latent frames of a clip, two of them to a token."""
    return ((length - 1) // 4 + 1) // 2


def void(name: str) -> Graph:
    clip = Clip(672, 384, 197, latent_frames=pairs_of_frames, step=8)
    graph = Graph(name)
    column = Column(LOADERS, 380)
    file = f"{VOID}/diffusion_models/void_pass1.safetensors"
    model = loader(graph, "UNETLoader", column.next(90), [file], "default")
    at = column.next(120)
    text = loader(
        graph, "CLIPLoader", at, [(T5, "text_encoders")], "cogvideox", "default",
        title="Load text encoder",
    )  # fmt: skip
    at = column.next(90)
    vae = loader(graph, "VAELoader", at, [f"{VOID}/vae/cogvideox_vae.safetensors"])
    graph.group("Models", [model, text, vae])

    column = Column(PROMPTS, 400)
    positive, negative = prompts(graph, column, text, EMPTY_STREET, "")
    positive["title"] = "What is there afterwards"
    video = graph.add("LoadVideo", column.next(330), ["video.mp4", "image"])
    parts = graph.add("GetVideoComponents", column.next(110), video=(video, "VIDEO"))
    mask = graph.add(
        "LoadImageMask", column.next(330), ["example.png", "image", "red"],
        title="What to remove: black",
    )  # fmt: skip
    ready = graph.add("VOIDQuadmaskPreprocess", column.next(90), [0], mask=(mask, "MASK"))
    start = graph.add(
        "VOIDInpaintConditioning",
        column.next(270),
        [clip.width, clip.height, clip.length, 1],
        positive=(positive, "CONDITIONING"),
        negative=(negative, "CONDITIONING"),
        vae=(vae, "VAE"),
        video=(parts, "images"),
        quadmask=(ready, "quadmask"),
    )
    graph.group("Prompt, video and mask", [positive, negative, video, parts, mask, ready, start])

    patched = adaspa(graph, (model, "MODEL"))
    column = Column(SAMPLER, 340)
    guider = graph.add(
        "CFGGuider",
        column.next(110),
        [6],
        model=(patched, "model"),
        positive=(start, "positive"),
        negative=(start, "negative"),
    )
    sigmas = graph.add(
        "BasicScheduler", column.next(120), ["simple", 30, 1], model=(patched, "model")
    )
    shown = sampled_with_guider(
        graph, guider, sigmas, None, (start, "latent"), patched, column=column
    )
    video_out(graph, (shown, "samples"), vae, 24)

    intro = (
        "CogVideoX 1.5 5B, as VOID: it repaints what the mask covers, for the whole video. "
        "**AdaSpa Attention** sits right after the model, so the sampler and the schedule both use "
        "the patched model. Text tokens are always kept in full; only video is thinned out. The "
        "mask is one picture for all frames: black is removed, white stays."
    )
    chosen = setting("0-3 dense, 4 search, 5-13 sparse, 14 search, 15-29 sparse")
    notes(graph, note(intro, where(clip, "cogvideox"), chosen, more=MEMORY), 560)
    return graph


def graphs() -> list[Graph]:
    return [void("cogvideox_1_5_void_repaint")]
