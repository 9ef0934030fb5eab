"""Our nodes in ComfyUI's interface, in both of its renderers: what they show, fold and remember."""

import re

import pytest

ATTENTION = ("AdaSpaAttention", "AdaSpaAttentionPair")
OURS = (
    *ATTENTION, "AdaSpaReport", "AdaSpaCompare", "AdaSpaSavePattern", "AdaSpaLoadPattern",
    "AdaSpaForecast",
)  # fmt: skip
# the first front end here whose panel leaves out a widget that asks for it; 1.45.15 lists every one
HIDES_IN_PANEL = (1, 47)
# makes a node, sets widgets as a user does, and wires "node slot node slot"
HELPERS = """
    window.make = (type, values = {}, at = [80, 80]) => {
        const node = LiteGraph.createNode(type);
        node.pos = at;
        app.graph.add(node);
        for (const [name, value] of Object.entries(values)) pick(node, name, value);
        return node;
    };
    window.widget = (node, name) => node.widgets.find((widget) => widget.name === name);
    window.pick = (node, name, value) => {
        widget(node, name).value = value;
        widget(node, name).callback?.(value);
    };
    window.said = (node) => widget(node, "$$node-text-preview").element.innerText;
"""


@pytest.fixture(params=[False, True], ids=["canvas", "nodes-2.0"])
def graph(request, page):
    """An empty graph in one of the renderers."""
    setting = "v => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', v)"
    page.evaluate(setting, request.param)
    page.evaluate(f"() => {{ app.graph.clear(); {HELPERS} }}")
    page.vue = request.param
    yield page
    page.evaluate(setting, False)


def test_every_node_has_a_status_that_is_no_setting(graph):
    for place, kind in enumerate(OURS):
        at = [80 + 340 * (place % 3), 80 + 320 * (place // 3)]
        text = graph.evaluate("([kind, at]) => said(make(kind, {}, at))", [kind, at])
        assert "Run the workflow: " in text, kind
    version = graph.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__")
    if tuple(int(part) for part in version.split(".")[:2]) < HIDES_IN_PANEL:
        return
    # the panel beside the canvas lists what can be set
    toggle = graph.get_by_role("button", name="Toggle properties panel").first
    graph.evaluate("() => app.canvas.selectNode(app.graph.nodes[0])")
    if not (panel := graph.get_by_text(re.compile("^advanced inputs$", re.I))).count():
        toggle.click()
    panel.wait_for()
    assert graph.get_by_text("$$node-text-preview").count() == 0


@pytest.mark.parametrize("kind", ATTENTION)
def test_preset_enabled_and_status_are_all_that_is_shown(graph, kind):
    graph.evaluate("kind => { window.node = make(kind, { sparsity: 0.8 }) }", kind)
    shown = """() => node.widgets
        .filter((widget) => node.isWidgetVisible(widget)).map(({ name }) => name)"""
    assert graph.evaluate(shown) == ["preset", "enabled", "$$node-text-preview"]
    graph.wait_for_function("() => node.size[1] < 300")
    button = (
        graph.get_by_text("Show advanced inputs")
        if graph.vue
        else graph.get_by_text("Show settings")
    )
    button.click()
    assert len(graph.evaluate(shown)) == 19
    graph.wait_for_function("() => node.size[1] > 500")
    if not graph.vue:
        graph.get_by_text("Hide settings").click()
        graph.wait_for_function("() => node.size[1] < 300")
    values = graph.evaluate("() => node.widgets.slice(0, 4).map(({ value }) => value)")
    assert values == ["Balanced", 0.8, "64", 0.12]


def test_an_empty_list_of_patterns_shows_nothing(graph):
    # other tests may have saved patterns
    graph.evaluate(
        """() => { const { nodeData } = LiteGraph.registered_node_types.AdaSpaLoadPattern;
            nodeData.input.required.file[1].options = [];
            nodeData.inputs.file.options = [];
            window.node = make("AdaSpaLoadPattern"); }"""
    )
    assert graph.evaluate("() => widget(node, 'file').options.values") == []
    assert graph.evaluate("() => widget(node, 'file').value") == ""
    if not graph.vue:
        assert graph.evaluate("() => widget(node, 'file')._displayValue") == ""


def test_custom_gives_back_what_the_user_had_set(graph):
    graph.evaluate(
        """() => { window.node = make("AdaSpaAttention", { preset: "Custom", sparsity: 0.85 });
            for (const preset of ["Quality", "Fast"]) pick(node, "preset", preset); }"""
    )
    assert graph.evaluate("() => widget(node, 'sparsity').value") == 0.9
    # through a saved graph, too
    graph.evaluate(
        """async () => { await app.loadGraphData(app.graph.serialize());
            window.node = app.graph.nodes[0]; pick(node, "preset", "Custom"); }"""
    )
    assert graph.evaluate("() => widget(node, 'sparsity').value") == 0.85


def test_a_preset_that_has_changed_since_a_graph_was_saved_says_so(graph):
    graph.evaluate("() => { window.node = make('AdaSpaAttention', { preset: 'Fast' }) }")
    graph.evaluate(
        """async () => { const saved = app.graph.serialize();
            saved.nodes[0].properties.adaspa_preset_values.values.warmup = 0.3;
            await app.loadGraphData(saved); window.node = app.graph.nodes[0]; }"""
    )
    assert "Fast has changed since this graph was saved: it had warmup 0.3." in graph.evaluate(
        "() => said(node)"
    )
    graph.evaluate("() => pick(node, 'preset', 'Custom')")
    assert graph.evaluate("() => widget(node, 'warmup').value") == 0.3
    assert "has changed since" not in graph.evaluate("() => said(node)")


def test_a_graph_of_0_1_with_a_preset_that_has_changed_since_says_so(graph):
    """It kept no values of the preset beside its widgets'."""
    graph.evaluate("() => { window.node = make('AdaSpaAttention', { preset: 'Fast' }) }")
    graph.evaluate(
        """async () => { const saved = app.graph.serialize(), [node] = saved.nodes;
            node.properties = {};
            node.widgets_values[app.graph.nodes[0].widgets.findIndex(({ name }) => name === "warmup")] = 0.06;
            await app.loadGraphData(saved); window.node = app.graph.nodes[0]; }"""
    )
    said = graph.evaluate("() => said(node)")
    assert "Fast has changed since this graph was saved: it had warmup 0.06." in said
    assert graph.evaluate("() => widget(node, 'warmup').value") == 0.1


def test_settings_that_exclude_each_other_grey_out(graph):
    graph.evaluate("() => { window.node = make('AdaSpaAttention', { preset: 'Custom' }) }")
    greyed = "() => node.widgets.filter(({ disabled }) => disabled).map(({ name }) => name)"
    assert graph.evaluate(greyed) == []
    graph.evaluate("() => pick(node, 'recall', 0.9)")
    assert graph.evaluate(greyed) == ["sparsity", "head_adaptive"]
    graph.evaluate("() => pick(node, 'preset', 'Paper')")
    assert "recall" in graph.evaluate(greyed)
    assert graph.evaluate("() => widget(node, 'recall').value") == 0
    if graph.vue:
        # legible: as strong as text that may be changed, on a box of half its strength
        graph.evaluate("() => { node.showAdvanced = true }")
        box = graph.locator(".lg-node button[role='combobox']:disabled").first
        inherits = (
            "box => getComputedStyle(box).color === getComputedStyle(box.parentElement).color"
        )
        assert box.evaluate(inherits)


def test_the_search_finds_the_main_node(page):
    found = """text => document.querySelector("#vue-app").__vue_app__.config.globalProperties
        .$pinia._s.get("nodeDef").nodeSearchService.searchNode(text, [], { limit: 64 })
        .map(({ name }) => name)"""
    for text in (
        "adaspa",
        "AdaSpa",
        "sparse attention",
        "faster",
        "accelerate",
        "optimize",
        "teacache",
    ):
        assert page.evaluate(found, text)[0] == "AdaSpaAttention", text
    # these are in the names of other nodes
    for text in ("sage", "sparse", "wan"):
        assert "AdaSpaAttention" in page.evaluate(found, text), text
