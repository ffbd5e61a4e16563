"""The built pages by name, and how a test opens them. Build them first: `python book/tools/build.py`."""

import functools
import shutil

import pytest
from bs4 import BeautifulSoup
from links import ROOT

HTML = ROOT / "_build" / "html"
CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
DESK = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light", "service_workers": "block"}
#: What the theme itself complains about on every page.
KNOWN_COMPLAINTS = ("Got invalid theme mode",)

#: Nothing from elsewhere and no eval. Inline scripts and styles are the theme's, MathJax's and the explorers' own;
#: small pictures stand in the pages as data.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)

PAGES = sorted(path.relative_to(HTML).as_posix() for path in HTML.rglob("*.html") if "_static" not in path.parts)
PAGES = [name for name in PAGES if name != "index.html"]  # it only leads on to the first page
CHAPTERS = [name for name in PAGES if (ROOT / "book" / name).with_suffix(".ipynb").exists()]

#: Chapters whose rewriting is under way: they still have the old order. None is added.
OLD_ORDER: tuple[str, ...] = ()

needs_pages = pytest.mark.skipif(not PAGES, reason="no pages: run `python book/tools/build.py` first")
each_page = pytest.mark.parametrize("name", PAGES)
each_chapter = pytest.mark.parametrize("name", CHAPTERS)


def in_browser(test):
    """Mark a test that needs the pages and a browser."""
    no_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install Debian's chromium to run this")
    return pytest.mark.browser(needs_pages(no_browser(test)))


def text(name):
    return (HTML / name).read_text(encoding="utf-8")


#: Chapters with equations beside their code.
PAIRED = [name for name in CHAPTERS if 'class="lr-beside"' in text(name)]


@functools.cache  # parsing takes longer than all that is asked of a page
def soup(name):
    """The page's elements, which all tests share: look, do not change."""
    return BeautifulSoup(text(name), "html.parser")


def read(page, url):
    """Open a page and wait until its formulas are set."""
    page.goto(url)
    page.evaluate("() => window.MathJax?.startup?.promise")
