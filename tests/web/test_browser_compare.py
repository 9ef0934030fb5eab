"""AdaSpa Compare in both renderers, and what our nodes say in other languages."""

import pytest

from tests.web.test_browser_nodes import graph  # noqa: F401
from tests.web.test_browser_status import RUN

VIDEOS = """() => {
    const [a, b] = ["#000000", "#191919"].map((color) =>
        make("EmptyImage", { width: 320, height: 176, batch_size: 3, color: parseInt(color.slice(1), 16) }));
    window.compare = make("AdaSpaCompare", {}, [500, 80]);
    a.connect(0, compare, 0);
    b.connect(0, compare, 1);
}"""
PICTURES = ".adaspa-compare img"


def test_two_videos_are_shown_under_a_slider(graph):  # noqa: F811
    graph.evaluate(VIDEOS)
    assert graph.evaluate(RUN) == "execution_success"
    said = graph.evaluate("() => said(compare)")
    assert "PSNR 20.17 dB" in said and "Least alike: frame 0." in said
    graph.wait_for_function(
        f"""() => [...document.querySelectorAll("{PICTURES}")].filter((img) =>
            img.complete && img.naturalWidth === 320).length === 2"""
    )
    view = graph.locator(".adaspa-compare")
    assert "without AdaSpa" in view.inner_text() and "with AdaSpa" in view.inner_text()
    clip = f"() => document.querySelectorAll('{PICTURES}')[1].style.clipPath"
    assert "50%" in graph.evaluate(clip)
    move = """([name, value]) => { const input = document.querySelector(`.adaspa-${name}`);
        input.value = value; input.dispatchEvent(new Event("input")); }"""
    graph.evaluate(move, ["edge", 25])
    assert "25%" in graph.evaluate(clip)
    before = graph.evaluate(f"() => document.querySelector('{PICTURES}').src")
    graph.evaluate(move, ["frame", 2])
    assert graph.evaluate(f"() => document.querySelector('{PICTURES}').src") != before
    view.get_by_text("Difference x8").click()
    mode = f"() => document.querySelectorAll('{PICTURES}')[1].style.mixBlendMode"
    assert graph.evaluate(mode) == "difference" and graph.evaluate(clip) == ""
    view.get_by_text("Side by side").click()
    assert "25%" in graph.evaluate(clip)
    # a node that has not run takes no room for videos
    height = graph.evaluate("() => make('AdaSpaCompare', {}, [80, 500]).size[1]")
    assert height < graph.evaluate("() => compare.size[1]") - 150


@pytest.mark.parametrize(
    "locale, words", [("zh", "召回率"), ("ja", "再現率"), ("ko", "재현율"), ("fr", "recall")]
)
def test_a_status_is_said_in_the_interface_s_language(page, locale, words):
    from tests.web.test_browser_nodes import HELPERS

    page.evaluate(f"() => {{ app.graph.clear(); {HELPERS} }}")
    said = page.evaluate(
        """(locale) => {
            const get = app.extensionManager.setting.get;
            app.extensionManager.setting.get = (id) => id === "Comfy.Locale" ? locale : get(id);
            try {
                const node = make("AdaSpaAttention");
                const values = { density: { text: "0.20" }, recall: { text: "0.85" } };
                const status = { node: String(node.id), steps: ["dense", "sparse"], step: 1, done: false,
                    said: [{ text: "Density 0.20, recall 0.85.", code: "kept", values }] };
                app.api.dispatchCustomEvent("adaspa.status", status);
                return said(node);
            } finally { app.extensionManager.setting.get = get; }
        }""",
        locale,
    )
    assert words in said and "0.85" in said
