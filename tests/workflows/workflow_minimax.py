"""The graphs of MiniMax-H3, which makes video and sound together."""

from tests.workflows.workflow_builder import Column, Graph
from tests.workflows.workflow_parts import (
    HUB,
    LIVING_PICTURE,
    LOADERS,
    PROMPTS,
    SAMPLER,
    SOUND,
    VIDEO,
    Clip,
    adaspa,
    loader,
    note,
    notes,
    sampled_with_guider,
    save,
    setting,
    where,
)

H3 = f"{HUB}/MiniMax-H3/resolve/main"
H3_FPS = 24

WORKSHOP = (
    "A clockmaker winds an old station clock in a narrow workshop. Gears turn behind glass, dust "
    "glows in the window light, he leans closer and listens. The camera moves in slowly. Sound: "
    "ticking, the click of a key, a deep chime at the end."
)


def h3_frames(length: int) -> int:
    """Latent frames of MiniMax-H3: 5 for every 17 frames, and 2 for the first 5."""
    return (length - 5) // 17 * 5 + 2


def h3(name: str, task: str) -> Graph:
    clip = Clip(1344, 768, 243, pixels=32, latent_frames=h3_frames, step=17)
    graph = Graph(name)
    column = Column(LOADERS, 380)
    file = f"{H3}/diffusion_models/minimax_h3_fl2va_pruned_int8_convrot.safetensors"
    model = loader(graph, "UNETLoader", column.next(90), [file], "default")
    file = f"{H3}/text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors"
    at = column.next(120)
    text = loader(graph, "CLIPLoader", at, [file], "minimax", "default", title="Load text encoder")
    vae, sound_vae = (
        loader(graph, "VAELoader", column.next(90), [f"{H3}/vae/{file}.safetensors"], title=title)
        for file, title in (
            ("minimax_h3_video_vae_int8_convrot", "Load video VAE"),
            ("minimax_h3_audio_vae_fp32", "Load audio VAE"),
        )
    )
    graph.group("Models", [model, text, vae, sound_vae])

    column = Column(PROMPTS, 400)
    group, first = [], {}
    if task == "i2v":
        picture = graph.add(
            "LoadImage", column.next(330), ["example.png", "image"], title="First picture"
        )
        group, first = [picture], {"first_frame": (picture, "IMAGE")}
    prompt = (
        LIVING_PICTURE.replace("the picture", "<Picture 1>") + SOUND if task == "i2v" else WORKSHOP
    )
    start = graph.add(
        "MiniMaxH3ImageToVideo",
        column.next(430),
        [prompt, clip.width, clip.height, clip.length],
        title="Prompt and size",
        clip=(text, "CLIP"),
        vae=(vae, "VAE"),
        **first,
    )
    what = "Picture, prompt and size" if task == "i2v" else "Prompt and size"
    graph.group(what, [*group, start])

    patched = adaspa(graph, (model, "MODEL"))
    column = Column(SAMPLER, 340)
    guider = graph.add(
        "BasicGuider",
        column.next(60),
        model=(patched, "model"),
        conditioning=(start, "positive"),
    )
    sigmas = graph.add(
        "BasicScheduler", column.next(120), ["simple", 20, 1], model=(patched, "model")
    )
    shown = sampled_with_guider(
        graph, guider, sigmas, "res_multistep", (start, "LATENT"), patched, column=column
    )

    column = Column(VIDEO, 560)
    images = graph.add("VAEDecode", column.next(60), samples=(shown, "samples"), vae=(vae, "VAE"))
    audio = graph.add(
        "VAEDecodeAudio", column.next(60), samples=(shown, "samples"), vae=(sound_vae, "VAE")
    )
    save(graph, column, [images, audio], images, H3_FPS, (audio, "AUDIO"))

    also = ", the picture" if task == "i2v" else ""
    intro = (
        "**AdaSpa Attention** sits right after the model, so the sampler and the schedule both use "
        f"the patched model. Text{also} and sound share the attention with the video; they are "
        "always kept in full, only video is thinned out."
    )
    if task == "i2v":
        intro += " The picture is stretched to *width* and *height*: give them its shape, in steps of 32."
    chosen = setting("0-1 dense, 2 search, 3-8 sparse, 9 search, 10-19 sparse") + (
        " With a turbo LoRA and 6 steps it becomes 0 dense, 1 search, 2-5 sparse; put the LoRA "
        "between the model and AdaSpa Attention."
    )
    memory = "**Memory.** Out of memory while sampling: set *cache* of AdaSpa Attention to cpu."
    notes(graph, note(intro, where(clip, "minimax"), chosen, more=memory), 560)
    return graph


def graphs() -> list[Graph]:
    return [h3("minimax_h3_t2v", "t2v"), h3("minimax_h3_i2v", "i2v")]
