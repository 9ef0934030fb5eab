import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from sparse_attn.config import PRESET_FIELDS, PRESETS

WEB = Path(__file__).resolve().parents[2] / "web"
NODES = ("AdaSpaAttention", "AdaSpaReport")
ATTENTION_SETTINGS = (
    "preset",
    "sparsity",
    "block_size",
    "warmup",
    "search_points",
    "head_adaptive",
    "dense_layers",
    "start_percent",
    "end_percent",
    "min_tokens",
    "cache",
    "dense_attention",
    "enabled",
    "precision",
    "recall",
    "tail",
    "token_order",
)


def shown(config):
    """The preset's fields as the node's widgets hold them."""
    return {
        "sparsity": config.sparsity,
        "block_size": str(config.block_size),
        "warmup": config.warmup,
        "search_points": ", ".join(map(str, config.search_points)),
        "head_adaptive": config.head_adaptive,
        "tail": config.tail,
        "token_order": config.token_order,
    }


def test_interface_and_python_agree_on_the_presets():
    table = re.search(
        r"export const PRESETS = (\{.*?\n\});", (WEB / "presets.js").read_text(), re.S
    )
    assert json.loads(table[1]) == {name: shown(config) for name, config in PRESETS.items()}
    assert set(shown(PRESETS["Paper"])) == set(PRESET_FIELDS)


def test_one_file_registers_and_the_others_only_export():
    # the interface imports every script it finds, so the helpers must do nothing by themselves
    for path in sorted(WEB.rglob("*.js")):
        text = path.read_text(encoding="utf-8")
        if path.name == "adaspa.js":
            assert text.count("registerExtension(") == 1 and 'name: "AdaSpa.Node"' in text
            continue
        starts = re.findall(r"^(?!\s|[}\])]|//|/\*|$).*", text, re.M)
        allowed = ("import ", "export ", "const ", "function ")
        assert all(line.startswith(allowed) for line in starts), path.name
        assert "scripts/app.js" not in text and "scripts/api.js" not in text, path.name


def test_no_markup_is_made_from_data():
    for path in sorted(WEB.rglob("*.js")):
        found = re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", path.read_text()
        )
        assert not found, f"{path.name}: {found[0]}"


def test_help_explains_every_setting():
    text = (WEB / "docs" / "AdaSpaAttention.md").read_text(encoding="utf-8")
    for name in ATTENTION_SETTINGS:
        assert f"**{name}**" in text, name
    for preset in (*PRESETS, "Custom"):
        assert f"**{preset}**" in text, preset
    text = (WEB / "docs" / "AdaSpaReport.md").read_text(encoding="utf-8")
    for name in ("samples", "adaspa", "layer", "head", "picture", "text"):
        assert f"**{name}**" in text, name


def test_help_gives_the_numbers_of_the_presets():
    text = (WEB / "docs" / "AdaSpaAttention.md").read_text(encoding="utf-8")
    for name, config in PRESETS.items():
        row = re.search(rf"^\| \*\*{name}\*\* \|(.*)$", text, re.M)[1]
        assert f"{config.sparsity:.0%}".replace("%", " %") in row, name
        assert f"{config.warmup:.0%}".replace("%", " %") in row, name


def test_help_counts_tokens_as_its_formulas_do():
    text = (WEB / "docs" / "AdaSpaAttention.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*) \| width / (\d+) × height / (\d+) \| (.*) \| (.*) \|$", text, re.M)
    assert len(rows) == 8
    for name, across, down, frames, examples in rows:
        width, height, length = map(int, re.findall(r"(\d+) × (\d+), (\d+) frames", examples)[0])
        tokens = width // int(across) * (height // int(down))
        half = frames.startswith("half of ")
        formula = frames.removeprefix("half of ").replace("/", "//").replace("−", "-")
        latents = eval(formula.replace("×", "*"), {"frames": length})
        tokens *= -(-latents // 2) if half else latents
        assert f"frames: {tokens:,}" in examples, name
    names = " ".join(row[0] for row in rows)
    for family in ("Wan 2.1", "5B", "HunyuanVideo 1.5", "LTX-2", "MiniMax-H3", "Kandinsky 5",
                   "CogVideoX 1.5", "Mochi", "Cosmos 1", "Cosmos Predict2"):  # fmt: skip
        assert family in names, family


def fetch(server, path):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.url + path, timeout=60) as response:
        return response.read().decode("utf-8")


def test_server_serves_scripts_and_help(comfy_server):
    listed = [path for path in json.loads(fetch(comfy_server, "/extensions")) if "/adaspa/" in path]
    scripts = {
        f"/extensions/adaspa/{path.relative_to(WEB).as_posix()}" for path in WEB.rglob("*.js")
    }
    assert sorted(listed) == sorted(scripts)
    for node in NODES:
        text = fetch(comfy_server, f"/extensions/adaspa/docs/{node}.md")
        assert text == (WEB / "docs" / f"{node}.md").read_text(encoding="utf-8")
    with pytest.raises(urllib.error.HTTPError):
        fetch(comfy_server, "/extensions/adaspa/docs/NoSuchNode.md")


def test_settings_listed_here_are_those_of_the_server(comfy_server):
    info = json.loads(fetch(comfy_server, "/object_info/AdaSpaAttention"))["AdaSpaAttention"]
    names = [name for part in info["input"].values() for name in part]
    assert [name for name in names if name not in ("model", "unique_id")][
        : len(ATTENTION_SETTINGS)
    ] == list(ATTENTION_SETTINGS)
