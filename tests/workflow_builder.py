"""Nodes, links and groups as ComfyUI's interface stores them, for the files in workflows/.

What the graphs contain is in workflow_graphs.py.
"""

import json
import uuid

VERSIONS = {"adaspa": "0.1.0", "comfy-core": "0.30.0"}

# type: (sockets, widgets, outputs), each "name:TYPE"; "?" marks a socket that may stay empty
NODES = {
    "AdaSpaAttention": (
        "model:MODEL",
        "preset:COMBO sparsity:FLOAT block_size:COMBO warmup:FLOAT search_points:STRING "
        "head_adaptive:BOOLEAN dense_layers:STRING start_percent:FLOAT end_percent:FLOAT "
        "min_tokens:INT cache:COMBO dense_attention:COMBO enabled:BOOLEAN",
        "model:MODEL adaspa:ADASPA",
    ),
    "AdaSpaReport": (
        "samples:LATENT adaspa:ADASPA?",
        "layer:INT head:INT",
        "samples:LATENT picture:IMAGE text:STRING",
    ),
    "BasicScheduler": ("model:MODEL", "scheduler:COMBO steps:INT denoise:FLOAT", "SIGMAS:SIGMAS"),
    "CFGGuider": (
        "model:MODEL positive:CONDITIONING negative:CONDITIONING",
        "cfg:FLOAT",
        "GUIDER:GUIDER",
    ),
    "CLIPLoader": ("", "clip_name:COMBO type:COMBO device:COMBO", "CLIP:CLIP"),
    "CLIPTextEncode": ("clip:CLIP", "text:STRING", "CONDITIONING:CONDITIONING"),
    "CreateVideo": ("images:IMAGE audio:AUDIO?", "fps:FLOAT bit_depth:INT", "VIDEO:VIDEO"),
    "DualCLIPLoader": (
        "",
        "clip_name1:COMBO clip_name2:COMBO type:COMBO device:COMBO",
        "CLIP:CLIP",
    ),
    "EmptyHunyuanLatentVideo": (
        "",
        "width:INT height:INT length:INT batch_size:INT",
        "LATENT:LATENT",
    ),
    "EmptyHunyuanVideo15Latent": (
        "",
        "width:INT height:INT length:INT batch_size:INT",
        "LATENT:LATENT",
    ),
    "KSamplerAdvanced": (
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT",
        "add_noise:COMBO noise_seed:INT steps:INT cfg:FLOAT sampler_name:COMBO scheduler:COMBO "
        "start_at_step:INT end_at_step:INT return_with_leftover_noise:COMBO",
        "LATENT:LATENT",
    ),
    "KSamplerSelect": ("", "sampler_name:COMBO", "SAMPLER:SAMPLER"),
    "LoadImage": ("", "image:COMBO", "IMAGE:IMAGE MASK:MASK"),
    "LoraLoaderModelOnly": ("model:MODEL", "lora_name:COMBO strength_model:FLOAT", "MODEL:MODEL"),
    "MarkdownNote": ("", "", ""),
    "ModelSamplingSD3": ("model:MODEL", "shift:FLOAT", "MODEL:MODEL"),
    "RandomNoise": ("", "noise_seed:INT", "NOISE:NOISE"),
    "SamplerCustomAdvanced": (
        "noise:NOISE guider:GUIDER sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT",
        "",
        "output:LATENT denoised_output:LATENT",
    ),
    "SaveVideo": ("video:VIDEO", "filename_prefix:STRING format:COMBO codec:COMBO", "video:VIDEO"),
    "UNETLoader": ("", "unet_name:COMBO weight_dtype:COMBO", "MODEL:MODEL"),
    "VAEDecode": ("samples:LATENT vae:VAE", "", "IMAGE:IMAGE"),
    "VAELoader": ("", "vae_name:COMBO", "VAE:VAE"),
    "WanImageToVideo": (
        "positive:CONDITIONING negative:CONDITIONING vae:VAE "
        "clip_vision_output:CLIP_VISION_OUTPUT? start_image:IMAGE?",
        "width:INT height:INT length:INT batch_size:INT",
        "positive:CONDITIONING negative:CONDITIONING latent:LATENT",
    ),
}

COLORS = {
    "AdaSpaAttention": {"color": "#24534a", "bgcolor": "#2c3f3b"},
    "AdaSpaReport": {"color": "#24534a", "bgcolor": "#2c3f3b"},
    "MarkdownNote": {"color": "#4a4023", "bgcolor": "#2f2b1f"},
}

TITLE_HEIGHT = 30
GAP = 80


def pairs(text: str) -> list[tuple[str, str]]:
    return [tuple(item.split(":")) for item in text.split()]


class Column:
    """Places nodes below each other."""

    def __init__(self, x: int, width: int, y: int = 0):
        self.x, self.width, self.y = x, width, y

    def next(self, height: int) -> tuple[list[int], list[int]]:
        at = [self.x, self.y], [self.width, height]
        self.y += height + GAP
        return at


class Graph:
    def __init__(self, name: str):
        self.name, self.nodes, self.links, self.groups = name, [], [], []

    def add(self, kind, at, values=(), title=None, models=(), **sources) -> dict:
        """A node; `at` is (position, size), each keyword a socket and the output that feeds it."""
        sockets, widgets, outputs = (pairs(text) for text in NODES[kind])
        properties = {}
        if kind != "MarkdownNote":
            pack = "adaspa" if kind.startswith("AdaSpa") else "comfy-core"
            properties = {"cnr_id": pack, "ver": VERSIONS[pack], "Node name for S&R": kind}
        if models:
            properties["models"] = [
                {"name": url.rsplit("/", 1)[1], "url": url, "directory": url.rsplit("/", 2)[1]}
                for url in models
            ]
        node = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": at[0],
            "size": at[1],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [
                {"name": n, "type": t.rstrip("?"), "link": None}
                | ({"shape": 7} if t.endswith("?") else {})
                for n, t in sockets
            ]
            + [{"name": n, "type": t, "widget": {"name": n}, "link": None} for n, t in widgets],
            "outputs": [{"name": n, "type": t, "links": []} for n, t in outputs],
            "properties": properties,
            "widgets_values": list(values),
        }
        if title:
            node["title"] = title
        node |= COLORS.get(kind, {})
        self.nodes.append(node)
        for name, (source, output) in sources.items():
            self.link(source, output, node, name)
        return node

    def link(self, source: dict, output: str, target: dict, name: str) -> None:
        from_slot = [out["name"] for out in source["outputs"]].index(output)
        to_slot = [slot["name"] for slot in target["inputs"]].index(name)
        out, slot = source["outputs"][from_slot], target["inputs"][to_slot]
        slot["link"] = len(self.links) + 1
        out["links"].append(slot["link"])
        self.links.append(
            [slot["link"], source["id"], from_slot, target["id"], to_slot, out["type"]]
        )

    def group(self, title: str, nodes: list[dict], color: str = "#7d97a5") -> None:
        left = min(node["pos"][0] for node in nodes) - 40
        top = min(node["pos"][1] for node in nodes) - TITLE_HEIGHT - 60
        right = max(node["pos"][0] + node["size"][0] for node in nodes) + 40
        bottom = max(node["pos"][1] + node["size"][1] for node in nodes) + 40
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": [left, top, right - left, bottom - top],
                "color": color,
                "font_size": 24,
                "flags": {},
            }
        )

    def as_json(self) -> str:
        workflow = {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"adaspa/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.5, "offset": [640, 240]}},
            "version": 0.4,
        }
        return json.dumps(workflow, indent=2, ensure_ascii=False) + "\n"
