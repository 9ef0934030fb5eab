"""The graphs of LTX-2.3, which makes video and sound together, in two stages."""

from tests.workflows.workflow_builder import Column, Graph
from tests.workflows.workflow_parts import (
    GROUP_GAP,
    HUB,
    LIVING_PICTURE,
    LOADERS,
    PROMPTS,
    SAMPLER,
    SEED,
    SOUND,
    VIDEO,
    Clip,
    adaspa,
    every,
    loader,
    measured,
    note,
    notes,
    prompts,
    sampled_with_guider,
    save,
)

LTX_HUB = "https://huggingface.co/Lightricks"
LTX = (f"{LTX_HUB}/LTX-2.3-fp8/resolve/main/ltx-2.3-22b-dev-fp8.safetensors", "checkpoints")
LTX_UPSCALER = (
    f"{LTX_HUB}/LTX-2.3/resolve/main/ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
    "latent_upscale_models",
)
LTX_FILES = "resolve/main/split_files"
GEMMA = f"{HUB}/ltx-2/{LTX_FILES}/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors"
LTX_LORA = (
    f"{HUB}/ltx-2.3/{LTX_FILES}/loras/"
    "ltx_2.3_22b_distilled_1.1_lora_dynamic_fro09_avg_rank_111_bf16.safetensors"
)
FIRST_SIGMAS = "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0"
SECOND_SIGMAS = "0.85, 0.7250, 0.4219, 0.0"
FPS = 25

BAND = (
    "A small brass band plays on a village square at dusk. The trumpeter steps forward, lanterns "
    "sway, children dance in front of a fountain. The camera circles slowly. Sound: warm brass "
    "melody, a snare drum, laughter, water."
)
LTX_AVOID = "still frame, flicker, blurry, subtitles, watermark, cartoon, distorted sound"


def ltx_stage(graph, model, conditioning, latent, sigmas, seed, y, title, label) -> dict:
    patched = adaspa(graph, (model, "MODEL"), y, f"AdaSpa Attention, {label}")
    column = Column(SAMPLER, 340, y)
    guider = graph.add(
        "CFGGuider",
        column.next(110),
        [1],
        model=(patched, "model"),
        positive=conditioning[0],
        negative=conditioning[1],
    )
    schedule = graph.add("ManualSigmas", column.next(110), [sigmas])
    return sampled_with_guider(
        graph, guider, schedule, "euler", latent, patched,
        column=column, seed=seed, name=title, title=f"AdaSpa Report, {label}",
    )  # fmt: skip


def ltx(name: str, task: str) -> Graph:
    clip = Clip(1920, 1088, 241, pixels=32, latent_frames=every(8), step=8)
    half = Clip(960, 544, 241, pixels=32, latent_frames=every(8), step=8)
    graph = Graph(name)
    column = Column(LOADERS, 380)
    checkpoint = loader(graph, "CheckpointLoaderSimple", column.next(120), [LTX])
    text = loader(
        graph,
        "LTXAVTextEncoderLoader",
        column.next(120),
        [GEMMA, LTX],
        "default",
        title="Load text encoder",
    )
    sound_vae = loader(graph, "LTXVAudioVAELoader", column.next(70), [LTX])
    upscaler = loader(graph, "LatentUpscaleModelLoader", column.next(70), [LTX_UPSCALER])
    model = graph.add(
        "LoraLoaderModelOnly",
        column.next(120),
        [LTX_LORA.rsplit("/", 1)[1], 0.5],
        title="Few-step LoRA",
        models=[LTX_LORA],
        model=(checkpoint, "MODEL"),
    )
    graph.group("Models", [checkpoint, text, sound_vae, upscaler, model])

    column = Column(PROMPTS, 400)
    prompt = LIVING_PICTURE + SOUND if task == "i2v" else BAND
    positive, negative = prompts(graph, column, text, prompt, LTX_AVOID)
    rate = graph.add(
        "LTXVConditioning",
        column.next(90),
        [FPS],
        positive=(positive, "CONDITIONING"),
        negative=(negative, "CONDITIONING"),
    )
    size = graph.add(
        "EmptyLTXVLatentVideo",
        column.next(150),
        [half.width, half.height, half.length, 1],
        title="Size of the first stage",
    )
    sound = graph.add(
        "LTXVEmptyLatentAudio",
        column.next(130),
        [half.length, FPS, 1],
        audio_vae=(sound_vae, "Audio VAE"),
    )
    group = [positive, negative, rate, size, sound]
    video = (size, "LATENT")
    vae = (checkpoint, "VAE")
    if task == "i2v":
        picture = graph.add("LoadImage", column.next(330), ["example.png", "image"])
        scaled = graph.add(
            "ImageScale",
            column.next(150),
            ["lanczos", clip.width, clip.height, "center"],
            image=(picture, "IMAGE"),
        )
        ready = graph.add("LTXVPreprocess", column.next(70), [18], image=(scaled, "IMAGE"))
        placed = graph.add(
            "LTXVImgToVideoInplace",
            column.next(130),
            [0.7, False],
            vae=vae,
            image=(ready, "output_image"),
            latent=video,
        )
        video = (placed, "latent")
        group += [picture, scaled, ready, placed]
    both = graph.add(
        "LTXVConcatAVLatent",
        column.next(60),
        video_latent=video,
        audio_latent=(sound, "Latent"),
    )
    what = "Prompt, picture and size" if task == "i2v" else "Prompt and size"
    graph.group(what, [*group, both])

    conditioning = [(rate, "positive"), (rate, "negative")]
    latent, y = (both, "latent"), 0
    title = "First stage: 8 steps at half size"
    shown = ltx_stage(
        graph, model, conditioning, latent, FIRST_SIGMAS, SEED, y, title, "first stage"
    )

    # between the stages, below the first
    y += 950 + GROUP_GAP
    column = Column(SAMPLER, 340, y)
    parted = graph.add("LTXVSeparateAVLatent", column.next(60), av_latent=(shown, "samples"))
    cropped = graph.add(
        "LTXVCropGuides",
        column.next(80),
        positive=conditioning[0],
        negative=conditioning[1],
        latent=(parted, "video_latent"),
    )
    larger = graph.add(
        "LTXVLatentUpsampler",
        column.next(80),
        samples=(parted, "video_latent"),
        upscale_model=(upscaler, "LATENT_UPSCALE_MODEL"),
        vae=vae,
    )
    group, video = [parted, cropped, larger], (larger, "LATENT")
    if task == "i2v":
        placed = graph.add(
            "LTXVImgToVideoInplace",
            column.next(130),
            [1, False],
            vae=vae,
            image=(ready, "output_image"),
            latent=video,
        )
        group, video = [*group, placed], (placed, "latent")
    both = graph.add(
        "LTXVConcatAVLatent",
        column.next(60),
        video_latent=video,
        audio_latent=(parted, "audio_latent"),
    )
    graph.group("Twice the size", [*group, both])

    y = column.y + GROUP_GAP
    conditioning = [(cropped, "positive"), (cropped, "negative")]
    title = "Second stage: 3 steps at full size"
    shown = ltx_stage(
        graph, model, conditioning, (both, "latent"), SECOND_SIGMAS, 42, y, title, "second stage"
    )

    column = Column(VIDEO, 560)
    parted = graph.add("LTXVSeparateAVLatent", column.next(60), av_latent=(shown, "samples"))
    images = graph.add(
        "VAEDecodeTiled",
        column.next(170),
        [768, 64, 4096, 4],
        samples=(parted, "video_latent"),
        vae=vae,
    )
    audio = graph.add(
        "LTXVAudioVAEDecode",
        column.next(60),
        samples=(parted, "audio_latent"),
        audio_vae=(sound_vae, "Audio VAE"),
    )
    save(graph, column, [parted, images, audio], images, FPS, (audio, "Audio"))

    intro = (
        "LTX-2.3 samples twice: at half size, then at full size. Each stage has its own **AdaSpa "
        "Attention** node between the LoRA and the guider. Sound has a stream of its own, which "
        "runs in full, as does the text."
    )
    place = (
        f"The second stage has {clip}, the first {half}. Attention time grows with the square of "
        "that number. LTX packs a video into few tokens, so only large and long clips gain: below "
        "8,192 tokens a stage steps aside and runs as usual. "
        f"Second stage: {clip.begins()} First stage: {half.begins()} {measured('ltx')}"
    )
    chosen = (
        "*Balanced* skips 80 % of the attention pairs. First stage: steps 0 dense, 1 search, 2-3 "
        "sparse, 4 search, 5-7 sparse. The second stage enters the schedule late and searches at once: steps 6 search, "
        "7-8 sparse. So it saves on two of three steps."
    )
    change = (
        "*length* (in both nodes that have it) and size: here they matter more than the preset. "
        "Then *preset*: Quality if something looks wrong, Fast if all is well."
    )
    notes(graph, note(intro, place, chosen, change, plural=True), 560)
    return graph


def graphs() -> list[Graph]:
    return [ltx("ltx_2_3_t2v", "t2v"), ltx("ltx_2_3_i2v", "i2v")]
