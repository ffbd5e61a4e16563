"""Lets the tests import the book's tools and extensions, which are no package, and opens the pages in a browser."""

import contextlib
import functools
import gzip
import re
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BOOK = HERE.parents[1] / "book"
sys.path += [str(BOOK / "tools"), str(BOOK / "extensions"), str(HERE)]

from reading import CHROMIUM, DESK, FLAGS, HTML, KNOWN_COMPLAINTS, POLICY  # noqa: E402


class Server(SimpleHTTPRequestHandler):
    """Serves as a public host does, compressed, and with a strict policy on what a page may load."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() else path
        if not path.is_file():
            return self.send_error(404)
        kind = self.guess_type(str(path))
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        text = re.match("text/|application/(javascript|json)|image/svg", kind)
        data = _squeezed(path) if text else path.read_bytes()
        if text:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the test has left the page
            self.wfile.write(data)


@functools.cache
def _squeezed(path):
    return gzip.compress(path.read_bytes(), 6)


@pytest.fixture(scope="session")
def site():
    """The pages on a local port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")  # not longer: while it is open, no other test can start an event loop
def browser():
    from playwright.sync_api import sync_playwright

    if not CHROMIUM:
        pytest.skip("no Chromium: install Debian's chromium to run this")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


def _watched(context):
    """A page that keeps in `complaints` what goes wrong on it."""
    page = context.new_page()
    page.set_default_timeout(120_000)  # what takes so long hangs; a busy machine must not fail a test
    page.complaints = []
    page.on("console", lambda message: _note_console(page, message))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: _note_request(page, request))
    page.on("requestfailed", lambda request: _note_failure(page, request))
    return page


@pytest.fixture
def visit(browser):
    """Open pages as readers who were never here: `visit(color_scheme="dark")`."""
    contexts = []

    def new(**options):
        contexts.append(browser.new_context(**{**DESK, **options}))
        return _watched(contexts[-1])

    yield new
    for context in contexts:
        context.close()


@pytest.fixture
def page(visit):
    return visit()


@pytest.fixture(scope="module")
def shelf(browser):
    """One page for many visits, which need not load the theme each time."""
    context = browser.new_context(**DESK)
    yield _watched(context)
    context.close()


@pytest.fixture
def reader(shelf):
    shelf.complaints.clear()
    shelf.set_viewport_size(DESK["viewport"])
    return shelf


def _note_console(page, message):
    if message.type in ("error", "warning") and not message.text.startswith(KNOWN_COMPLAINTS):
        page.complaints.append(message.text)


def _note_request(page, request):
    if not re.match(r"http://127\.0\.0\.1[:/]|file:|data:|blob:", request.url):
        page.complaints.append(f"foreign: {request.url}")


def _note_failure(page, request):
    if request.failure != "net::ERR_ABORTED":  # a picture under way when the test leaves the page
        page.complaints.append(f"failed: {request.url} {request.failure}")
