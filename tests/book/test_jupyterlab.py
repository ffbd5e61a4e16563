"""A chapter's notebook in a real JupyterLab: legible before it runs, moving afterwards."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import kernel_notebooks
import pytest
from links import ROOT

CHAPTER = ROOT / "book" / "adapters" / "nola.ipynb"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that knows no notebook, in a folder with one."""
    folder = tmp_path_factory.mktemp("lab")
    kernel_notebooks.write(kernel_notebooks.converted(CHAPTER), folder / CHAPTER.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token="]
    options += [f"--ServerApp.root_dir={folder}", "--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
    own = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield address
        server.terminate()
        server.wait()


@pytest.mark.browser
def test_a_figure_stands_still_before_its_cell_runs_and_moves_after(lab, browser):
    page = browser.new_page(viewport={"width": 1300, "height": 1400})
    page.set_default_timeout(600_000)
    page.goto(f"{lab}/doc/tree/{CHAPTER.name}?reset")
    picture = page.locator(".jp-OutputArea img").first
    picture.wait_for()
    assert 400 < picture.bounding_box()["width"] < 700
    assert page.locator(".lr-explore").count() == 0
    assert ":::" not in page.locator(".jp-Notebook").inner_text()

    page.locator(".jp-MarkdownCell").first.click()
    for _ in range(5):  # title, where it comes from, install, heading, explorer
        page.keyboard.press("Shift+Enter")
    figure = page.locator(".lr-explore").first
    figure.locator("svg").first.wait_for()
    before = figure.locator("[data-frame]").inner_html()
    slide = "input => { input.value = 0; input.dispatchEvent(new Event('input', {bubbles: true})); }"
    figure.locator("input").first.evaluate(slide)
    assert figure.locator("[data-frame]").inner_html() != before
    numbers = [box.bounding_box() for box in figure.locator("dt, dd").all()]
    for name, value in zip(numbers[::2], numbers[1::2]):  # beside or below each other, never on one another
        assert value["x"] >= name["x"] + name["width"] - 1 or value["y"] >= name["y"] + name["height"] - 1
    slider = figure.locator("input").first
    slider.press("ArrowRight")  # moves the slider, and no cell is left for another
    assert slider.evaluate("input => input === document.activeElement && +input.value") == 1
    page.close()
