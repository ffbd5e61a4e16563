"""What only some pages do (search, filter, a phone, a disk), in a reader's browser. What all do: `test_visit.py`."""

import re

import pytest
from asks import ASKS, PHONE
from reading import HTML, PAIRED, in_browser, read

from lowrank_ref.core.registry import papers

#: (paper, what a reader types): its names, its aliases, its number on arXiv.
QUERIES = [
    (paper, query)
    for paper in papers().values()
    for query in (paper.name, *paper.aliases, paper.arxiv, paper.arxiv.partition("v")[0])
]


@in_browser
@pytest.mark.parametrize("name", ["adapters/lora.html", "primer.html", "claims.html"])
def test_opened_on_a_phone(visit, subtests, site, name):
    """A page that was never wide, and an explorer that follows a finger."""
    page = visit(viewport=PHONE, has_touch=True)
    read(page, f"{site}/{name}")
    for ask in (ask for size, asks in ASKS if size == PHONE for ask in asks):
        with subtests.test(ask.__name__):
            ask(page, name)
    for slider in page.locator(".lr-explore input[type=range]").all()[:1]:
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        page.touchscreen.tap(box["x"] + 0.97 * box["width"], box["y"] + box["height"] / 2)
        assert slider.input_value() == slider.get_attribute("max")
    assert page.complaints == []


@in_browser
def test_without_javascript_equation_and_code_are_there(visit, site):
    page = visit(java_script_enabled=False)
    page.goto(f"{site}/{PAIRED[0]}")
    pair = page.locator(".lr-beside").first
    assert "\\tag{1}" in pair.locator("div.math").text_content() and "def " in pair.locator("pre").text_content()


@in_browser
def test_search_finds_each_paper_by_all_its_names(reader, site):
    """One open page; each query runs as typed ones do."""
    reader.goto(f"{site}/search.html?q=rank")
    reader.locator("#search-results li a").first.wait_for()
    missed = []
    for paper, query in QUERIES:
        found = reader.evaluate(
            """query => {
              const [terms, ...parsed] = Search._parseQuery(query);
              return Search._performSearch(terms, ...parsed).map(result => result[0]);
            }""",
            query,
        )
        if f"{paper.part}/{paper.key}" not in found:
            missed.append((paper.key, query))
    assert missed == []
    assert reader.complaints == []


@in_browser
def test_search_box_leads_to_a_paper(page, site):
    page.goto(f"{site}/search.html?q=2106.09685")
    page.locator("#search-results a[href^='adapters/lora.html']").first.wait_for()
    assert page.complaints == []


@in_browser
def test_the_ledger_filters_sorts_and_remembers(page, site):
    read(page, f"{site}/claims.html")
    rows, said = page.locator("table[data-ledger] tbody tr:visible"), page.locator(".lr-ledger [role=status]")
    whole = rows.count()
    assert said.text_content() == f"{whole} of {whole} claims"
    page.get_by_label("verdict").select_option("holds")
    assert 0 < rows.count() < whole
    assert said.text_content() == f"{rows.count()} of {whole} claims"
    assert set(page.locator("tbody tr:visible td:last-child").all_text_contents()) == {"holds"}
    page.get_by_label("verdict").select_option("")
    # From here on by keyboard alone.
    page.get_by_label("find").focus()
    page.keyboard.type("galore")
    few = rows.count()
    assert 0 < few < whole
    heads = page.get_by_role("columnheader")
    page.get_by_role("button", name="verdict").focus()
    page.keyboard.press("Enter")
    assert heads.last.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert heads.last.get_attribute("aria-sort") == "descending"
    seen = page.locator("tbody tr:visible td:last-child").all_text_contents()
    assert len(set(seen)) > 1 and seen == sorted(seen, reverse=True)
    # The address is the view.
    address = page.evaluate("location.href")  # `page.url` may come later
    assert address.endswith("#find=galore&sort=-verdict")
    page.goto(f"{site}/intro.html")
    read(page, address)
    assert page.locator("tbody tr:visible td:last-child").all_text_contents() == seen
    page.get_by_role("button", name="show all").press("Enter")
    assert rows.count() == whole and "#" not in page.evaluate("location.href")
    page.evaluate("location.hash = 'verdict=nonsense&sort=nonsense'")
    assert rows.count() == whole
    assert page.complaints == []


@in_browser
def test_pages_work_from_disk(page):
    for name in ("adapters/lora.html", "claims.html"):
        read(page, (HTML / name).as_uri())
        assert page.locator("mjx-container").count() >= page.locator("span.math, div.math").count()
        assert page.locator(".bd-article h1").is_visible()
    page.get_by_label("find").fill("lora")
    assert page.evaluate("location.href").endswith("claims.html#find=lora")
    assert page.complaints == []
    page.goto((HTML / "search.html").as_uri() + "?q=LoRA")
    # Search names the pages; that a browser refuses it the text around a hit, on a disk, is no complaint of ours.
    page.locator("#search-results a[href*='adapters/lora.html']").first.wait_for()


@in_browser
def test_a_dark_system_gets_dark_pages(visit, site):
    page = visit(color_scheme="dark")
    page.goto(f"{site}/intro.html")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@in_browser
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
