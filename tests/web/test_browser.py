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
