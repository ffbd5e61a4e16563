"""The built pages, as files and as a reader's browser shows them. Build them first: `python book/tools/build.py`."""

import functools
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import links
import pytest
from bs4 import BeautifulSoup
from links import ROOT

from lowrank_ref.core.registry import papers

HTML = ROOT / "_build" / "html"
PAGES = sorted(path.relative_to(HTML).as_posix() for path in HTML.rglob("*.html") if "_static" not in path.parts)
PAGES = [name for name in PAGES if name != "index.html"]  # it only leads on to the first page
CHAPTERS = [name for name in PAGES if (ROOT / "book" / name).with_suffix(".ipynb").exists()]

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
#: What the theme itself complains about on every page.
KNOWN_COMPLAINTS = ("Got invalid theme mode", "strict mode: ")

needs_pages = pytest.mark.skipif(not PAGES, reason="no pages: run `python book/tools/build.py` first")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install Debian's chromium to run this")
each_page = pytest.mark.parametrize("name", PAGES)


# --- the files


@needs_pages
@each_page
def test_page_asks_no_other_server(name):
    text = (HTML / name).read_text(encoding="utf-8")
    tags = re.findall(r"<(?:script|img|iframe|source|video|link)\b[^>]*>", text)
    foreign = [tag for tag in tags if re.search(r"""(?:src|href)=["'](?:https?:)?//""", tag)]
    assert foreign == []
    assert "thebe" not in text
    assert "html-manager" not in text  # widgets without a kernel would only pretend to work


@needs_pages
@pytest.mark.parametrize("name", CHAPTERS)
def test_launch_links_lead_to_the_notebook(name):
    path = "book/" + name.replace(".html", ".ipynb")
    hrefs = {unquote(href) for href in re.findall(r'href="([^"]+)"', (HTML / name).read_text(encoding="utf-8"))}
    assert {links.colab(path), links.binder(path)} <= hrefs
    assert (ROOT / path).exists()


@needs_pages
@each_page
def test_page_is_light(name):
    text = (HTML / name).read_text(encoding="utf-8")
    images = {((HTML / name).parent / src).resolve() for src in re.findall(r'<img[^>]* src="([^":]+)"', text)}
    size = len(text.encode()) + sum(image.stat().st_size for image in images)
    assert size <= 1_000_000


@needs_pages
def test_internal_links_lead_somewhere():
    """Every link from page to page, and the anchor it names."""
    pages = {name: BeautifulSoup((HTML / name).read_text(encoding="utf-8"), "html.parser") for name in PAGES}
    anchors = {name: {tag["id"] for tag in page.select("[id]")} for name, page in pages.items()}
    broken = []
    for name, page in pages.items():
        for href in (tag["href"] for tag in page.select(".bd-article a[href]")):
            target, _, anchor = unquote(href).partition("#")
            path = (HTML / name).parent / target if target else HTML / name
            if "://" in href or not path.resolve().is_relative_to(HTML):
                continue
            place = path.resolve().relative_to(HTML).as_posix()
            if not path.exists() or (anchor and place in anchors and anchor not in anchors[place]):
                broken.append((name, href))
    assert broken == []


@needs_pages
def test_the_chooser_names_every_chapter():
    page = BeautifulSoup((HTML / "chooser.html").read_text(encoding="utf-8"), "html.parser")
    rows = [row.find_all("td") for row in page.select("table.lr-wide tbody tr")]
    assert [row[0].get_text() for row in rows] == [paper.name for paper in papers().values()]
    assert all("#" in row[3].a["href"] and row[3].get_text() != "read" for row in rows)


# --- in a browser


@pytest.fixture(scope="module")
def site():
    """The pages on a local port, where search can fetch its snippets."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page of a reader who was never here, and what goes wrong on it in `page.complaints`."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda message: _note_console(page, message))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: _note_request(page, request))
    page.on("requestfailed", lambda request: page.complaints.append(f"failed: {request.url}"))
    yield page
    context.close()


def _note_console(page, message):
    if message.type in ("error", "warning") and not message.text.startswith(KNOWN_COMPLAINTS):
        page.complaints.append(message.text)


def _note_request(page, request):
    if not re.match(r"http://127\.0\.0\.1[:/]|file:|data:|blob:", request.url):
        page.complaints.append(f"foreign: {request.url}")


def read(page, url):
    """Open a page and wait until its formulas are set."""
    page.goto(url)
    page.evaluate("() => window.MathJax?.startup?.promise")


@needs_pages
@needs_browser
@pytest.mark.browser
@each_page
def test_page_reads_well(page, site, name):
    read(page, f"{site}/{name}")
    formulas = page.locator("span.math, div.math").count()
    assert page.locator("mjx-container").count() >= formulas
    assert page.locator("mjx-merror").all_text_contents() == []
    for alt in page.locator(".bd-article img").evaluate_all("images => images.map(image => image.alt)"):
        assert len(alt) >= 20 and not alt.endswith(".png"), f"alt text: got {alt!r}"
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "the page scrolls sideways on a phone"
    assert page.complaints == []


@needs_pages
@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("name", CHAPTERS)
def test_explorers_move_by_keyboard(page, site, name):
    read(page, f"{site}/{name}")
    for explorer in page.locator(".lr-explore").all():
        frame = explorer.locator("[data-frame]")
        for slider in explorer.locator("input[type=range]").all():
            before, value = frame.inner_html(), slider.get_attribute("aria-valuetext")
            slider.press("ArrowLeft")
            assert frame.inner_html() != before
            assert slider.get_attribute("aria-valuetext") != value
    assert page.complaints == []


@needs_pages
@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("query", ["LoRA", "2106.09685", "low-rank adaptation"])
def test_search_finds_the_paper(page, site, query):
    page.goto(f"{site}/search.html?q={query}")
    page.locator("#search-results a[href^='adapters/lora.html']").first.wait_for()
    assert page.complaints == []


@needs_pages
@needs_browser
@pytest.mark.browser
def test_the_ledger_filters_and_sorts(page, site):
    read(page, f"{site}/claims.html")
    rows = page.locator("table[data-ledger] tbody tr:visible")
    whole = rows.count()
    page.get_by_label("verdict").select_option("holds")
    assert 0 < rows.count() < whole
    assert set(page.locator("tbody tr:visible td:last-child").all_text_contents()) == {"holds"}
    page.get_by_label("verdict").select_option("")
    page.get_by_label("find").fill("galore")
    assert 0 < rows.count() < whole
    page.get_by_label("find").fill("")
    page.get_by_role("button", name="verdict").click()
    seen = page.locator("tbody tr td:last-child").all_text_contents()
    assert len(seen) == whole and seen == sorted(seen)
    assert page.complaints == []


@needs_pages
@needs_browser
@pytest.mark.browser
def test_page_works_from_disk(page):
    read(page, (HTML / "adapters" / "lora.html").as_uri())
    assert page.locator("mjx-container").count() > 0
    assert page.complaints == []


@needs_pages
@needs_browser
@pytest.mark.browser
def test_dark_mode(page, site):
    read(page, f"{site}/adapters/lora.html")

    def brightness():
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    seen = [brightness()]
    for _ in range(3):  # auto, light, dark
        page.locator("button.theme-switch-button:visible").first.click()
        seen.append(brightness())
    assert max(seen) > 200 and min(seen) < 60, seen
    assert page.complaints == []
