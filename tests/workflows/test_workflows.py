"""The stored graphs: their format, their links, and where our nodes sit."""

import re
import uuid
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from tests.workflows.draw_pictures import COLOURS, MODEL, SIDE, draw
from tests.workflows.stored_graphs import (
    BOXED,
    FILES,
    NEWER,
    OURS,
    SAMPLERS,
    SERVES,
    TWICE,
    by_id,
    levels,
    ltx_progress,
    nodes_of,
    notes,
    read,
    runs,
    source,
    unfold,
    upstream,
    values_of,
)

VERSIONS = {"adaspa": "0.2.0", "comfy-core": "0.30.0"}
TITLE_HEIGHT = 30
MOST_BYTES = 60_000
LOADERS = ("UNETLoader", "CheckpointLoaderSimple")
LORAS = ("LoraLoader", "LoraLoaderModelOnly")
# what may follow our node
AFTER = (
    "ModelSamplingSD3",
    "WanContextWindowsManual",
    "WanAnimate2Cache",
    "CFGGuider",
    "BasicGuider",
    "BasicScheduler",
    "LTXVDualCFGGuider",
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


@pytest.fixture(params=FILES)
def stored(request):
    """A workflow as it lies in its file."""
    return read(FILES[request.param])


@pytest.fixture
def workflow(stored):
    """A workflow as it runs, with subgraphs unfolded."""
    return unfold(stored)


def test_names_are_numbered_and_tell_model_and_task():
    numbers = [path.stem[:3] for path in FILES.values()]
    assert numbers == [f"{number:02} " for number in range(1, len(FILES) + 1)]
    # people make videos from pictures far more often than from words alone
    assert next(iter(FILES)) == "MiniMax-H3 image to video"
    for name in FILES:
        model, task = MODEL.fullmatch(name).groups()
        assert model.split()[0] in COLOURS and task.split()[0].islower(), name
        # what Windows and URLs forbid
        assert re.fullmatch(r"[\w .-]+", name)


def test_every_graph_has_its_picture():
    pictures = {path.stem[3:]: path for path in sorted(FILES[BOXED].parent.glob("*.jpg"))}
    assert list(pictures) == list(FILES)
    drawn = {name: np.asarray(draw(name), float) for name in FILES}
    for name, path in pictures.items():
        assert path.stat().st_size <= MOST_BYTES
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (SIDE, SIDE))
            apart = {other: abs(np.asarray(image) - drawn[other]).mean() for other in FILES}
        # what JPEG loses is far less than what one name differs from another
        assert min(apart, key=apart.get) == name and apart[name] < 6, apart


def test_graph_is_of_the_interface_format(workflow):
    assert workflow["version"] == 0.4
    assert {"nodes", "links", "groups", "config", "extra"} <= workflow.keys()
    uuid.UUID(workflow["id"])
    assert workflow["last_node_id"] == max(by_id(workflow))
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    assert len(by_id(workflow)) == len(workflow["nodes"])


def test_ids_differ_between_workflows():
    ids = {read(path)["id"] for path in FILES.values()}
    assert len(ids) == len(FILES)


def test_links_agree_with_both_ends(workflow):
    nodes = by_id(workflow)
    for link, from_node, from_slot, to_node, to_slot, kind in workflow["links"]:
        out, slot = nodes[from_node]["outputs"][from_slot], nodes[to_node]["inputs"][to_slot]
        assert link in out["links"] and slot["link"] == link
        assert out["type"] == kind and kind in slot["type"].split(",")
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
        newer = NEWER.get(node["type"], {}).get("since")
        assert node["properties"]["ver"] == (newer or VERSIONS[pack])
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
        # what finds people in a picture is no video model
        if kind == "MODEL" and source in models and target["type"] != "SAM3_VideoTrack":
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
        # one decoder for each of two videos that are compared
        assert found is reports[-1] or nodes_of(workflow, "AdaSpaCompare")


def test_samplers_run_the_whole_schedule(workflow):
    """Once, where a sampler takes over from another; LTX adds noise again in between."""
    at = 0.0
    for sigmas, progress in runs(workflow):
        begin, end = progress(sigmas[0]), progress(sigmas[-1])
        assert begin == at or (progress is ltx_progress and begin < at)
        assert begin < end
        at = end
    assert at == 1


def test_seed_stays_the_same_for_comparing(workflow):
    for node in workflow["nodes"]:
        if node["type"] in ("KSampler", "KSamplerAdvanced", "RandomNoise"):
            assert "fixed" in node["widgets_values"]


def test_one_video_is_sampled_with_and_without():
    """All that decides how long and what is equal, and the comparison knows both runs."""
    workflow = read(FILES[TWICE])
    (compare,) = nodes_of(workflow, "AdaSpaCompare")
    samplers = []
    for side, enabled, frames in (("off", False, "dense"), ("on", True, "sparse")):
        node = source(workflow, compare, side)
        assert values_of(node)["enabled"] is enabled
        decoded = source(workflow, compare, frames)
        sampler = upstream(workflow, decoded, ("samples",), SAMPLERS)
        assert upstream(workflow, sampler, ("model",), SERVES) is node
        samplers.append(sampler)
    first, second = samplers
    assert values_of(first) == values_of(second)
    for name in ("positive", "negative", "latent_image"):
        assert source(workflow, first, name) is source(workflow, second, name)
