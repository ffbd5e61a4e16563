"""Chapters on paper: Chromium prints them to PDF, and nothing that belongs to the screen comes along."""

import pytest
from reading import HTML, in_browser, read

#: A4 without its margins, in pixels.
PAPER = {"width": 680, "height": 1000}


@in_browser
@pytest.mark.parametrize("name", ["adapters/lora.html", "optimizers/galore.html", "claims.html", "status.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_prints(visit, name, scheme):
    page = visit(viewport=PAPER, color_scheme=scheme)
    read(page, (HTML / name).as_uri())
    page.emulate_media(media="print", color_scheme=scheme)
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    for gone in (".bd-sidebar-primary", ".bd-sidebar-secondary", ".bd-header-article", ".prev-next-footer", ".copybtn",
                 ".headerlink", ".lr-controls", ".lr-ledger select", "details.hide", ".toggle-button"):  # fmt: skip
        assert page.locator(f"{gone} >> visible=true").count() == 0, gone
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER["width"], "cut off at the right"
    wide = page.evaluate(
        """width => [...document.querySelectorAll(".bd-article :is(p, pre, table, img, svg, figure, mjx-container)")]
          .filter(node => node.checkVisibility() && node.getBoundingClientRect().right > width + 1)
          .map(node => [node.tagName, node.className.baseVal ?? node.className, node.textContent.slice(0, 60)])""",
        PAPER["width"],
    )
    assert wide == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in (
        "rgb(255, 255, 255)",
        "rgba(0, 0, 0, 0)",
    )
    for explorer in page.locator(".lr-explore").all():
        assert explorer.locator("[data-frame] :is(svg, dl)").first.is_visible()
    hidden = page.locator("div.solution").evaluate_all(
        "all => all.filter(one => ![...one.children].slice(1).some(part => part.checkVisibility()))"
    )
    assert hidden == [], "a solution is neither printed nor hidden as a whole"
    assert page.pdf(format="A4", prefer_css_page_size=True)[:5] == b"%PDF-"
