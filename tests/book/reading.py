"""The built pages by name, and how a test opens one. Build them first: `python book/tools/build.py`."""

import pytest
from bs4 import BeautifulSoup
from conftest import CHROMIUM, HTML, ROOT

PAGES = sorted(path.relative_to(HTML).as_posix() for path in HTML.rglob("*.html") if "_static" not in path.parts)
PAGES = [name for name in PAGES if name != "index.html"]  # it only leads on to the first page
CHAPTERS = [name for name in PAGES if (ROOT / "book" / name).with_suffix(".ipynb").exists()]

needs_pages = pytest.mark.skipif(not PAGES, reason="no pages: run `python book/tools/build.py` first")
each_page = pytest.mark.parametrize("name", PAGES)
each_chapter = pytest.mark.parametrize("name", CHAPTERS)


def in_browser(test):
    """Mark a test that needs the pages and a browser."""
    no_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install Debian's chromium to run this")
    return pytest.mark.browser(needs_pages(no_browser(test)))


def text(name):
    return (HTML / name).read_text(encoding="utf-8")


def soup(name):
    return BeautifulSoup(text(name), "html.parser")


def read(page, url):
    """Open a page and wait until its formulas are set."""
    page.goto(url)
    page.evaluate("() => window.MathJax?.startup?.promise")
