"""Our front end in ComfyUI's own interface, driven in a browser."""

from tests.workflows.stored_graphs import FILES, read


def load(page, graph: dict) -> None:
    """Open a workflow as a user does who drops its file on the page."""
    page.evaluate("graph => window.app.loadGraphData(graph)", graph)


def test_a_stored_graph_shows_our_nodes_and_their_views(page):
    load(page, read(FILES["Wan 2.2 5B text or image to video"]))
    nodes = page.evaluate(
        """() => window.app.graph.nodes
            .filter(node => node.comfyClass?.startsWith("AdaSpa"))
            .map(node => [node.comfyClass, (node.widgets ?? []).map(widget => widget.name)])"""
    )
    shown = dict(nodes)
    assert set(shown) == {"AdaSpaAttention", "AdaSpaReport"}
    # our view of the run stands where the interface would put plain progress text
    assert all("$$node-text-preview" in widgets for widgets in shown.values())
    assert "preset" in shown["AdaSpaAttention"]


def test_an_error_of_ours_in_the_page_is_seen(page, errors):
    with page.expect_event("pageerror"):
        page.evaluate("() => { setTimeout(() => { throw new Error('of /extensions/adaspa/') }) }")
    assert [text for text in errors if "adaspa" in text]
    errors.clear()


def test_the_interface_speaks_chinese(page, comfy_server):
    comfy_server.request("/settings", {"Comfy.Locale": "zh"})
    try:
        page.reload()
        page.wait_for_function("() => window.app?.graph && window.app.extensionManager")
        titles, help_page = page.evaluate(
            """async () => {
                const store = document.querySelector("#vue-app").__vue_app__.config
                    .globalProperties.$pinia._s.get("nodeDef");
                const shown = (name) => store.nodeDefsByName[name].display_name;
                const found = await app.api.fetchApi("/../extensions/adaspa/docs/AdaSpaReport/zh.md");
                return [["AdaSpaAttention", "AdaSpaReport"].map(shown), await found.text()];
            }"""
        )
        assert titles == ["AdaSpa", "AdaSpa 报告"]
        assert help_page.startswith("# AdaSpa 报告")
        labels = page.evaluate(
            """() => {
                const node = LiteGraph.createNode("AdaSpaAttention");
                app.graph.add(node);
                return node.widgets.map((widget) => widget.label ?? widget.name);
            }"""
        )
        assert {"预设", "启用"} <= set(labels)
    finally:
        comfy_server.request("/settings", {"Comfy.Locale": "en"})
