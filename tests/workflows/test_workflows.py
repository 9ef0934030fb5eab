import json
import re
import urllib.request
import uuid
from dataclasses import replace
from itertools import combinations, pairwise
from math import exp
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sparse_attn.config import AdaSpaConfig, from_preset
from sparse_attn.schedule import plan
from tests.workflows.workflow_builder import TITLE_HEIGHT, VERSIONS, pairs
from tests.workflows.workflow_flat import levels, unfold
from tests.workflows.workflow_graphs import WORKFLOWS, graphs
from tests.workflows.workflow_nodes import NODES
from tests.workflows.workflow_thumbnails import HEIGHT, MOST_BYTES, WIDTH, draw

FILES = {path.stem: path for path in sorted(WORKFLOWS.glob("*.json"))}
# nodes of ours and how many models each serves
SERVES = {"AdaSpaAttention": 1, "AdaSpaAttentionPair": 2}
OURS = (*SERVES, "AdaSpaReport")
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustomAdvanced")
LOADERS = ("UNETLoader", "CheckpointLoaderSimple")
LORAS = ("LoraLoader", "LoraLoaderModelOnly")
# what may follow our node
AFTER = (
    "ModelSamplingSD3",
    "WanContextWindowsManual",
    "CFGGuider",
    "BasicGuider",
    "BasicScheduler",
)
# the value of these widgets is a file, which a server lists only if it has it
FILE_WIDGETS = (
    "unet_name",
    "ckpt_name",
    "clip_name",
    "clip_name1",
    "clip_name2",
    "text_encoder",
    "vae_name",
    "lora_name",
    "model_name",
)
FOLDERS = {
    "checkpoints",
    "clip_vision",
    "diffusion_models",
    "latent_upscale_models",
    "loras",
    "text_encoders",
    "vae",
}


BOXED = "wan2_2_5b_t2v_subgraph"


# beside these widgets stands a button, which has a value too
UPLOADS = {("LoadImage", "image"), ("LoadImageMask", "image"), ("LoadVideo", "file")}


@pytest.fixture(params=FILES)
def stored(request):
    """A workflow as it lies in its file."""
    return json.loads(FILES[request.param].read_text(encoding="utf-8"))


@pytest.fixture
def workflow(stored):
    """A workflow as it runs, with subgraphs unfolded."""
    return unfold(stored)


def by_id(workflow):
    return {node["id"]: node for node in workflow["nodes"]}


def nodes_of(workflow, *kinds):
    return [node for node in workflow["nodes"] if node["type"] in kinds]


def values_of(node):
    """Widget values by name; the control after a seed and an upload button have no input."""
    values = list(node["widgets_values"])
    named = {}
    for name, _ in pairs(NODES[node["type"]][1]):
        named[name] = values.pop(0)
        if name in ("seed", "noise_seed"):
            assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
        if (node["type"], name) in UPLOADS:
            assert values.pop(0) == "image"
    assert not values, f"{node['type']} has values without a widget: {values}"
    return named


def source(workflow, node, name):
    """The node that feeds an input."""
    link = next(slot["link"] for slot in node["inputs"] if slot["name"] == name)
    return by_id(workflow)[next(entry[1] for entry in workflow["links"] if entry[0] == link)]


def upstream(workflow, node, names, kinds):
    """The first node of one of `kinds`, following the first wired input of these names."""
    while True:
        wired = [slot["name"] for slot in node["inputs"] if slot["link"]]
        node = source(workflow, node, next(name for name in names if name in wired))
        if node["type"] in kinds:
            return node


def notes(workflow):
    return "\n".join(node["widgets_values"][0] for node in nodes_of(workflow, "MarkdownNote"))


def test_files_are_what_the_builder_writes():
    assert {name: path.read_text(encoding="utf-8") for name, path in FILES.items()} == {
        graph.name: graph.as_json() for graph in graphs()
    }


def test_names_tell_model_and_task():
    assert list(FILES) == [
        "cogvideox_1_5_void_repaint",
        "hunyuanvideo_1_5_i2v",
        "hunyuanvideo_1_5_t2v",
        "kandinsky5_t2v",
        "ltx_2_3_i2v",
        "ltx_2_3_t2v",
        "minimax_h3_i2v",
        "minimax_h3_t2v",
        "wan2_1_vace_14b_reference_4_step_lora",
        "wan2_2_14b_i2v",
        "wan2_2_14b_t2v",
        "wan2_2_14b_t2v_4_step_lora",
        "wan2_2_14b_t2v_long_context_windows",
        "wan2_2_5b_t2v_i2v",
        BOXED,
    ]


@pytest.mark.parametrize("graph", graphs(), ids=lambda graph: graph.name)
def test_thumbnail_is_the_picture_of_its_graph(graph):
    path = WORKFLOWS / f"{graph.name}.jpg"
    assert path.stat().st_size <= MOST_BYTES
    with Image.open(path) as image:
        assert (image.format, image.size) == ("JPEG", (WIDTH, HEIGHT))
        stored = np.asarray(image.convert("RGB"), dtype=int)
    drawn = draw(graph)
    assert drawn.size == (WIDTH, HEIGHT)
    # JPEG and another Pillow's font blur edges; a picture of another graph is further away
    assert np.abs(stored - np.asarray(drawn, dtype=int)).mean() < 2.5


def test_every_thumbnail_has_a_graph():
    assert sorted(path.stem for path in WORKFLOWS.glob("*.jpg")) == list(FILES)


def test_graph_is_of_the_interface_format(workflow):
    assert workflow["version"] == 0.4
    assert {"nodes", "links", "groups", "config", "extra"} <= workflow.keys()
    uuid.UUID(workflow["id"])
    assert workflow["last_node_id"] == max(by_id(workflow))
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    assert len(by_id(workflow)) == len(workflow["nodes"])


def test_ids_differ_between_workflows():
    ids = {json.loads(path.read_text(encoding="utf-8"))["id"] for path in FILES.values()}
    assert len(ids) == len(FILES)


def test_links_agree_with_both_ends(workflow):
    nodes = by_id(workflow)
    for link, from_node, from_slot, to_node, to_slot, kind in workflow["links"]:
        out, slot = nodes[from_node]["outputs"][from_slot], nodes[to_node]["inputs"][to_slot]
        assert link in out["links"] and slot["link"] == link
        assert out["type"] == slot["type"] == kind
    links = {link[0] for link in workflow["links"]}
    ends = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"]]
    starts = [link for node in nodes.values() for out in node["outputs"] for link in out["links"]]
    assert sorted(ends) == sorted(starts) == sorted(links)


def test_every_needed_socket_is_wired(workflow):
    for node in workflow["nodes"]:
        for slot in node["inputs"]:
            if "widget" not in slot and slot.get("shape") != 7:
                assert slot["link"], f"{node['type']} {node['id']}: {slot['name']}"


def test_every_widget_has_a_value(workflow):
    for node in workflow["nodes"]:
        if node["type"] != "MarkdownNote":
            assert all(value is not None for value in values_of(node).values())


def rectangle(node):
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def test_nodes_do_not_overlap(stored):
    for level in levels(stored):
        for a, b in combinations(level["nodes"], 2):
            left, right = rectangle(a), rectangle(b)
            apart = any(left[i + 2] <= right[i] or right[i + 2] <= left[i] for i in (0, 1))
            assert apart, f"{a['type']} {a['id']} and {b['type']} {b['id']}"


def test_every_node_but_the_notes_lies_in_one_group(stored):
    for level in levels(stored):
        for node in level["nodes"]:
            x0, y0, x1, y1 = rectangle(node)
            around = [
                group["title"]
                for group in level["groups"]
                for x, y, width, height in [group["bounding"]]
                if x < x0 and y < y0 and x1 < x + width and y1 < y + height
            ]
            assert len(around) == (node["type"] != "MarkdownNote"), (node["type"], around)


def test_nodes_name_their_pack_and_version(workflow):
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        pack = "adaspa" if node["type"] in OURS else "comfy-core"
        assert node["properties"]["cnr_id"] == pack
        assert node["properties"]["ver"] == VERSIONS[pack]
        assert node["properties"]["Node name for S&R"] == node["type"]


def test_every_model_file_can_be_downloaded(workflow):
    for node in workflow["nodes"]:
        names = [v for v in node["widgets_values"] if str(v).endswith(".safetensors")]
        models = node["properties"].get("models", [])
        assert names == [model["name"] for model in models]
        for model in models:
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/{model['name']}")
            assert model["directory"] in FOLDERS
            assert f"`models/{model['directory']}`: [{model['name']}]({model['url']})" in notes(
                workflow
            )


def test_our_node_sits_between_model_and_sampling(workflow):
    """Every use of a model leads through our node, behind the LoRA if there is one."""
    nodes, models = by_id(workflow), nodes_of(workflow, *LOADERS, *LORAS)
    served = sum(SERVES[node["type"]] for node in nodes_of(workflow, *SERVES))
    assert served == len(nodes_of(workflow, *SAMPLERS))
    for link, from_node, _, to_node, _, kind in workflow["links"]:
        source, target = nodes[from_node], nodes[to_node]
        if kind == "MODEL" and source in models:
            assert target["type"] in (*SERVES, *LORAS), link
        if kind == "MODEL" and source["type"] in SERVES:
            assert target["type"] in AFTER, link
        if kind == "MODEL" and target["type"] in SERVES:
            lora = nodes_of(workflow, *LORAS)
            assert source["type"] in (LORAS if lora else LOADERS), link


def test_report_reads_the_node_that_patched_its_sampler(workflow):
    samplers = nodes_of(workflow, *SAMPLERS)
    reports = nodes_of(workflow, "AdaSpaReport")
    if nodes_of(workflow, "AdaSpaAttentionPair"):
        # one report of both runs, after the second
        first, *samplers = samplers
        assert upstream(workflow, samplers[0], ("latent_image",), SAMPLERS) is first
    assert [source(workflow, report, "samples") for report in reports] == samplers
    for report, sampler in zip(reports, samplers, strict=True):
        patched = upstream(workflow, sampler, ("guider", "model"), SERVES)
        assert source(workflow, report, "adaspa") is patched
    for decoded in nodes_of(
        workflow, "VAEDecode", "VAEDecodeTiled", "VAEDecodeAudio", "LTXVAudioVAEDecode"
    ):
        found = upstream(workflow, decoded, ("samples", "av_latent"), ("AdaSpaReport",))
        assert found is reports[-1]


def test_widgets_hold_what_the_preset_stands_for(workflow):
    defaults = AdaSpaConfig()
    for node in nodes_of(workflow, *SERVES):
        values = values_of(node)
        preset = from_preset(values["preset"])
        assert values["sparsity"] == preset.sparsity
        assert values["block_size"] == str(preset.block_size)
        assert values["warmup"] == preset.warmup
        assert values["search_points"] == ", ".join(map(str, preset.search_points))
        assert values["head_adaptive"] == preset.head_adaptive
        assert values["dense_layers"] == ""
        for name in ("start_percent", "end_percent", "min_tokens", "cache", "dense_attention",
                     "precision", "recall", "tail", "token_order"):  # fmt: skip
            assert values[name] == getattr(defaults, name)
        assert values["enabled"] is True


def straight(sigma):
    return 1 - sigma


def ltx_progress(sigma):
    """Inverse of the time shift that LTX-Video's schedule has, by 2.37."""
    return 1 - 1 / (1 + exp(2.37) * (1 / sigma - 1)) if sigma else 1.0


def runs(workflow):
    """(sigmas, progress of a sigma) of every sampler."""
    for sampler in nodes_of(workflow, *SAMPLERS):
        schedule = sampler
        if sampler["type"] == "SamplerCustomAdvanced":
            schedule = source(workflow, sampler, "sigmas")
        values = values_of(schedule)
        if schedule["type"] == "ManualSigmas":
            yield [float(sigma) for sigma in values["sigmas"].split(",")], ltx_progress
            continue
        total = values["steps"]
        first, last = values.get("start_at_step", 0), values.get("end_at_step", total)
        yield [1 - step / total for step in range(first, last + 1)], straight


def test_samplers_run_the_whole_schedule(workflow):
    """Once, where a sampler takes over from another; LTX adds noise again in between."""
    at = 0.0
    for sigmas, progress in runs(workflow):
        begin, end = progress(sigmas[0]), progress(sigmas[-1])
        assert begin == at or (progress is ltx_progress and begin < at)
        assert begin < end
        at = end
    assert at == 1


def test_note_names_the_steps_that_the_schedule_gives(workflow):
    patched = [node for node in nodes_of(workflow, *SERVES) for _ in range(SERVES[node["type"]])]
    for node, (sigmas, progress) in zip(patched, runs(workflow), strict=True):
        schedule = plan(sigmas, progress, from_preset(values_of(node)["preset"]))
        assert schedule.describe().removeprefix("steps ") in notes(workflow)


@pytest.mark.parametrize(
    ("name", "steps", "config"),
    [
        ("minimax_h3_t2v", 6, from_preset("Balanced")),
        ("minimax_h3_i2v", 6, from_preset("Balanced")),
        ("wan2_1_vace_14b_reference_4_step_lora", 4, replace(from_preset("Balanced"), warmup=0.25)),
    ],
)
def test_advice_of_the_note_does_what_it_says(name, steps, config):
    workflow = json.loads(FILES[name].read_text("utf-8"))
    sigmas = [1 - step / steps for step in range(steps + 1)]
    described = plan(sigmas, straight, config).describe().removeprefix("steps ")
    if steps == 6:
        assert f"6 steps it becomes {described};" in notes(workflow)
    else:
        assert described == "0 dense, 1 search, 2-3 sparse"
        said = f"*warmup* {config.warmup}, which keeps the first step dense and searches in the"
        assert said in notes(workflow)


# edge of a token in pixels, latent frames of a length, distance between lengths
FOURS = (16, lambda length: (length - 1) // 4 + 1, 4)
SIZES = {
    "VOIDInpaintConditioning": (16, lambda length: ((length - 1) // 4 + 1) // 2, 8),
    "EmptyHunyuanLatentVideo": FOURS,
    "EmptyHunyuanVideo15Latent": FOURS,
    "EmptyLTXVLatentVideo": (32, lambda length: (length - 1) // 8 + 1, 8),
    "HunyuanVideo15ImageToVideo": FOURS,
    "Kandinsky5ImageToVideo": FOURS,
    "MiniMaxH3ImageToVideo": (32, lambda length: (length - 5) // 17 * 5 + 2, 17),
    "Wan22ImageToVideoLatent": (32, *FOURS[1:]),
    "WanImageToVideo": FOURS,
    "WanVaceToVideo": (16, lambda length: (length - 1) // 4 + 2, 4),
}


def sizes(workflow):
    """(width, height, length, rule) of every video that is sampled."""
    (node,) = nodes_of(workflow, *SIZES)
    width, height, length = (values_of(node)[name] for name in ("width", "height", "length"))
    for window in nodes_of(workflow, "WanContextWindowsManual"):
        length = values_of(window)["context_length"]
    yield width, height, length, SIZES[node["type"]]
    if nodes_of(workflow, "LTXVLatentUpsampler"):
        yield 2 * width, 2 * height, length, SIZES[node["type"]]


def test_note_counts_the_tokens_of_this_video(workflow):
    for width, height, length, (pixels, frames, step) in sizes(workflow):
        plane = (width // pixels) * (height // pixels)
        assert width % pixels == height % pixels == 0
        assert f"{plane * frames(length):,} tokens" in notes(workflow)
        assert plane * frames(length) > AdaSpaConfig().min_tokens
        assert f"{AdaSpaConfig().min_tokens:,} tokens" in notes(workflow)
        lengths = range(length % step or step, length + 1, step)
        begins = next(n for n in lengths if plane * frames(n) >= AdaSpaConfig().min_tokens)
        assert f"At {width} x {height} that is passed from {begins} frames on" in notes(workflow)


def test_note_says_what_was_measured(stored):
    results = WORKFLOWS.parent / "tests" / "bench" / "results" / "families_h200.json"
    stacks = json.loads(results.read_text("utf-8"))["stacks"].values()
    named = [stack for stack in stacks if f" layers of {stack['model']} at " in notes(stored)]
    (stack,) = named
    said = (
        f"at {stack['tokens']:,} tokens ({stack['video']}) took {stack['seconds']['dense']:.2f} s"
    )
    assert said in notes(stored)
    assert stack["hardware"] in notes(stored) and not stack["errors"]


def test_long_video_is_cut_into_the_windows_that_the_note_counts(comfyui):
    from comfy.context_windows import ContextSchedules, get_matching_context_schedule

    workflow = json.loads(FILES["wan2_2_14b_t2v_long_context_windows"].read_text("utf-8"))
    first, second = (values_of(n) for n in nodes_of(workflow, "WanContextWindowsManual"))
    assert first == second
    # windows that moved would need a search at every step
    assert first["context_schedule"] == ContextSchedules.STATIC_STANDARD
    (size,) = nodes_of(workflow, "EmptyHunyuanLatentVideo")
    length = values_of(size)["length"]
    handler = SimpleNamespace(
        context_length=(first["context_length"] - 1) // 4 + 1,
        context_overlap=first["context_overlap"] // 4,
    )
    schedule = get_matching_context_schedule(first["context_schedule"])
    windows = schedule.func((length - 1) // 4 + 1, handler, {})
    starts = [window[0] for window in windows]
    # evenly, so that no two overlap more than they say
    assert len({b - a for a, b in pairwise(starts)}) == 1
    assert f"{length} frames long" in notes(workflow)
    assert f"{len(windows)} windows of {first['context_length']} frames" in notes(workflow)
    assert f"by {first['context_overlap']};" in notes(workflow)
    assert length > 4 * first["context_length"]


def test_seed_stays_the_same_for_comparing(workflow):
    for node in workflow["nodes"]:
        if node["type"] in ("KSampler", "KSamplerAdvanced", "RandomNoise"):
            assert "fixed" in node["widgets_values"]


# against a running ComfyUI


def fetch(server, path):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.url + path, timeout=60) as response:
        return response.read()


def get(server, path):
    return json.loads(fetch(server, path))


@pytest.fixture(scope="module")
def object_info(comfy_server):
    return get(comfy_server, "/object_info")


def declared(info):
    """The inputs of a node type by name, in order: (type, options)."""
    order = [name for part in ("required", "optional") for name in info["input"].get(part, {})]
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    return {name: (inputs[name][0], (inputs[name] + [{}])[1]) for name in order}


def options_of(kind, extra):
    return kind if isinstance(kind, list) else extra.get("options")


def test_server_knows_every_node_with_these_inputs(workflow, object_info):
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":  # lives in the interface only
            continue
        info = object_info[node["type"]]
        inputs = declared(info)
        names = [slot["name"] for slot in node["inputs"]]
        assert set(names) <= set(inputs), node["type"]
        assert set(info["input"].get("required", {})) <= set(names), node["type"]
        for slot in node["inputs"]:
            kind, _ = inputs[slot["name"]]
            if "widget" not in slot:
                assert slot["type"] == kind, (node["type"], slot["name"])
        assert [out["type"] for out in node["outputs"]] == info["output"], node["type"]
        assert [out["name"] for out in node["outputs"]] == info["output_name"], node["type"]


def test_server_takes_every_widget_value(workflow, object_info):
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        inputs = declared(object_info[node["type"]])
        for name, value in values_of(node).items():
            if name in FILE_WIDGETS or (node["type"], name) in UPLOADS:
                continue
            kind, extra = inputs[name]
            where = f"{node['type']} {name} {value!r}"
            if options := options_of(kind, extra):
                keys = [option["key"] if isinstance(option, dict) else option for option in options]
                assert value in keys, where
            elif kind in ("INT", "FLOAT", "FLOAT,INT"):
                assert extra.get("min", value) <= value <= extra.get("max", value), where
            elif kind == "BOOLEAN":
                assert isinstance(value, bool), where
            else:
                assert kind == "STRING" and isinstance(value, str), where


@pytest.mark.parametrize("kind", OURS)
def test_our_widgets_stand_in_the_order_of_the_server(kind, object_info):
    sockets, widgets, _ = (dict(pairs(text)) for text in NODES[kind])
    info = object_info[kind]
    assert set(declared(info)) == {*sockets, *widgets}
    for ours in (sockets, widgets):
        assert [name for name in declared(info) if name in ours] == list(ours)
    assert info["category"] == "model/patch"


def test_preset_of_the_files_is_the_default(object_info):
    inputs = declared(object_info["AdaSpaAttention"])
    first = next(graph for graph in graphs() if graph.name == "wan2_2_14b_t2v")
    (values, *_) = [values_of(node) for node in first.nodes if node["type"] == "AdaSpaAttention"]
    for name, value in values.items():
        kind, extra = inputs[name]
        assert value == extra.get("default", (options_of(kind, extra) or [None])[0]), name


def test_template_browser_offers_the_files(comfy_server):
    offered = get(comfy_server, "/workflow_templates")
    (pack,) = [name for name, files in offered.items() if set(files) & set(FILES)]
    assert sorted(offered[pack]) == list(FILES)
    for name, path in FILES.items():
        served = get(comfy_server, f"/api/workflow_templates/{pack}/{name}.json")
        assert served == json.loads(path.read_text(encoding="utf-8"))
        picture = fetch(comfy_server, f"/api/workflow_templates/{pack}/{name}.jpg")
        assert picture == path.with_suffix(".jpg").read_bytes()


def test_prompts_avoid_what_a_note_cannot_show(workflow):
    for node in nodes_of(workflow, "MarkdownNote"):
        text = node["widgets_values"][0]
        # a single line break inside a paragraph would be shown as one
        assert not re.search(r"[^\n\-]\n[^\n\-#]", text), text
