"""A tour of our nodes before and after a run, in both renderers, dark and light, large and small.

Pictures go to the folder that ADASPA_TOUR names, to be looked at.
"""

import os
from pathlib import Path

import pytest

from tests.web.test_browser_compare import VIDEOS
from tests.web.test_browser_nodes import HELPERS, OURS
from tests.web.test_browser_status import GRAPH, RUN

PALETTES = {"dark": "dark", "light": "light"}
SIZES = {"large": (1600, 1000), "small": (900, 620)}
# a text that reaches beyond its box can be scrolled to, and nothing stands outside of it
OUTSIDE = """() => [...document.querySelectorAll(".adaspa-status")].filter((box) => {
    const { left, right, width } = box.getBoundingClientRect();
    return width && [...box.children].some((part) => {
        const inner = part.getBoundingClientRect();
        return inner.width && (inner.left < left - 1 || inner.right > right + 1);
    });
}).length"""

# pixels of the verdict that have to be scrolled to
CUT = """() => {
    const box = widget(first, "$$node-text-preview").element.lastChild;
    return box.scrollHeight - box.clientHeight;
}"""


@pytest.mark.long
@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes-2.0"])
@pytest.mark.parametrize("palette", PALETTES)
def test_a_tour(page, vue, palette, tmp_path):
    pictures = Path(os.environ.get("ADASPA_TOUR") or tmp_path)
    pictures.mkdir(parents=True, exist_ok=True)
    choose = "([name, value]) => app.extensionManager.setting.set(name, value)"
    page.evaluate(choose, ["Comfy.VueNodes.Enabled", vue])
    page.evaluate(choose, ["Comfy.ColorPalette", PALETTES[palette]])

    def shot(name):
        page.evaluate("() => app.canvas.ds.reset?.()")
        page.wait_for_timeout(600)
        assert page.evaluate(OUTSIDE) == 0, name
        kind = "vue" if vue else "canvas"
        page.screenshot(path=pictures / f"{name}_{palette}_{kind}.png")

    try:
        page.evaluate(f"() => {{ app.graph.clear(); {HELPERS} }}")
        for place, kind in enumerate(OURS):
            at = [80 + 440 * (place % 3), 90 + 440 * (place // 3)]
            page.evaluate("([kind, at]) => make(kind, {}, at)", [kind, at])
        shot("before")
        page.evaluate("() => app.graph.clear()")
        page.evaluate("async () => { await app.loadGraphData(app.graph.serialize()) }")
        page.evaluate(GRAPH)
        # of its own, or ComfyUI's cache would answer with an earlier tour's run
        seed = 100 + 2 * list(PALETTES).index(palette) + vue
        page.evaluate("seed => pick(sampler, 'seed', seed)", seed)
        page.evaluate(VIDEOS)
        page.evaluate(
            """() => { const ours = [first, report, compare];
                for (const node of app.graph.nodes) if (!ours.includes(node)) node.pos = [80, 2000];
                first.pos = [80, 90]; report.pos = [560, 90]; compare.pos = [80, 480]; }"""
        )
        assert page.evaluate(RUN) == "execution_success"
        assert "ampling took " in page.evaluate("() => said(first)")
        for size, (width, height) in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            shot(f"after_{size}")
            assert page.evaluate(CUT) <= 0, (size, vue)
    finally:
        page.evaluate(choose, ["Comfy.VueNodes.Enabled", False])
        page.evaluate(choose, ["Comfy.ColorPalette", "dark"])
