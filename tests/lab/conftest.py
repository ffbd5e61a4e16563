"""A browser for outputs of the laboratory, each on a bare page of its own."""

import shutil

import pytest


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open a page with these explorers; what goes wrong on it stands in its `problems`."""

    def open_page(*explorers, width=800, javascript=True, touch=False):
        file = tmp_path / "page.html"
        body = "\n".join(e.html for e in explorers)
        file.write_text(
            f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">{body}',
            encoding="utf-8",
        )
        page = browser.new_page(
            viewport={"width": width, "height": 700}, java_script_enabled=javascript, has_touch=touch, is_mobile=touch
        )
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(file.as_uri())
        return page

    return open_page
