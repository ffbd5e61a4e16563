"""Equation beside code, as a reader's browser shows it."""

import json

import pytest
import reading
from reading import CHAPTERS, in_browser, text

PAIRED = [name for name in CHAPTERS if 'class="lr-beside"' in text(name)]


def read(page, url):
    """Open a page and wait until the terms of its equations are marked."""
    reading.read(page, url)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.lr-beside')].every(e => e.querySelector('mjx-container .lr-t0'))"
    )


@in_browser
@pytest.mark.parametrize("name", PAIRED)
def test_terms_light_up_on_both_sides(reader, site, name):
    read(reader, f"{site}/{name}")
    for pair in reader.locator(".lr-beside").all():
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
    assert reader.complaints == []


@in_browser
def test_the_mouse_reaches_code_from_the_equation(reader, site):
    read(reader, f"{site}/{PAIRED[0]}")
    pair = reader.locator(".lr-beside").first
    pair.locator("mjx-math .lr-t0").hover()
    assert pair.locator("pre .lr-t0.lr-lit").count() > 0
    reader.mouse.move(0, 0)
    assert pair.locator(".lr-lit").count() == 0


@in_browser
def test_columns_on_a_desk_stacked_on_a_phone(reader, site):
    for width, beside in ((1280, True), (360, False)):
        reader.set_viewport_size({"width": width, "height": 800})
        read(reader, f"{site}/{PAIRED[0]}")
        equation = reader.locator(".lr-beside div.math").first.bounding_box()
        code = reader.locator(".lr-beside pre").first.bounding_box()
        assert (equation["x"] + equation["width"] <= code["x"]) == beside
        assert (equation["y"] + equation["height"] <= code["y"]) != beside


@in_browser
def test_without_javascript_both_are_there(visit, site):
    page = visit(java_script_enabled=False)
    page.goto(f"{site}/{PAIRED[0]}")
    pair = page.locator(".lr-beside").first
    assert "\\tag{1}" in pair.locator("div.math").text_content() and "def " in pair.locator("pre").text_content()
