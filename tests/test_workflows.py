import json
import re
import urllib.request
import uuid
from itertools import combinations

import pytest
from workflow_builder import NODES, TITLE_HEIGHT, VERSIONS, pairs
from workflow_graphs import WORKFLOWS, graphs

from sparse_attn.config import AdaSpaConfig, from_preset
from sparse_attn.schedule import plan

FILES = {path.stem: path for path in sorted(WORKFLOWS.glob("*.json"))}
OURS = ("AdaSpaAttention", "AdaSpaReport")
SAMPLERS = ("KSamplerAdvanced", "SamplerCustomAdvanced")
# the value of these widgets is a file, which a server lists only if it has it
FILE_WIDGETS = ("unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "lora_name")


@pytest.fixture(params=FILES)
def workflow(request):
    return json.loads(FILES[request.param].read_text(encoding="utf-8"))


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
        if name == "noise_seed":
            assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
        if name == "image":
            assert values.pop(0) == "image"
    assert not values, f"{node['type']} has values without a widget: {values}"
    return named


def source(workflow, node, name):
    """The node that feeds an input."""
    link = next(slot["link"] for slot in node["inputs"] if slot["name"] == name)
    return by_id(workflow)[next(entry[1] for entry in workflow["links"] if entry[0] == link)]


def upstream(workflow, node, name, kinds):
    """The first node of one of `kinds`, following the input of that name."""
    while True:
        node = source(workflow, node, name)
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
        "hunyuanvideo_1_5_t2v",
        "wan2_2_14b_i2v",
        "wan2_2_14b_t2v",
        "wan2_2_14b_t2v_4_step_lora",
    ]


def test_graph_is_of_the_interface_format(workflow):
    assert workflow["version"] == 0.4
    assert {"nodes", "links", "groups", "config", "extra"} <= workflow.keys()
    uuid.UUID(workflow["id"])
    assert "definitions" not in workflow
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


def test_nodes_do_not_overlap(workflow):
    for a, b in combinations(workflow["nodes"], 2):
        left, right = rectangle(a), rectangle(b)
        apart = any(left[i + 2] <= right[i] or right[i + 2] <= left[i] for i in (0, 1))
        assert apart, f"{a['type']} {a['id']} and {b['type']} {b['id']}"


def test_every_node_but_the_notes_lies_in_one_group(workflow):
    for node in workflow["nodes"]:
        x0, y0, x1, y1 = rectangle(node)
        around = [
            group["title"]
            for group in workflow["groups"]
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
            assert model["url"].startswith("https://huggingface.co/Comfy-Org/")
            assert model["url"].endswith(f"/{model['directory']}/{model['name']}")
            assert f"`models/{model['directory']}`: [{model['name']}]({model['url']})" in notes(
                workflow
            )


def test_our_node_sits_between_model_and_sampling_shift(workflow):
    found = nodes_of(workflow, "AdaSpaAttention")
    assert len(found) == len(nodes_of(workflow, "UNETLoader"))
    loras = nodes_of(workflow, "LoraLoaderModelOnly")
    for node in found:
        assert source(workflow, node, "model")["type"] == (
            "LoraLoaderModelOnly" if loras else "UNETLoader"
        )
    shifts = nodes_of(workflow, "ModelSamplingSD3")
    assert [source(workflow, shift, "model") for shift in shifts] == found


def test_report_reads_the_node_that_patched_its_sampler(workflow):
    samplers = nodes_of(workflow, *SAMPLERS)
    reports = nodes_of(workflow, "AdaSpaReport")
    assert [source(workflow, report, "samples") for report in reports] == samplers
    for report, sampler in zip(reports, samplers, strict=True):
        guided = (
            sampler
            if sampler["type"] == "KSamplerAdvanced"
            else source(workflow, sampler, "guider")
        )
        patched = upstream(workflow, guided, "model", ("AdaSpaAttention",))
        assert source(workflow, report, "adaspa") is patched
    decoded = nodes_of(workflow, "VAEDecode")[0]
    assert source(workflow, decoded, "samples") is reports[-1]


def test_widgets_hold_what_the_preset_stands_for(workflow):
    defaults = AdaSpaConfig()
    for node in nodes_of(workflow, "AdaSpaAttention"):
        values = values_of(node)
        preset = from_preset(values["preset"])
        assert values["sparsity"] == preset.sparsity
        assert values["block_size"] == str(preset.block_size)
        assert values["warmup"] == preset.warmup
        assert values["search_points"] == ", ".join(map(str, preset.search_points))
        assert values["head_adaptive"] == preset.head_adaptive
        assert values["dense_layers"] == ""
        for name in ("start_percent", "end_percent", "min_tokens", "cache", "dense_attention"):
            assert values[name] == getattr(defaults, name)
        assert values["enabled"] is True


def runs(workflow):
    """(total steps, first step, last step) of every sampler."""
    for sampler in nodes_of(workflow, *SAMPLERS):
        if sampler["type"] == "KSamplerAdvanced":
            values = values_of(sampler)
            yield values["steps"], values["start_at_step"], values["end_at_step"]
        else:
            steps = values_of(source(workflow, sampler, "sigmas"))["steps"]
            yield steps, 0, steps


def test_samplers_run_the_whole_schedule_once(workflow):
    steps = [range(first, last) for _, first, last in runs(workflow)]
    (total,) = {total for total, _, _ in runs(workflow)}
    assert [step for part in steps for step in part] == list(range(total))


def test_note_names_the_steps_that_the_schedule_gives(workflow):
    patched = nodes_of(workflow, "AdaSpaAttention")
    for node, (total, first, last) in zip(patched, runs(workflow), strict=True):
        sigmas = [1 - step / total for step in range(first, last + 1)]
        schedule = plan(sigmas, lambda s: 1 - s, from_preset(values_of(node)["preset"]))
        assert schedule.describe() in notes(workflow)


def test_note_counts_the_tokens_of_this_video(workflow):
    (size,) = nodes_of(
        workflow, "EmptyHunyuanLatentVideo", "EmptyHunyuanVideo15Latent", "WanImageToVideo"
    )
    values = values_of(size)
    frames = (values["length"] - 1) // 4 + 1
    tokens = (values["width"] // 16) * (values["height"] // 16) * frames
    assert f"{tokens:,} tokens" in notes(workflow)
    assert tokens > AdaSpaConfig().min_tokens


def test_seed_stays_the_same_for_comparing(workflow):
    for node in workflow["nodes"]:
        if node["type"] in ("KSamplerAdvanced", "RandomNoise"):
            assert "fixed" in node["widgets_values"]


# against a running ComfyUI


def get(server, path):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.url + path, timeout=60) as response:
        return json.load(response)


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
            if name in (*FILE_WIDGETS, "image"):
                continue
            kind, extra = inputs[name]
            where = f"{node['type']} {name} {value!r}"
            if options := options_of(kind, extra):
                keys = [option["key"] if isinstance(option, dict) else option for option in options]
                assert value in keys, where
            elif kind in ("INT", "FLOAT"):
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


def test_prompts_avoid_what_a_note_cannot_show(workflow):
    for node in nodes_of(workflow, "MarkdownNote"):
        text = node["widgets_values"][0]
        # a single line break inside a paragraph would be shown as one
        assert not re.search(r"[^\n\-]\n[^\n\-#]", text), text
