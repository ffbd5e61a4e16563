"""The built pages as a reader's browser shows them, served under a strict policy on what they may load."""

import re

from reading import HTML, POLICY, each_chapter, each_page, in_browser, read

from lowrank_ref.core.registry import papers

#: (paper, what a reader types): its names, its aliases, its number on arXiv.
QUERIES = [
    (paper, query)
    for paper in papers().values()
    for query in (paper.name, *paper.aliases, paper.arxiv, paper.arxiv.partition("v")[0])
]


@in_browser
@each_page
def test_page_reads_well(reader, site, name):
    read(reader, f"{site}/{name}")
    formulas = reader.locator("span.math, div.math").count()
    assert reader.locator("mjx-container").count() >= formulas
    assert reader.locator("mjx-merror").all_text_contents() == []
    for alt in reader.locator(".bd-article img").evaluate_all("images => images.map(image => image.alt)"):
        assert len(alt) >= 20 and not alt.endswith(".png"), f"alt text: got {alt!r}"
    reader.set_viewport_size({"width": 360, "height": 740})
    assert reader.evaluate("document.documentElement.scrollWidth") <= 360, "the page scrolls sideways on a phone"
    assert reader.complaints == []


@in_browser
def test_the_policy_is_enforced(page, site):
    """The test above means something: eval and foreign pictures are refused, and told."""
    assert "unsafe-eval" not in POLICY
    page.goto(f"{site}/intro.html")
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://localhost:1/x.png'}))")
    # Later, for what a debugger starts itself may use eval.
    with page.expect_console_message(lambda message: message.text == "no eval"):
        page.add_script_tag(
            content="setTimeout(() => { try { eval('1') } catch (error) { console.error('no eval') } })"
        )
    assert any("no eval" in complaint for complaint in page.complaints)
    assert any("violates" in complaint for complaint in page.complaints)


@in_browser
@each_chapter
def test_explorers_move(reader, site, name):
    """By keyboard, by mouse and by a finger."""
    read(reader, f"{site}/{name}")
    for explorer in reader.locator(".lr-explore").all():
        frame = explorer.locator("[data-frame]").first
        for slider, value_shown in zip(explorer.locator("input[type=range]").all(), explorer.locator("output").all()):
            before, value = frame.inner_html(), slider.get_attribute("aria-valuetext")
            slider.press("ArrowLeft")
            assert frame.inner_html() != before
            assert slider.get_attribute("aria-valuetext") != value
            box = slider.bounding_box()
            for share in (0.02, 0.98):  # a click near either end chooses the first or the last frame
                slider.click(position={"x": box["width"] * share, "y": box["height"] / 2})
                wanted = slider.get_attribute("min" if share < 0.5 else "max")
                assert slider.input_value() == wanted
            assert slider.get_attribute("aria-valuetext") == value_shown.text_content()
    assert reader.complaints == []


@in_browser
def test_an_explorer_follows_a_finger(visit, site):
    page = visit(viewport={"width": 360, "height": 740}, has_touch=True)
    read(page, f"{site}/adapters/lora.html")
    slider = page.locator(".lr-explore input[type=range]").first
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.touchscreen.tap(box["x"] + 0.97 * box["width"], box["y"] + box["height"] / 2)
    assert slider.input_value() == slider.get_attribute("max")
    assert page.complaints == []


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
def test_icons_are_drawn(page, site):
    """The cut-down fonts hold every icon of the theme's bars; an empty one has no width."""
    page.goto(f"{site}/adapters/lora.html")
    page.evaluate("document.fonts.ready")
    icons = page.locator("i[class*='fa-']:visible, span[class*='fa-']:visible")
    assert icons.count() >= 5
    fonts = page.evaluate("[...document.fonts].filter(f => f.status == 'loaded').map(f => f.family).join()")
    assert "Font Awesome 6 Free" in fonts and "Font Awesome 6 Brands" in fonts
    for icon in icons.all():
        content = icon.evaluate("icon => getComputedStyle(icon, '::before').content")
        assert re.fullmatch('"."', content), icon.get_attribute("class")


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
