"""What a node says of the last execution: of its own run, or why it had none."""

import pytest

from tests.web.test_browser_nodes import HELPERS

RUN = """() => new Promise((done) => {
    const ends = ["execution_success", "execution_error", "execution_interrupted"];
    const end = ({ type }) => {
        for (const name of ends) app.api.removeEventListener(name, end);
        // after the page's own listeners
        setTimeout(() => done(type), 50);
    };
    for (const name of ends) app.api.addEventListener(name, end);
    app.queuePrompt(0);
})"""
GRAPH = """() => {
    const loader = make("UNETLoader", { unet_name: "tiny_wan_h64.safetensors" });
    const [text, other] = [make("AdaSpaHostTestPrompt"), make("AdaSpaHostTestPrompt", { seed: 1 })];
    const latent = make("EmptyHunyuanLatentVideo", { width: 192, height: 128, length: 9 });
    const settings = { preset: "Custom", min_tokens: 64, sparsity: 0.5, tail: "none",
        verdict: "sparse" };
    window.first = make("AdaSpaAttention", settings);
    window.second = make("AdaSpaAttention", settings);
    window.sampler = make("KSampler", { steps: 3, cfg: 1, seed: 7 });
    window.report = make("AdaSpaReport");
    // a seed that moves on would leave nothing in the cache
    for (const node of app.graph.nodes)
        for (const { name } of node.widgets ?? [])
            if (name.startsWith("control")) pick(node, name, "fixed");
    loader.connect(0, first, 0);
    first.connect(0, sampler, 0);
    text.connect(0, sampler, 1);
    other.connect(0, sampler, 2);
    latent.connect(0, sampler, 3);
    sampler.connect(0, report, 0);
    first.connect(1, report, 1);
    app.graph.remove(second);
}"""


@pytest.fixture
def graph(page):
    """A small graph that samples."""
    page.evaluate(f"() => {{ app.graph.clear(); {HELPERS} }}")
    # an unsaved graph gets its id when it is first loaded
    page.evaluate("async () => { await app.loadGraphData(app.graph.serialize()) }")
    page.evaluate(GRAPH)
    return page


def run(page, end="execution_success"):
    assert page.evaluate(RUN) == end


def said(page, node="first"):
    return page.evaluate(f"() => said({node})")


def test_a_status_follows_what_became_of_its_node(graph):
    run(graph)
    assert "288 tokens" in said(graph) and "sparse" in said(graph)
    assert "288 tokens" in said(graph, "report")
    # nothing of it has to be scrolled to
    graph.wait_for_function(
        """() => { const box = widget(first, "$$node-text-preview").element.lastChild;
            return box.clientHeight >= box.scrollHeight && box.clientHeight > 0; }"""
    )
    run(graph)
    assert "Nothing has changed: the result came from ComfyUI's cache." in said(graph)
    assert "288 tokens" in said(graph)

    graph.evaluate("() => pick(first, 'min_tokens', 65)")
    assert "The settings have changed since this run." in said(graph)
    graph.evaluate("() => pick(first, 'min_tokens', 64)")
    assert "settings have changed" not in said(graph)

    # another one of ours behind it takes its place
    graph.evaluate(
        """() => { window.second = make("AdaSpaAttention", { preset: "Custom", min_tokens: 64, verdict: "sparse" });
            first.connect(0, second, 0); second.connect(0, sampler, 0); }"""
    )
    run(graph)
    assert "another AdaSpa node behind it took its place" in said(graph)
    assert "288 tokens" in said(graph, "second")
    graph.evaluate("() => { second.mode = 4 }")
    run(graph)
    assert said(graph, "second").endswith("Bypassed: the model runs without AdaSpa.")
    assert "288 tokens" in said(graph)


def test_a_status_outlives_the_page_and_tells_of_an_error(graph):
    run(graph)
    told = said(graph)
    # the interface keeps a draft of what changed half a second ago
    graph.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    graph.wait_for_timeout(1000)
    graph.reload()
    graph.wait_for_function("() => window.app?.graph?.nodes.length > 5")
    graph.evaluate(
        f"""() => {{ {HELPERS}
            const [a, b] = ["AdaSpaAttention", "AdaSpaReport"];
            window.first = app.graph.nodes.find(({{ type }}) => type === a);
            window.report = app.graph.nodes.find(({{ type }}) => type === b); }}"""
    )
    assert said(graph) == told

    # known only when the node executes: its number comes from another node
    graph.evaluate(
        """() => { const number = make("PrimitiveFloat", { value: 1 });
            const slot = first.inputs.findIndex(({ name }) => name === "start_percent");
            number.connect(0, first, slot); }"""
    )
    run(graph, "execution_error")
    assert "`start_percent` must be at least 0" in said(graph)
    assert "The run ended with an error before its turn." in said(graph, "report")
    assert "288 tokens" not in said(graph)


def test_a_run_is_not_told_on_another_tab_s_node(graph):
    """Its workflow may have a node of the same id, which the interface tells of any run."""
    saying = "(node) => { widget(node, '$$node-text-preview').value = 'Step 1 of 3: dense.' }"
    graph.evaluate("() => app.api.dispatchCustomEvent('execution_start', { prompt_id: 'one' })")
    graph.evaluate(f"() => ({saying})(first)")
    assert "Step 1 of 3" in said(graph)
    graph.evaluate(
        f"""async () => {{
            await app.loadGraphData({{ ...app.graph.serialize(), id: crypto.randomUUID() }});
            window.first = app.graph.nodes.find(({{ type }}) => type === "AdaSpaAttention");
            ({saying})(first);
        }}"""
    )
    assert "Step 1 of 3" not in said(graph)
    graph.evaluate("() => app.api.dispatchCustomEvent('execution_success', { prompt_id: 'one' })")
