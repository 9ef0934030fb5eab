"""The graphs of Wan models that are one model: 2.2 5B and VACE."""

from tests.workflows.workflow_builder import Column, Graph, Subgraph
from tests.workflows.workflow_parts import (
    AVOID,
    GROUP_GAP,
    LOADERS,
    PROMPTS,
    SAMPLER,
    Clip,
    loader,
    note,
    notes,
    prompts,
    sampled,
    setting,
    video_out,
    where,
)
from tests.workflows.workflow_wan import WAN, WAN_21, text_and_vae

MARKET = (
    "A baker in a flour-dusted apron sets warm loaves on a wooden stall. Steam rises, a cat jumps "
    "down from a crate, people pass behind in morning haze. The camera drifts sideways, shallow "
    "focus, natural light."
)
SUBJECT = (
    "What the reference picture shows stands on a windy cliff above the sea. Grass bends, clouds "
    "move fast, the camera circles slowly, evening light, natural motion."
)


def wan_5b(name: str) -> Graph:
    clip = Clip(1280, 704, 121, pixels=32)
    graph = Graph(name)
    column = Column(LOADERS, 380)
    model = loader(
        graph,
        "UNETLoader",
        column.next(90),
        [f"{WAN}/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors"],
        "default",
    )
    text, vae = text_and_vae(graph, column, f"{WAN}/vae/wan2.2_vae.safetensors")
    graph.group("Models", [model, text, vae])

    column = Column(PROMPTS, 400)
    positive, negative = prompts(graph, column, text, MARKET, AVOID)
    picture = graph.add(
        "LoadImage",
        column.next(330),
        ["example.png", "image"],
        title="Load Image (bypassed: Ctrl+B to use it)",
        mode=4,
    )
    start = graph.add(
        "Wan22ImageToVideoLatent",
        column.next(170),
        [clip.width, clip.height, clip.length, 1],
        vae=(vae, "VAE"),
        start_image=(picture, "IMAGE"),
    )
    graph.group("Prompt, picture and size", [positive, negative, picture, start])
    conditioning = [(positive, "CONDITIONING"), (negative, "CONDITIONING")]
    values = [20, 5, "uni_pc", "simple"]
    shown = sampled(graph, model, conditioning, (start, "LATENT"), 8, values)
    video_out(graph, (shown, "samples"), vae, 24)

    intro = (
        "**AdaSpa Attention** sits between the model and *ModelSamplingSD3*. Nothing else in the "
        "graph changes. The Load Image node is bypassed, so this makes a video from text; select "
        "it and press Ctrl+B to start from a picture."
    )
    place = where(clip, "wan") + (
        " This model packs a video into few tokens, so it gains less than the 14B models do at the "
        "same size."
    )
    chosen = setting("0-1 dense, 2 search, 3-8 sparse, 9 search, 10-19 sparse")
    notes(graph, note(intro, place, chosen))
    return graph


def sample_box() -> Subgraph:
    """Model loader, AdaSpa, sampler and report as one node."""
    inner = Subgraph(
        "Sample with AdaSpa",
        "Loads a video model and samples with AdaSpa; passes the video on and shows the report.",
        first=101,
    )
    column = Column(LOADERS, 380)
    model = loader(
        inner,
        "UNETLoader",
        column.next(90),
        [f"{WAN}/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors"],
        "default",
    )
    inner.group("Model", [model])
    conditioning = [inner.take(name, "CONDITIONING") for name in ("positive", "negative")]
    latent = inner.take("latent_image", "LATENT")
    shown = sampled(inner, model, conditioning, latent, 8, [20, 5, "uni_pc", "simple"])
    patched, shifted, sampler = (
        next(node for node in inner.nodes if node["type"] == kind)
        for kind in ("AdaSpaAttention", "ModelSamplingSD3", "KSampler")
    )
    for output in ("samples", "picture", "text"):
        inner.give(shown, output)
    inner.show(model, "unet_name", "weight_dtype")
    inner.show(patched, "preset", "enabled")
    inner.show(shifted, "shift")
    inner.show(sampler, "seed", "control_after_generate", "steps", "cfg", "sampler_name")
    return inner


def wan_5b_in_a_box(name: str) -> Graph:
    clip = Clip(1280, 704, 121, pixels=32)
    graph = Graph(name)
    column = Column(LOADERS, 380)
    text, vae = text_and_vae(graph, column, f"{WAN}/vae/wan2.2_vae.safetensors")
    graph.group("Models", [text, vae])
    column = Column(PROMPTS, 400)
    positive, negative = prompts(graph, column, text, MARKET, AVOID)
    start = graph.add(
        "Wan22ImageToVideoLatent",
        column.next(170),
        [clip.width, clip.height, clip.length, 1],
        vae=(vae, "VAE"),
    )
    graph.group("Prompt and size", [positive, negative, start])
    box = graph.box(
        sample_box(),
        Column(SAMPLER - 500, 420).next(420),
        positive=(positive, "CONDITIONING"),
        negative=(negative, "CONDITIONING"),
        latent_image=(start, "LATENT"),
    )
    seen = graph.add(
        "PreviewImage", Column(SAMPLER, 720).next(640), title="Report", images=(box, "picture")
    )
    graph.group("Sampling", [box, seen])
    video_out(graph, (box, "samples"), vae, 24)

    intro = (
        "**Sample with AdaSpa** is a subgraph: model loader, AdaSpa Attention, *ModelSamplingSD3*, "
        "sampler and AdaSpa Report in one box. Double-click it to look inside.\n\n"
        "**Keep it.** Select the box and choose *Add Subgraph to Library* in the bar above it: from "
        "then on it is in the node library, for every graph. For another model change *unet_name*, "
        "*shift* and the sampler."
    )
    place = where(clip, "wan")
    chosen = setting("0-1 dense, 2 search, 3-8 sparse, 9 search, 10-19 sparse")
    notes(graph, note(intro, place, chosen, more="The box shows *enabled* itself."), 600)
    return graph


def vace(name: str) -> Graph:
    clip = Clip(1280, 720, 81, extra=1)
    graph = Graph(name)
    column = Column(LOADERS, 380)
    model = loader(
        graph,
        "UNETLoader",
        column.next(90),
        [f"{WAN_21}/diffusion_models/wan2.1_vace_14B_fp16.safetensors"],
        "default",
    )
    text, vae = text_and_vae(graph, column, f"{WAN_21}/vae/wan_2.1_vae.safetensors")
    graph.group("Models", [model, text, vae])
    column.y += GROUP_GAP
    hub = "https://huggingface.co/Kijai/WanVideo_comfy/resolve/main"
    url = f"{hub}/Wan21_CausVid_14B_T2V_lora_rank32.safetensors"
    lora = graph.add(
        "LoraLoader",
        column.next(150),
        [url.rsplit("/", 1)[1], 0.3, 1],
        title="4-step LoRA",
        models=[(url, "loras")],
        model=(model, "MODEL"),
        clip=(text, "CLIP"),
    )
    graph.group("4-step LoRA", [lora])

    column = Column(PROMPTS, 400)
    positive, negative = prompts(graph, column, lora, SUBJECT, AVOID)
    picture = graph.add(
        "LoadImage", column.next(330), ["example.png", "image"], title="Reference picture"
    )
    start = graph.add(
        "WanVaceToVideo",
        column.next(290),
        [clip.width, clip.height, clip.length, 1, 1],
        positive=(positive, "CONDITIONING"),
        negative=(negative, "CONDITIONING"),
        vae=(vae, "VAE"),
        reference_image=(picture, "IMAGE"),
    )
    graph.group("Prompt, reference and size", [positive, negative, picture, start])
    conditioning = [(start, "positive"), (start, "negative")]
    values = [4, 1, "uni_pc", "simple"]
    shown = sampled(graph, lora, conditioning, (start, "latent"), 8, values)
    trim = ["TrimVideoLatent", [0], {"trim_amount": (start, "trim_latent")}]
    video_out(graph, (shown, "samples"), vae, 16, before=trim)

    intro = (
        "VACE runs control blocks beside the blocks of Wan, and both attend over the whole clip. "
        "**AdaSpa Attention** sits after the LoRA and before *ModelSamplingSD3* and serves both. "
        "For a control video or a mask, connect it to *WanVaceToVideo*."
    )
    place = where(
        clip, "wan", "The reference picture counts as one more latent frame. This clip has"
    )
    chosen = (
        "*Balanced* keeps the first 12 % of the steps dense. Of 4 steps that rounds to none, so "
        "the search takes place in the very first step: steps 0 search, 1-3 sparse. A search step "
        "runs in full."
    )
    change = (
        "*preset*: Quality if something looks wrong. Then Custom with *warmup* 0.25, which keeps "
        "the first step dense and searches in the second."
    )
    notes(graph, note(intro, place, chosen, change))
    return graph


def graphs() -> list[Graph]:
    return [
        wan_5b("wan2_2_5b_t2v_i2v"),
        wan_5b_in_a_box("wan2_2_5b_t2v_subgraph"),
        vace("wan2_1_vace_14b_reference_4_step_lora"),
    ]
