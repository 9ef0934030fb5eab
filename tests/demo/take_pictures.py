"""Takes the README's pictures of the node and of the report, both of one run in ComfyUI's interface.

    COMFYUI_PATH=... python tests/demo/take_pictures.py

Needs Chromium and Playwright. The run is the demo's, but of 50 steps, with Balanced as a GPU runs it: in
plain torch its two searches take back what 20 steps save.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# run as a script, Python looks beside the script only
sys.path.insert(0, str(ROOT))

from tests.demo.graph import graph  # noqa: E402
from tests.tools import browser  # noqa: E402
from tests.tools.comfy_server import ComfyServer  # noqa: E402
from tests.web.test_browser_status import RUN  # noqa: E402

IMAGES = Path(__file__).with_name("images")
SCALE, EDGE, STEPS = 1.25, 16, 50
# the demo's graph, with the node where the picture is taken
SHOW = """async ([prompt, scale]) => {
    await app.loadApiJson(prompt, "demo");
    const node = app.graph.nodes.find(({ type }) => type === "AdaSpaAttention");
    app.graph.nodes.filter((other) => other !== node).forEach((other, i) => {
        other.pos = [1200, 400 * i];
    });
    node.pos = [60, 200];
    node.setSize([400, node.size[1]]);
    Object.assign(app.canvas.ds, { scale, offset: [0, 0] });
    app.canvas.links_render_mode = LiteGraph.HIDDEN_LINK;
    app.canvas.setDirty(true, true);
}"""
# left, top, width and height on the page; a title stands above its node
BOX = """(scale) => {
    const { pos, size } = app.graph.nodes.find(({ type }) => type === "AdaSpaAttention");
    const { left, top } = app.canvas.canvas.getBoundingClientRect();
    const title = LiteGraph.NODE_TITLE_HEIGHT;
    return [left + pos[0] * scale, top + (pos[1] - title) * scale,
        size[0] * scale, (size[1] + title) * scale];
}"""


def main() -> None:
    from playwright.sync_api import sync_playwright

    tiny = ROOT / "tests" / "tiny_model"
    server = ComfyServer(
        os.environ["COMFYUI_PATH"],
        Path(os.environ.get("ADASPA_HOME") or ROOT / ".adaspa") / "pictures",
        extra_custom_nodes=[("adaspa_tiny_model", tiny)],
        model_files=[tiny / "tiny_wan.safetensors.xz"],
    )
    with server, sync_playwright() as playwright:
        # loads the model
        server.post(graph(preset="Balanced", enabled=False, steps=1), timeout=600)
        server.request("/settings", {"Comfy.TutorialCompleted": True})
        chromium = playwright.chromium.launch(
            executable_path=browser.chromium(), args=[*browser.arguments(), "--no-proxy-server"]
        )
        page = chromium.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(1_800_000)
        page.goto(server.address)
        page.wait_for_function("() => window.app?.graph && window.app.extensionManager")
        page.evaluate(SHOW, [graph(preset="Balanced", enabled=True, steps=STEPS), SCALE])
        assert page.evaluate(RUN) == "execution_success"
        page.wait_for_timeout(1000)
        left, top, width, height = page.evaluate(BOX, SCALE)
        clip = {
            "x": left - EDGE, "y": top - EDGE, "width": width + 2 * EDGE,
            "height": height + 2 * EDGE,
        }  # fmt: skip
        page.screenshot(path=IMAGES / "node.png", clip=clip)
        last = list(server.get("/history").values())[-1]
        (picture,) = last["outputs"]["report"]["images"]
        (IMAGES / "report.png").write_bytes(server.view(picture))
        print(last["outputs"]["report"]["text"][0])


if __name__ == "__main__":
    main()
