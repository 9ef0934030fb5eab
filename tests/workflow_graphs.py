"""The graphs in workflows/. `python tests/workflow_graphs.py` writes them.

Loaders, file names and sampler settings are the ones that ComfyUI's own templates use for these
models; a test compares the files with what this writes.
"""

from pathlib import Path

from workflow_builder import GAP, Column, Graph

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows"

HUB = "https://huggingface.co/Comfy-Org"
WAN = f"{HUB}/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
WAN_TEXT = f"{HUB}/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
HUNYUAN = f"{HUB}/HunyuanVideo_1.5_repackaged/resolve/main/split_files"
UMT5 = f"{WAN_TEXT}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
WAN_VAE = f"{WAN}/vae/wan_2.1_vae.safetensors"

SEED = 20250301
GROUP_GAP = 100

# the values Balanced stands for, then the advanced ones at their defaults
BALANCED = ["Balanced", 0.8, "64", 0.12, "", False, "", 0, 1, 8192, "auto", "auto", True]

HARBOUR = (
    "A small red fishing boat leaves a stone harbour at sunrise. Gulls circle above the mast, "
    "the wake spreads in rings over calm water, ropes and nets sway on deck. The camera follows "
    "slowly from the pier, warm low light, fine mist, natural motion."
)
LIGHTHOUSE = (
    "A lighthouse keeper climbs a spiral staircase with a lantern, his shadow sliding along the "
    "white wall. The camera rises with him, warm lantern light against cold blue windows, rain "
    "running down the glass, steady natural motion."
)
LIVING_PICTURE = (
    "The scene in the picture comes to life: a light breeze moves hair, cloth and leaves, the "
    "light shifts gently, and the camera moves slowly closer."
)
TRAM = (
    "An old yellow tram turns a corner in a hillside town after rain. Wet cobblestones mirror "
    "its lights, laundry moves between the houses, a cyclist waits and then crosses behind it. "
    "Wide shot, the camera pans with the tram, late afternoon sun between clouds."
)
AVOID = (
    "still picture, flicker, blurry, overexposed, washed out, subtitles, watermark, jpeg blocks, "
    "extra fingers, deformed hands, deformed face, fused limbs, crowd in the background"
)


def files_note(urls: list[str]) -> str:
    lines = ["ComfyUI offers to download what is missing when you open this workflow.", ""]
    for url in urls:
        folder, name = url.rsplit("/", 2)[1:]
        lines.append(f"- `models/{folder}`: [{name}]({url})")
    return "\n".join(lines)


def tokens(width: int, height: int, length: int) -> str:
    frames = (length - 1) // 4 + 1
    count = (width // 16) * (height // 16) * frames
    return f"{count:,} tokens ({width // 16} x {height // 16} x {frames})"


def compare_note(nodes: str) -> str:
    return (
        "**Compare.** The seed is fixed. Run once, then open the advanced settings of "
        f"{nodes}, switch *enabled* off and run again: same video, every step in full."
    )


def unwrap(text: str) -> str:
    """One line per paragraph: the note would show a line break as one."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def wan_note(width: int, height: int, length: int, steps: str) -> str:
    return unwrap(f"""## What AdaSpa does here

Wan 2.2 is two models: the *high noise* model runs the first half of the steps, the *low noise*
model the second half. Each has its own **AdaSpa Attention** node, placed between the model and
*ModelSamplingSD3*. Nothing else in the graph changes.

**Where it pays.** This clip has {tokens(width, height, length)}. Attention time grows with the
square of that number, so large and long clips gain most. Below 8,192 tokens the node steps aside
and everything runs as usual.

**Setting.** {steps}

**Change first.** *preset*: Quality if something looks wrong, Fast if all is well. Give both nodes
the same preset. Then size or length.

{compare_note("both AdaSpa Attention nodes")}

**Report.** The two AdaSpa Report nodes pass the video on untouched and draw what was kept, by
layer and head.""")


TWENTY_STEPS = (
    "*Balanced* skips 80 % of the attention pairs. The first steps and the search, which finds out "
    "what matters, run in full; the sparse steps reuse what it found. "
)
WAN_TWENTY = TWENTY_STEPS + (
    "High noise model: steps 0-1 dense, 2 search, 3-9 sparse. Low noise model: steps 10 search, "
    "11-19 sparse. The line on each node says the same while it runs."
)
WAN_FOUR = (
    "*Balanced* keeps the first 12 % of the steps dense. Of 4 steps that rounds to none, so the "
    "search takes place in the very first step. High noise model: steps 0 search, 1 sparse. Low "
    "noise model: steps 2 search, 3 sparse. A search step runs in full, so each model has one step "
    "to save on, and the gain is smaller than with 20 steps."
)
HUNYUAN_TWENTY = TWENTY_STEPS + (
    "Here: steps 0-1 dense, 2 search, 3-19 sparse. The line on the node says the same during a run."
)


def wan_models(graph: Graph, column: Column, task: str) -> tuple[dict, dict, dict, dict]:
    high, low = (
        graph.add(
            "UNETLoader",
            column.next(90),
            [f"wan2.2_{task}_{noise}_noise_14B_fp8_scaled.safetensors", "default"],
            title=f"Load {noise} noise model",
            models=[
                f"{WAN}/diffusion_models/wan2.2_{task}_{noise}_noise_14B_fp8_scaled.safetensors"
            ],
        )
        for noise in ("high", "low")
    )
    clip = graph.add(
        "CLIPLoader",
        column.next(120),
        [Path(UMT5).name, "wan", "default"],
        title="Load text encoder",
        models=[UMT5],
    )
    vae = graph.add("VAELoader", column.next(90), [Path(WAN_VAE).name], models=[WAN_VAE])
    return high, low, clip, vae


def prompts(graph: Graph, column: Column, clip: dict, text: str, avoid: str) -> tuple[dict, dict]:
    positive = graph.add(
        "CLIPTextEncode", column.next(200), [text], title="Prompt", clip=(clip, "CLIP")
    )
    negative = graph.add(
        "CLIPTextEncode", column.next(140), [avoid], title="Negative prompt", clip=(clip, "CLIP")
    )
    return positive, negative


def video_out(graph: Graph, column: Column, latent: dict, vae: dict, fps: int, name: str) -> None:
    images = graph.add("VAEDecode", column.next(60), samples=(latent, "samples"), vae=(vae, "VAE"))
    video = graph.add("CreateVideo", column.next(110), [fps, 8], images=(images, "IMAGE"))
    saved = graph.add(
        "SaveVideo", column.next(620), [f"video/{name}", "auto", "auto"], video=(video, "VIDEO")
    )
    graph.group("Video", [images, video, saved])


def wan(name, task, size, steps, split, cfg, loras=None, text=HARBOUR) -> Graph:
    width, height, length = size
    graph = Graph(name)
    column = Column(0, 380)
    *models, clip, vae = loaders = wan_models(graph, column, task)
    files = [node["properties"]["models"][0]["url"] for node in loaders]
    graph.group("Models", loaders)
    if loras:
        column.y += GROUP_GAP
        models = [
            graph.add(
                "LoraLoaderModelOnly",
                column.next(120),
                [Path(url).name, 1],
                title=f"4-step LoRA, {noise} noise",
                models=[url],
                model=(model, "MODEL"),
            )
            for noise, model, url in zip(("high", "low"), models, loras, strict=True)
        ]
        graph.group("4-step LoRA", models)
        files += loras

    column = Column(500, 400)
    positive, negative = prompts(graph, column, clip, text, AVOID)
    conditioning = [(positive, "CONDITIONING"), (negative, "CONDITIONING")]
    if task == "i2v":
        picture = graph.add("LoadImage", column.next(330), ["example.png", "image"])
        start = graph.add(
            "WanImageToVideo",
            column.next(230),
            [width, height, length, 1],
            positive=conditioning[0],
            negative=conditioning[1],
            vae=(vae, "VAE"),
            start_image=(picture, "IMAGE"),
        )
        conditioning, latent = [(start, "positive"), (start, "negative")], (start, "latent")
        graph.group("Prompt, picture and size", [positive, negative, picture, start])
    else:
        start = graph.add("EmptyHunyuanLatentVideo", column.next(150), [width, height, length, 1])
        latent = (start, "LATENT")
        graph.group("Prompt and size", [positive, negative, start])

    y = 0
    for noise, model in zip(("high", "low"), models, strict=True):
        first = noise == "high"
        patched = graph.add(
            "AdaSpaAttention",
            Column(1020, 420, y).next(640),
            BALANCED,
            title=f"AdaSpa Attention, {noise} noise",
            model=(model, "MODEL"),
        )
        column = Column(1520, 340, y)
        shifted = graph.add("ModelSamplingSD3", column.next(70), [5], model=(patched, "model"))
        sampler = graph.add(
            "KSamplerAdvanced",
            column.next(350),
            ["enable", SEED, "fixed", steps, cfg, "euler", "simple", 0, split, "enable"]
            if first
            else ["disable", 0, "fixed", steps, cfg, "euler", "simple", split, steps, "disable"],
            title=f"Sample, {noise} noise",
            model=(shifted, "MODEL"),
            positive=conditioning[0],
            negative=conditioning[1],
            latent_image=latent,
        )
        report = graph.add(
            "AdaSpaReport",
            Column(1940, 720, y).next(640),
            [0, 0],
            title=f"AdaSpa Report, {noise} noise",
            samples=(sampler, "LATENT"),
            adaspa=(patched, "adaspa"),
        )
        part = f"first {split} of {steps} steps" if first else f"last {steps - split} steps"
        graph.group(f"{noise.capitalize()} noise: {part}", [patched, shifted, sampler, report])
        latent = (report, "samples")
        y += 640 + GAP + GROUP_GAP

    video_out(graph, Column(2780, 560), latent[0], vae, 16, f"adaspa_{name}")

    column = Column(-640, 540)
    note = wan_note(width, height, length, WAN_FOUR if loras else WAN_TWENTY)
    graph.add("MarkdownNote", column.next(480), [note], title="AdaSpa in this workflow")
    graph.add("MarkdownNote", column.next(250), [files_note(files)], title="Model files")
    return graph


HUNYUAN_FILES = [
    f"{HUNYUAN}/diffusion_models/hunyuanvideo1.5_720p_t2v_fp16.safetensors",
    f"{HUNYUAN}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
    f"{HUNYUAN}/text_encoders/byt5_small_glyphxl_fp16.safetensors",
    f"{HUNYUAN}/vae/hunyuanvideo15_vae_fp16.safetensors",
]

HUNYUAN_NOTE = unwrap(f"""## What AdaSpa does here

**AdaSpa Attention** sits right after the model, so the sampler and the schedule both use the
patched model. Text tokens are always kept in full; only video is thinned out.

**Where it pays.** This clip has {tokens(1280, 720, 121)}, so attention is most of the work, and
it grows with the square of that number. Below 8,192 tokens the node steps aside and everything
runs as usual.

**Setting.** {HUNYUAN_TWENTY}

**Change first.** *preset*: Quality if something looks wrong, Fast if all is well. Then length or
size.

{compare_note("the AdaSpa Attention node")}

**Memory.** Out of memory while loading: set *weight_dtype* of the model loader to an fp8 type.
Out of memory while sampling: set *cache* of AdaSpa Attention to cpu.

**Report.** The AdaSpa Report node passes the video on untouched and draws what was kept, by layer
and head.""")


def hunyuan(name: str) -> Graph:
    graph = Graph(name)
    model_url, *text_urls, vae_url = HUNYUAN_FILES
    column = Column(0, 380)
    model = graph.add(
        "UNETLoader", column.next(90), [Path(model_url).name, "default"], models=[model_url]
    )
    clip = graph.add(
        "DualCLIPLoader",
        column.next(150),
        [*(Path(url).name for url in text_urls), "hunyuan_video_15", "default"],
        title="Load text encoders",
        models=text_urls,
    )
    vae = graph.add("VAELoader", column.next(90), [Path(vae_url).name], models=[vae_url])
    graph.group("Models", [model, clip, vae])

    column = Column(500, 400)
    positive, negative = prompts(graph, column, clip, TRAM, "")
    size = graph.add("EmptyHunyuanVideo15Latent", column.next(150), [1280, 720, 121, 1])
    graph.group("Prompt and size", [positive, negative, size])

    patched = graph.add(
        "AdaSpaAttention", Column(1020, 420).next(640), BALANCED, model=(model, "MODEL")
    )
    column = Column(1520, 340)
    shifted = graph.add("ModelSamplingSD3", column.next(70), [7], model=(patched, "model"))
    guider = graph.add(
        "CFGGuider",
        column.next(110),
        [6],
        model=(shifted, "MODEL"),
        positive=(positive, "CONDITIONING"),
        negative=(negative, "CONDITIONING"),
    )
    sigmas = graph.add(
        "BasicScheduler", column.next(120), ["simple", 20, 1], model=(shifted, "MODEL")
    )
    chosen = graph.add("KSamplerSelect", column.next(70), ["euler"])
    noise = graph.add("RandomNoise", column.next(90), [SEED, "fixed"])
    column = Column(1940, 720)
    sampled = graph.add(
        "SamplerCustomAdvanced",
        column.next(110),
        noise=(noise, "NOISE"),
        guider=(guider, "GUIDER"),
        sampler=(chosen, "SAMPLER"),
        sigmas=(sigmas, "SIGMAS"),
        latent_image=(size, "LATENT"),
    )
    report = graph.add(
        "AdaSpaReport",
        column.next(640),
        [0, 0],
        samples=(sampled, "output"),
        adaspa=(patched, "adaspa"),
    )
    graph.group("Sampling", [patched, shifted, guider, sigmas, chosen, noise, sampled, report])
    video_out(graph, Column(2780, 560), report, vae, 24, f"adaspa_{name}")

    column = Column(-640, 540)
    graph.add("MarkdownNote", column.next(480), [HUNYUAN_NOTE], title="AdaSpa in this workflow")
    graph.add("MarkdownNote", column.next(220), [files_note(HUNYUAN_FILES)], title="Model files")
    return graph


def lora(task: str, version: str, noise: str) -> str:
    return f"{WAN}/loras/wan2.2_{task}_lightx2v_4steps_lora_{version}_{noise}_noise.safetensors"


def graphs() -> list[Graph]:
    return [
        wan("wan2_2_14b_t2v", "t2v", (832, 480, 81), 20, 10, 3.5),
        wan("wan2_2_14b_i2v", "i2v", (832, 480, 81), 20, 10, 3.5, text=LIVING_PICTURE),
        wan(
            "wan2_2_14b_t2v_4_step_lora",
            "t2v",
            (1280, 720, 81),
            4,
            2,
            1,
            loras=[lora("t2v", "v1.1", noise) for noise in ("high", "low")],
            text=LIGHTHOUSE,
        ),
        hunyuan("hunyuanvideo_1_5_t2v"),
    ]


if __name__ == "__main__":
    for graph in graphs():
        (WORKFLOWS / f"{graph.name}.json").write_text(graph.as_json(), encoding="utf-8")
