"""A real ComfyUI server runs whole graphs through its HTTP interface."""

import asyncio
import io
import json
import re
import uuid

import pytest

from tests.tools.comfy_server import PromptFailed


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(model="wan_h64", override=None, seed=1, **widgets):
    """UNETLoader -> AdaSpaAttention -> KSampler -> AdaSpaReport -> SaveLatent.

    Args:
        override: "before" or "after" puts another pack's attention node beside ours.
    """
    settings = {
        "preset": "Custom", "sparsity": 0.6, "block_size": "64", "warmup": 0.5,
        "search_points": "", "head_adaptive": False, "dense_layers": "", "start_percent": 0.0,
        "end_percent": 1.0, "min_tokens": 64, "cache": "auto", "dense_attention": "host",
        "enabled": True, "precision": "auto", "recall": 0.0,
        "tail": "pooled", "token_order": "similarity", "verdict": "sparse",
    }  # fmt: skip
    source = ["override", 0] if override == "before" else ["loader", 0]
    prompt = {
        "loader": node(
            "UNETLoader", unet_name=f"tiny_{model}.safetensors", weight_dtype="default"
        ),
        "adaspa": node("AdaSpaAttention", model=source, **{**settings, **widgets}),
        "positive": node("AdaSpaHostTestPrompt", tokens=7, seed=0),
        "negative": node("AdaSpaHostTestPrompt", tokens=9, seed=1),
        "latent": node(
            "EmptyHunyuanLatentVideo", width=192, height=128, length=9, batch_size=1
        ),
        "sampler": node(
            "KSampler", model=["override", 0] if override == "after" else ["adaspa", 0],
            seed=seed, steps=4, cfg=5.0, sampler_name="euler", scheduler="simple",
            positive=["positive", 0], negative=["negative", 0], latent_image=["latent", 0],
            denoise=1.0,
        ),
        "report": node(
            "AdaSpaReport", samples=["sampler", 0], adaspa=["adaspa", 1], layer=0, head=0
        ),
        "save": node("SaveLatent", samples=["report", 0], filename_prefix="host"),
    }  # fmt: skip
    if override:
        source = ["loader", 0] if override == "before" else ["adaspa", 0]
        prompt["override"] = node("AdaSpaHostTestOverride", model=source)
        prompt["calls"] = node("AdaSpaHostTestCalls", samples=["sampler", 0], calls=["override", 1])
    return prompt


def text_of(entry, name):
    (text,) = entry["outputs"][name]["text"]
    return text


def messages_of(server, prompt):
    """Run a prompt with a websocket open; returns the messages that came while it ran."""
    import aiohttp

    client = uuid.uuid4().hex

    async def listen():
        address = server.url.replace("http://", "ws://") + f"/ws?clientId={client}"
        found = []
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
            body = {"prompt": prompt, "client_id": client}
            await asyncio.to_thread(server.request, "/prompt", body)
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    found.append(("binary", bytes(message.data)))
                    continue
                data = json.loads(message.data)
                found.append((data["type"], data["data"]))
                if data["type"] in ("execution_success", "execution_error"):
                    return found

    return asyncio.run(asyncio.wait_for(listen(), 120))


def test_whole_graph_runs_and_reports(comfy_server):
    from PIL import Image

    entry = comfy_server.post(graph())
    text = text_of(entry, "report")
    assert "\n288 tokens, steps 1-2 dense, 3 search, 4 sparse, density 0.40" in text
    assert "Not the video's self-attention: 16 calls, cross-attention or grouped heads" in text
    assert "Kept dense" not in text
    (file,) = entry["outputs"]["report"]["images"]
    picture = Image.open(io.BytesIO(comfy_server.view(file)))
    assert picture.size[0] == 1120 and picture.size[1] > 400
    assert text_of(entry, "adaspa") == "Ready: Custom, sparsity 0.60."
    (latent,) = entry["outputs"]["save"]["latents"]
    assert len(comfy_server.view(latent)) > 16 * 3 * 16 * 24 * 2
    # one line per run in the log
    assert re.search(
        r"AdaSpa: .* 288 tokens, steps 1-2 dense, 3 search, 4 sparse", comfy_server.log
    )
    assert "AdaSpa: AdaSpa" not in comfy_server.log


def test_node_shows_its_progress_while_the_sampler_runs(comfy_server):
    found = messages_of(comfy_server, graph(seed=11))
    assert found[-1][0] == "execution_success"
    status = [data for kind, data in found if kind == "adaspa.status"]
    assert all(data["node"] == "adaspa" for data in status)
    assert [data["step"] for data in status] == [0, 1, 2, 3, 3]
    assert [data["done"] for data in status] == [False] * 4 + [True]
    assert status[0]["steps"] == ["dense", "dense", "search", "sparse"]
    assert status[0]["text"].startswith("Step 1 of 4: dense.")
    assert status[3]["text"].startswith("Step 4 of 4: sparse.\nDensity 0.40, recall 0.")
    assert "\n288 tokens, " in status[4]["text"]
    assert [line["text"] for line in status[4]["said"]] == status[4]["text"].split("\n")
    assert status[3]["said"][0]["code"] == "step_sparse"
    # event 3 is the text under the node
    texts = [data for kind, data in found if kind == "binary" and data[:4] == b"\0\0\0\3"]
    assert any(b"adaspa" in data and b"Step 4 of 4" in data for data in texts)


def test_new_seed_reruns_the_sampler_alone(comfy_server):
    first = comfy_server.post(graph(seed=21, min_tokens=65))
    assert "adaspa" not in cached(first)
    second = comfy_server.post(graph(seed=22, min_tokens=65))
    assert "adaspa" in cached(second) and "sampler" not in cached(second)
    assert "288 tokens, steps 1-2 dense, 3 search, 4 sparse" in text_of(second, "report")
    third = comfy_server.post(graph(seed=21, min_tokens=65))
    assert "adaspa" in cached(third) and "sampler" not in cached(third)
    latents = [comfy_server.view(run["outputs"]["save"]["latents"][0]) for run in (first, third)]
    # the tensors lie at the end; the header in front names the prompt
    size = 16 * 3 * 16 * 24 * 4
    assert latents[0][-size:] == latents[1][-size:]


def cached(entry):
    """Nodes whose earlier output served."""
    (found,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_cached"]
    return found["nodes"]


@pytest.mark.parametrize("order", ["before", "after"])
def test_another_packs_attention_serves_what_is_not_ours(comfy_server, order):
    entry = comfy_server.post(graph(override=order, seed=31))
    made = json.loads(text_of(entry, "calls"))
    # two layers, four steps: cross-attention of both prompts
    assert made["288x7"] == made["288x9"] == 8
    # the first dense step; the second keeps its LSE where the search can use it
    assert made["288x288"] in (4, 8)
    assert "steps 1-2 dense, 3 search, 4 sparse" in text_of(entry, "report")


def test_hunyuan_runs_on_the_server(comfy_server):
    entry = comfy_server.post(graph("hunyuan", warmup=0.0))
    assert "steps 1 search, 2-4 sparse" in text_of(entry, "report")
    assert "Model: HunyuanVideo" in text_of(entry, "report")


@pytest.mark.parametrize(
    "widgets, words",
    [
        ({"search_points": "0.6, 0.3"}, "`search_points` must ascend"),
        ({"sparsity": 0.2, "head_adaptive": True}, "Raise the sparsity"),
        ({"sparsity": 0.99}, "`sparsity` must be from 0 to 0.98"),
    ],
)
def test_bad_widget_is_refused_with_its_sentence(comfy_server, widgets, words):
    with pytest.raises(PromptFailed) as refused:
        comfy_server.post(graph(**widgets))
    assert words in str(refused.value)
    # the server goes on
    assert comfy_server.get("/system_stats")


def test_server_lists_the_nodes(comfy_server):
    info = comfy_server.object_info()
    assert info["AdaSpaAttention"]["output"] == ["MODEL", "ADASPA"]
    assert info["AdaSpaReport"]["output"] == ["LATENT", "IMAGE", "STRING"]
    assert info["AdaSpaReport"]["output_node"]
    assert info["AdaSpaAttention"]["python_module"] == "custom_nodes.adaspa"
    # nodes of ComfyUI's own may miss a package that nothing here needs
    failed = [line for line in comfy_server.log.splitlines() if "IMPORT FAILED" in line]
    assert not [line for line in failed if "custom_nodes" in line or "adaspa" in line]


def test_the_server_serves_a_help_page_for_every_node(comfy_server):
    from tests.web.test_web import WEB, fetch

    def inputs_of(name):
        order = comfy_server.object_info()[name]["input_order"]
        return {*order.get("required", []), *order.get("optional", [])}

    names = [name for name in comfy_server.object_info() if name.startswith("AdaSpa")]
    names = [name for name in names if "HostTest" not in name]
    pages = {page.stem for page in (WEB / "docs").glob("*.md")}
    # that node is listed only where Raylight is installed
    assert set(names) == pages - {"AdaSpaRaylight"}
    for name in names:
        text = fetch(comfy_server, f"/extensions/adaspa/docs/{name}.md")
        assert text == (WEB / "docs" / f"{name}.md").read_text(encoding="utf-8")
        own = inputs_of(name)
        if name == "AdaSpaAttentionPair":
            # its page names the page of the settings that both have
            assert "*AdaSpa*" in text
            own -= inputs_of("AdaSpaAttention")
        for put in own:
            assert f"**{put}**" in text, (name, put)
