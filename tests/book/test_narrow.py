"""What a narrow window must not cut off: the beginning of a formula, printed source, the cells of a wide table."""

import pytest
from reading import in_browser, read

PHONE = {"viewport": {"width": 360, "height": 740}}


@in_browser
def test_long_formulas_show_their_beginning(visit, site):
    page = visit(**PHONE)
    read(page, f"{site}/primer.html")
    gaps = page.locator("div.math").evaluate_all(
        "boxes => boxes.filter(box => box.scrollWidth > box.clientWidth).map(box =>"
        " box.querySelector('mjx-math').getBoundingClientRect().left - box.getBoundingClientRect().left)"
    )
    assert gaps and min(gaps) >= 0


@in_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_printed_source_fits(visit, site, width):
    page = visit(viewport={"width": width, "height": 740})
    read(page, f"{site}/primer.html")
    over = page.locator(".cell_output .highlight-python pre").evaluate_all(
        "all => all.map(pre => pre.scrollWidth - pre.clientWidth)"
    )
    assert over and max(over) <= 0


@in_browser
@pytest.mark.parametrize("name", ["notation", "chooser", "claims", "status", "ranks/sora"])
def test_rows_are_cards_on_a_phone_and_stay_a_table(visit, site, name):
    page = visit(**PHONE)
    read(page, f"{site}/{name}.html")
    tables = page.locator("table:is(.lr-wide, .lr-notation, .claims)")
    for table in tables.all():
        assert table.evaluate("table => table.scrollWidth <= table.parentElement.clientWidth")
        assert table.get_by_role("cell").count() == table.locator("td:visible").count() > 0
        assert table.get_by_role("columnheader").count() == table.locator("th").count()
    assert tables.count() > 0
    assert page.complaints == []
