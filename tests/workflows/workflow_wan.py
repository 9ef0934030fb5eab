"""The graphs of Wan 2.2 14B with its two experts, one of them long, in context windows."""

from tests.workflows.workflow_builder import GAP, Column, Graph
from tests.workflows.workflow_parts import (
    AVOID,
    BALANCED,
    BY_FOURS,
    GROUP_GAP,
    HUB,
    LIVING_PICTURE,
    LOADERS,
    MEMORY,
    PATCH,
    PROMPTS,
    REPORT,
    SAMPLER,
    SEED,
    TWENTY_STEPS,
    Clip,
    adaspa,
    loader,
    note,
    notes,
    prompts,
    report,
    video_out,
    where,
)

WAN = f"{HUB}/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
WAN_21 = f"{HUB}/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
UMT5 = f"{WAN_21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"

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
RIVER = (
    "A flight low along a slow river between autumn hills. Mist lifts from the water, birds rise "
    "from the reeds, a stone bridge comes closer and passes overhead. One long take, soft morning "
    "light, calm steady motion."
)

EXPERTS = (
    "Wan 2.2 is two models: the *high noise* model runs the first half of the steps, the *low "
    "noise* model the second half. Each has its own **AdaSpa Attention** node, placed between the "
    "model and *ModelSamplingSD3*. Nothing else in the graph changes."
)
ONE_NODE = (
    "Wan 2.2 is two models: the *high noise* model runs the first half of the steps, the *low "
    "noise* model the second half. **AdaSpa Attention (two experts)** takes both, placed between "
    "the models and *ModelSamplingSD3*; its report covers both halves."
)
CARRIED = (
    " That is the plan; the low noise model begins with the pattern of the high noise model, and "
    "every layer in which it still holds needs no search. The report says how many did."
)
TWO_NODES = (
    "*preset*: Quality if something looks wrong, Fast if all is well. Give both nodes the same "
    "preset. Then size or length."
)
TWENTY = TWENTY_STEPS + (
    "High noise model: steps 0-1 dense, 2 search, 3-9 sparse. Low noise model: steps 10 search, "
    "11-19 sparse. The line on each node says the same while it runs."
)
FOUR = (
    "*Balanced* keeps the first 12 % of the steps dense. Of 4 steps that rounds to none, so the "
    "search takes place in the very first step. High noise model: steps 0 search, 1 sparse. Low "
    "noise model: steps 2 search, 3 sparse. A search step runs in full, so each model has one step "
    "to save on, and the gain is smaller than with 20 steps."
)

# frames of a context window and of the overlap of two; the model's own length is 81
WINDOW, OVERLAP = 81, 32


def windows(length: int) -> int:
    """How many of the windows, each moved on by the same number of latent frames, cover a clip."""
    window, overlap = BY_FOURS(WINDOW), OVERLAP // 4
    return -(-(BY_FOURS(length) - overlap) // (window - overlap))


def experts(graph: Graph, column: Column, task: str) -> list[dict]:
    """The two models, the text encoder and the VAE."""
    loaders = [
        loader(
            graph,
            "UNETLoader",
            column.next(90),
            [f"{WAN}/diffusion_models/wan2.2_{task}_{noise}_noise_14B_fp8_scaled.safetensors"],
            "default",
            title=f"Load {noise} noise model",
        )
        for noise in ("high", "low")
    ]
    return loaders + text_and_vae(graph, column, f"{WAN}/vae/wan_2.1_vae.safetensors")


def text_and_vae(graph: Graph, column: Column, vae: str) -> list[dict]:
    at = column.next(120)
    text = loader(graph, "CLIPLoader", at, [UMT5], "wan", "default", title="Load text encoder")
    return [text, loader(graph, "VAELoader", column.next(90), [vae])]


def two_experts(
    name, task, clip, steps, split, cfg, text, loras=(), context=False, pair=False
) -> Graph:
    """The graph; with `pair` one node of ours serves both experts, else each has its own."""
    size = [clip.width, clip.height, clip.length, 1]
    graph = Graph(name)
    column = Column(LOADERS, 380)
    *models, encoder, vae = loaders = experts(graph, column, task)
    graph.group("Models", loaders)
    if loras:
        column.y += GROUP_GAP
        models = [
            graph.add(
                "LoraLoaderModelOnly",
                column.next(120),
                [url.rsplit("/", 1)[1], 1],
                title=f"4-step LoRA, {noise} noise",
                models=[url],
                model=(model, "MODEL"),
            )
            for noise, model, url in zip(("high", "low"), models, loras, strict=True)
        ]
        graph.group("4-step LoRA", models)

    column = Column(PROMPTS, 400)
    positive, negative = prompts(graph, column, encoder, text, AVOID)
    conditioning = [(positive, "CONDITIONING"), (negative, "CONDITIONING")]
    if task == "i2v":
        picture = graph.add("LoadImage", column.next(330), ["example.png", "image"])
        start = graph.add(
            "WanImageToVideo",
            column.next(230),
            size,
            positive=conditioning[0],
            negative=conditioning[1],
            vae=(vae, "VAE"),
            start_image=(picture, "IMAGE"),
        )
        conditioning, latent = [(start, "positive"), (start, "negative")], (start, "latent")
        graph.group("Prompt, picture and size", [positive, negative, picture, start])
    else:
        start = graph.add("EmptyHunyuanLatentVideo", column.next(150), size)
        latent = (start, "LATENT")
        graph.group("Prompt and size", [positive, negative, start])

    y, inside = 0, []
    if pair:
        high, low = ((model, "MODEL") for model in models)
        at = Column(PATCH, 420).next(680)
        both = graph.add("AdaSpaAttentionPair", at, BALANCED, model_high=high, model_low=low)
    for noise, model in zip(("high", "low"), models, strict=True):
        first = noise == "high"
        if pair:
            patched, feed = both, (both, f"model_{noise}")
        else:
            patched = adaspa(graph, (model, "MODEL"), y, f"AdaSpa Attention, {noise} noise")
            feed = (patched, "model")
        column, parts = Column(SAMPLER, 340, y), []
        if context:
            # windows that stay where they are, so that each keeps its mask from step to step
            values = [WINDOW, OVERLAP, "standard_static", 1, False, "pyramid", True, False, False]
            parts = [graph.add("WanContextWindowsManual", column.next(290), values, model=feed)]
            feed = (parts[0], "MODEL")
        shifted = graph.add("ModelSamplingSD3", column.next(70), [5], model=feed)
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
        if pair:
            inside += [shifted, sampler]
            latent, y = (sampler, "LATENT"), column.y
            continue
        at = Column(REPORT, 720, y).next(640)
        shown = report(graph, at, (sampler, "LATENT"), patched, f"AdaSpa Report, {noise} noise")
        part = f"first {split} of {steps} steps" if first else f"last {steps - split} steps"
        title = f"{noise.capitalize()} noise: {part}"
        graph.group(title, [patched, *parts, shifted, sampler, shown])
        latent = (shown, "samples")
        y = max(y + 640 + GAP, column.y) + GROUP_GAP
    if pair:
        shown = report(graph, Column(REPORT, 720).next(640), latent, both)
        graph.group(f"High noise: first {split} of {steps} steps; low noise: the rest",
                    [both, *inside, shown])  # fmt: skip
        latent = (shown, "samples")

    video_out(graph, latent, vae, 16)
    if context:
        window = Clip(clip.width, clip.height, WINDOW)
        long = (
            f"The clip is {clip.length} frames long, the model was made for {WINDOW}. *Wan Context "
            f"Windows* cuts it into {windows(clip.length)} windows of {WINDOW} frames that overlap "
            f"by {OVERLAP}; attention never looks past one "
            "window. Those after the first have one latent frame more, as an anchor."
        )
        place = where(window, "wan", f"{long} So what counts is the window:")
        more = (
            "**Windows.** Keep *context_schedule* at standard_static: each window then stays where "
            "it is and keeps the mask of its search. With the uniform schedules the windows move "
            "at every step and would have to be searched again. Each window holds masks of its "
            "own; out of memory: set *cache* of both nodes to cpu."
        )
        text = note(EXPERTS, place, TWENTY, TWO_NODES, plural=True, more=more)
        notes(graph, text, 620)
    elif pair:
        chosen = TWENTY + CARRIED
        notes(graph, note(ONE_NODE, where(clip, "wan"), chosen, more=MEMORY), 620)
    else:
        text = note(EXPERTS, where(clip, "wan"), FOUR if loras else TWENTY, TWO_NODES, plural=True)
        notes(graph, text)
    return graph


def lora(task: str, version: str, noise: str) -> str:
    return f"{WAN}/loras/wan2.2_{task}_lightx2v_4steps_lora_{version}_{noise}_noise.safetensors"


def graphs() -> list[Graph]:
    small, large = Clip(832, 480, 81), Clip(1280, 720, 81)
    return [
        two_experts("wan2_2_14b_t2v", "t2v", small, 20, 10, 3.5, HARBOUR),
        two_experts("wan2_2_14b_i2v", "i2v", small, 20, 10, 3.5, LIVING_PICTURE, pair=True),
        two_experts(
            "wan2_2_14b_t2v_4_step_lora",
            "t2v",
            large,
            4,
            2,
            1,
            LIGHTHOUSE,
            loras=[lora("t2v", "v1.1", noise) for noise in ("high", "low")],
        ),
        two_experts(
            "wan2_2_14b_t2v_long_context_windows",
            "t2v",
            Clip(832, 480, 341),
            20,
            10,
            3.5,
            RIVER,
            context=True,
        ),
    ]
