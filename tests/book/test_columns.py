"""Equation beside code, as a reader's browser shows it. Build the pages first: `python book/tools/build.py`."""

import json
import shutil

import pytest
from links import ROOT

HTML = ROOT / "_build" / "html"
PAGES = [path for path in sorted(HTML.glob("*/*.html")) if 'class="lr-beside"' in path.read_text(encoding="utf-8")]
CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not PAGES, reason="no pages: run `python book/tools/build.py` first"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install Debian's chromium to run this"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def read(browser, path, **options):
    """A page from disk, its formulas set, and what went wrong on it in `problems`."""
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(path.as_uri())
    if options.get("java_script_enabled", True):
        page.evaluate("() => window.MathJax.startup.promise")
        page.wait_for_function(
            "() => [...document.querySelectorAll('.lr-beside')].every(e => e.querySelector('mjx-container .lr-t0'))"
        )
    return page


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_terms_light_up_on_both_sides(browser, path):
    page = read(browser, path)
    for pair in page.locator(".lr-beside").all():
        data = json.loads(pair.get_attribute("data-terms"))
        whole = pair.locator("pre").text_content()
        for k, places in enumerate(data["code"]):
            wanted = "".join(whole[a:b] for a, b in places).split()
            stop = pair.locator(f"pre .lr-t{k}[tabindex]")
            assert stop.count() == 1  # one place of each term to tab to
            stop.focus()
            lit = pair.locator("pre .lr-lit").all_text_contents()
            assert "".join(lit).split() == wanted and pair.locator(f"mjx-math .lr-t{k}.lr-lit").count() > 0
            assert pair.locator(f".lr-lit:not(.lr-t{k})").count() == 0
        stop.blur()
        assert pair.locator(".lr-lit").count() == 0
    assert page.problems == []
    page.close()


def test_the_mouse_reaches_code_from_the_equation(browser):
    page = read(browser, PAGES[0])
    pair = page.locator(".lr-beside").first
    pair.locator("mjx-math .lr-t0").hover()
    assert pair.locator("pre .lr-t0.lr-lit").count() > 0
    page.mouse.move(0, 0)
    assert pair.locator(".lr-lit").count() == 0
    page.close()


def test_columns_on_a_desk_stacked_on_a_phone(browser):
    for width, beside in ((1280, True), (360, False)):
        page = read(browser, PAGES[0], viewport={"width": width, "height": 800})
        equation = page.locator(".lr-beside div.math").first.bounding_box()
        code = page.locator(".lr-beside pre").first.bounding_box()
        assert (equation["x"] + equation["width"] <= code["x"]) == beside
        assert (equation["y"] + equation["height"] <= code["y"]) != beside
        page.close()


def test_without_javascript_both_are_there(browser):
    page = read(browser, PAGES[0], java_script_enabled=False)
    pair = page.locator(".lr-beside").first
    assert "\\tag{1}" in pair.locator("div.math").text_content() and "def " in pair.locator("pre").text_content()
    page.close()
