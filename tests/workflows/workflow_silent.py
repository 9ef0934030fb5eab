"""The graphs of HunyuanVideo 1.5 and Kandinsky 5."""

from tests.workflows.workflow_builder import Column, Graph
from tests.workflows.workflow_parts import (
    HUB,
    LIVING_PICTURE,
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
    sampled,
    sampled_with_guider,
    setting,
    video_out,
    where,
)

HUNYUAN = f"{HUB}/HunyuanVideo_1.5_repackaged/resolve/main/split_files"
QWEN = f"{HUNYUAN}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors"
VISION = f"{HUB}/sigclip_vision_384/resolve/main/sigclip_vision_patch14_384.safetensors"
KANDINSKY = "https://huggingface.co/kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s/resolve/main/model"

TRAM = (
    "An old yellow tram turns a corner in a hillside town after rain. Wet cobblestones mirror "
    "its lights, laundry moves between the houses, a cyclist waits and then crosses behind it. "
    "Wide shot, the camera pans with the tram, late afternoon sun between clouds."
)
POTTER = (
    "A potter shapes a tall vase on a turning wheel. Wet clay shines under a single lamp, hands "
    "press and lift, water runs down in thin lines. Close shot, slow push in, quiet workshop."
)


def picture_input(graph: Graph, column: Column, vision: dict) -> tuple[dict, dict]:
    picture = graph.add("LoadImage", column.next(330), ["example.png", "image"])
    seen = graph.add(
        "CLIPVisionEncode",
        column.next(90),
        ["center"],
        clip_vision=(vision, "CLIP_VISION"),
        image=(picture, "IMAGE"),
    )
    return picture, seen


def hunyuan(name: str, task: str) -> Graph:
    clip = Clip(1280, 720, 121)
    size = [clip.width, clip.height, clip.length, 1]
    graph = Graph(name)
    column = Column(LOADERS, 380)
    model = loader(
        graph,
        "UNETLoader",
        column.next(90),
        [f"{HUNYUAN}/diffusion_models/hunyuanvideo1.5_720p_{task}_fp16.safetensors"],
        "default",
    )
    text = loader(
        graph,
        "DualCLIPLoader",
        column.next(150),
        [QWEN, f"{HUNYUAN}/text_encoders/byt5_small_glyphxl_fp16.safetensors"],
        "hunyuan_video_15",
        "default",
        title="Load text encoders",
    )
    vae_url = f"{HUNYUAN}/vae/hunyuanvideo15_vae_fp16.safetensors"
    vae = loader(graph, "VAELoader", column.next(90), [vae_url])
    loaders = [model, text, vae]
    if task == "i2v":
        at = column.next(90)
        loaders.append(loader(graph, "CLIPVisionLoader", at, [(VISION, "clip_vision")]))
    graph.group("Models", loaders)

    column = Column(PROMPTS, 400)
    prompt = LIVING_PICTURE if task == "i2v" else TRAM
    positive, negative = prompts(graph, column, text, prompt, "")
    conditioning = [(positive, "CONDITIONING"), (negative, "CONDITIONING")]
    if task == "i2v":
        picture, seen = picture_input(graph, column, loaders[-1])
        start = graph.add(
            "HunyuanVideo15ImageToVideo",
            column.next(230),
            size,
            positive=conditioning[0],
            negative=conditioning[1],
            vae=(vae, "VAE"),
            start_image=(picture, "IMAGE"),
            clip_vision_output=(seen, "CLIP_VISION_OUTPUT"),
        )
        conditioning, latent = [(start, "positive"), (start, "negative")], (start, "latent")
        graph.group("Prompt, picture and size", [positive, negative, picture, seen, start])
    else:
        start = graph.add("EmptyHunyuanVideo15Latent", column.next(150), size)
        latent = (start, "LATENT")
        graph.group("Prompt and size", [positive, negative, start])

    patched = adaspa(graph, (model, "MODEL"))
    column = Column(SAMPLER, 340)
    shifted = graph.add("ModelSamplingSD3", column.next(70), [7], model=(patched, "model"))
    guider = graph.add(
        "CFGGuider",
        column.next(110),
        [6],
        model=(shifted, "MODEL"),
        positive=conditioning[0],
        negative=conditioning[1],
    )
    sigmas = graph.add(
        "BasicScheduler", column.next(120), ["simple", 20, 1], model=(shifted, "MODEL")
    )
    shown = sampled_with_guider(
        graph, guider, sigmas, "euler", latent, patched, column=column, also=[shifted]
    )
    video_out(graph, (shown, "samples"), vae, 24)

    also = " and what the model sees in the picture" if task == "i2v" else ""
    intro = (
        "**AdaSpa Attention** sits right after the model, so the sampler and the schedule both use "
        f"the patched model. Text tokens{also} are always kept in full; only video is thinned out."
    )
    chosen = setting("0-1 dense, 2 search, 3-8 sparse, 9 search, 10-19 sparse")
    notes(graph, note(intro, where(clip, "hunyuan"), chosen, more=MEMORY), 560)
    return graph


def kandinsky(name: str) -> Graph:
    clip = Clip(768, 512, 121)
    graph = Graph(name)
    column = Column(LOADERS, 380)
    model = loader(
        graph,
        "UNETLoader",
        column.next(90),
        [(f"{KANDINSKY}/kandinsky5lite_t2v_sft_5s.safetensors", "diffusion_models")],
        "default",
    )
    clip_l = "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main"
    text = loader(
        graph,
        "DualCLIPLoader",
        column.next(150),
        [QWEN, (f"{clip_l}/clip_l.safetensors", "text_encoders")],
        "kandinsky5",
        "default",
        title="Load text encoders",
    )
    hub = "https://huggingface.co/Kijai/HunyuanVideo_comfy/resolve/main"
    vae_url = (f"{hub}/hunyuan_video_vae_bf16.safetensors", "vae")
    vae = loader(graph, "VAELoader", column.next(90), [vae_url])
    graph.group("Models", [model, text, vae])

    column = Column(PROMPTS, 400)
    positive, negative = prompts(graph, column, text, POTTER, "")
    start = graph.add(
        "Kandinsky5ImageToVideo",
        column.next(230),
        [clip.width, clip.height, clip.length, 1],
        positive=(positive, "CONDITIONING"),
        negative=(negative, "CONDITIONING"),
        vae=(vae, "VAE"),
    )
    graph.group("Prompt and size", [positive, negative, start])
    conditioning = [(start, "positive"), (start, "negative")]
    values = [50, 5, "euler_ancestral", "beta"]
    shown = sampled(graph, model, conditioning, (start, "latent"), 5, values)
    video_out(graph, (shown, "samples"), vae, 24)

    intro = (
        "**AdaSpa Attention** sits between the model and *ModelSamplingSD3*. Nothing else in the "
        "graph changes. The text comes in through cross-attention, which runs in full."
    )
    chosen = setting("0-5 dense, 6 search, 7-22 sparse, 23 search, 24-49 sparse")
    notes(graph, note(intro, where(clip, "kandinsky"), chosen))
    return graph


def graphs() -> list[Graph]:
    return [
        hunyuan("hunyuanvideo_1_5_t2v", "t2v"),
        hunyuan("hunyuanvideo_1_5_i2v", "i2v"),
        kandinsky("kandinsky5_t2v"),
    ]
