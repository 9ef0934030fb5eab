import json
import re
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_attn.config import (
    PRESET_FIELDS,
    PRESETS,
    QUERY_STRIDE,
    SEARCH_GAP,
    from_preset,
    parse_numbers,
)

WEB = Path(__file__).resolve().parents[2] / "web"
NODES = ("AdaSpaAttention", "AdaSpaReport")


def about(name):
    """What the help's list says of a preset."""
    text = (WEB / "docs" / "AdaSpaAttention.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^- \*\*{name}\*\* (.*)$", text, re.M)
    return found


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


@pytest.fixture(scope="module")
def settings(comfy_server):
    """The widgets of the main node, as the server declares them."""
    info = json.loads(fetch(comfy_server, "/object_info/AdaSpaAttention"))["AdaSpaAttention"]
    parts = info["input"]
    inputs = {**parts["required"], **parts["optional"]}
    return {name: options for name, (_, options) in inputs.items() if name != "model"}


def test_interface_gets_the_presets_from_the_server(settings):
    presets = settings["preset"]["presets"]
    for name, values in settings["preset"]["earlier"].items():
        assert all(presets[name][field] != value for field, value in values.items())
    assert settings["preset"]["options"] == [*presets, "Custom"] == [*PRESETS, "Custom"]
    for name, values in presets.items():
        # a head-adaptive preset leaves no room for a recall
        fields = {*PRESET_FIELDS} | ({"recall"} if values["head_adaptive"] else set())
        assert values.keys() == fields <= settings.keys()
        numbers = {"search_points": parse_numbers(values["search_points"], float, "")}
        assert from_preset("Custom", **{**values, **numbers}) == replace(
            PRESETS[name], search_gap=SEARCH_GAP, query_stride=QUERY_STRIDE
        )


def test_interface_knows_which_settings_exclude_each_other(settings):
    """What greys out is what the check refuses, or has no say."""
    on = {"recall": 0.9, "head_adaptive": True}
    assert {name for name, options in settings.items() if "replaces" in options} == set(on)
    for name, others in ((name, settings[name]["replaces"]) for name in on):
        for other in set(others) - {"sparsity"}:
            with pytest.raises(ValueError, match="`recall` gives every head"):
                from_preset("Custom", **{name: on[name], other: on[other]})
    assert "sparsity" in settings["recall"]["replaces"]


def test_help_explains_every_setting(settings):
    text = (WEB / "docs" / "AdaSpaAttention.md").read_text(encoding="utf-8")
    for name in settings:
        assert f"**{name}**" in text, name
    for preset in (*PRESETS, "Custom"):
        assert f"**{preset}**" in text, preset
    text = (WEB / "docs" / "AdaSpaReport.md").read_text(encoding="utf-8")
    for name in ("samples", "adaspa", "layer", "head", "picture", "text"):
        assert f"**{name}**" in text, name


@pytest.mark.parametrize("name", PRESETS)
def test_help_gives_the_numbers_of_the_presets(name):
    config, row = PRESETS[name], about(name)
    for share in (config.sparsity, config.warmup):
        assert f"{share:.0%}".replace("%", " %") in row


def test_help_gives_the_search_points_of_the_presets():
    text = (WEB / "docs" / "AdaSpaAttention.md").read_text(encoding="utf-8")
    found = re.search(
        r"\*Balanced\* and \*Fast\* look again at (\S+), \*Quality\* at (\S+)\.", text
    )
    points = {name: config.search_points for name, config in PRESETS.items()}
    assert points["Balanced"] == points["Fast"] == (float(found[1]),)
    assert points["Quality"] == (float(found[2]),)


def test_help_begins_with_what_to_do():
    text = (WEB / "docs" / "AdaSpaAttention.md").read_text(encoding="utf-8")
    assert re.findall("^## (.*)$", text, re.M)[0] == "Start here"


def test_help_has_no_tables():
    """The side panel is narrow and cuts their last columns off."""
    for path in sorted((WEB / "docs").rglob("*.md")):
        assert not re.search(r"^\|", path.read_text(encoding="utf-8"), re.M), path.name


def test_help_counts_tokens_as_its_formulas_do():
    text = (WEB / "docs" / "AdaSpaAttention.md").read_text(encoding="utf-8")
    entry = re.compile(
        r"^- \*\*(.*)\*\*: width / (\d+) × height / (\d+) × (half of )?\((.*)\)\. (.*)\.$", re.M
    )
    rows = entry.findall(text)
    assert len(rows) == 8
    for name, across, down, half, frames, examples in rows:
        width, height, length = map(int, re.findall(r"(\d+) × (\d+), (\d+) frames", examples)[0])
        tokens = width // int(across) * (height // int(down))
        formula = frames.replace("/", "//").replace("−", "-").replace("×", "*")
        latents = eval(formula, {"frames": length})
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
