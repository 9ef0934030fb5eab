"""A browser on a running ComfyUI: `page` shows its interface and fails on errors of our scripts."""

import pytest

from tests.tools import browser as found


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window; one per file, since an open one keeps asyncio to itself."""
    program = found.chromium()
    if program is None:
        pytest.skip(found.MISSING)
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        # a proxy of the environment must not see requests to this machine
        chromium = playwright.chromium.launch(
            executable_path=program, args=[*found.arguments(), "--no-proxy-server"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def errors():
    """What the page's scripts and its console complained about, as text with its place."""
    return []


@pytest.fixture
def page(browser, comfy_server, errors):
    """ComfyUI's interface, ready, with an empty graph. Errors of ours fail the test at its end."""
    # no tour and no templates on a first visit
    comfy_server.request("/settings", {"Comfy.TutorialCompleted": True})
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: errors.append(f"{error.message}\n{error.stack}"))
    page.on(
        "console",
        lambda message: (
            errors.append(f"{message.text} ({message.location['url']})")
            if message.type == "error"
            else None
        ),
    )
    page.goto(comfy_server.address)
    page.wait_for_function("() => window.app?.graph && window.app.extensionManager")
    yield page
    context.close()
    ours = [text for text in errors if "adaspa" in text.lower()]
    assert not ours, ours
