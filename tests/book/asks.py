"""What is asked of every page, in the order of `ASKS`.

Each function looks at an open page and leaves it as it was, but for `axe_finds_nothing_serious`, the last. A page that
has no explorer or table is not asked about it; what one page must have is named where it is asked.
"""

import functools
import re
from importlib.resources import files

import reading
from reading import CHAPTERS, OLD_ORDER, PAIRED

DESK = reading.DESK["viewport"]
PHONE = {"width": 360, "height": 740}
#: A4 without its margins, in pixels.
PAPER = {"width": 680, "height": 1000}
#: What belongs to the screen.
SCREEN = (
    ".bd-sidebar-primary, .bd-sidebar-secondary, .bd-header-article, .prev-next-footer, .copybtn, .headerlink, "
    ".lr-controls, .lr-ledger select, details.hide, .toggle-button"
)
PDF = ("adapters/lora.html", "optimizers/galore.html", "claims.html", "status.html")  # making one takes seconds
CARDS = ("notation.html", "chooser.html", "claims.html", "status.html", "ranks/sora.html")


def show(page, scheme, media="screen"):
    """The page as a reader sees it whose system is light or dark."""
    page.emulate_media(media=media, color_scheme=scheme)
    page.wait_for_function("scheme => document.documentElement.dataset.theme == scheme", arg=scheme)


# What is lit while each term of a pair has the focus, and after the last lost it: the text to be lit, places to tab to,
# the text that is lit, lit places in the formula, lit places of other terms.
LIT = """pairs => pairs.map(pair => {
  const whole = pair.querySelector("pre").textContent, all = query => [...pair.querySelectorAll(query)];
  const lit = () => all("pre .lr-lit").map(part => part.textContent).join("");
  const terms = JSON.parse(pair.dataset.terms).code.map((places, k) => {
    const stops = all(`pre .lr-t${k}[tabindex]`);
    stops[0]?.focus();
    return [places.map(([from, to]) => whole.slice(from, to)).join(""), stops.length, lit(),
            all(`mjx-math .lr-t${k}.lr-lit`).length, all(`.lr-lit:not(.lr-t${k})`).length];
  });
  document.activeElement.blur();
  return [...terms, ["", 0, lit(), all("mjx-math .lr-lit").length, all(".lr-lit").length]];
})"""


def the_picture_is_seen_at_once(page, name):
    """A chapter's first explorer begins on the first screen, also of a phone; on paper captions stay with figures."""
    if name not in CHAPTERS or name.removesuffix(".html") in OLD_ORDER:
        return
    top = page.evaluate("document.querySelector('.lr-figure .lr-explore').getBoundingClientRect().top + scrollY")
    assert top <= (450 if page.viewport_size == DESK else 700)
    breaks = page.locator(".lr-figure").evaluate_all("all => all.map(one => getComputedStyle(one).breakInside)")
    assert set(breaks) == {"avoid"}


def formulas_are_set(page, name):
    formulas = page.locator("span.math, div.math").count()
    assert page.locator("mjx-container").count() >= formulas
    assert page.locator("mjx-merror").all_text_contents() == []


def pictures_have_words(page, name):
    for alt in page.locator(".bd-article img").evaluate_all("images => images.map(image => image.alt)"):
        assert len(alt) >= 20 and not alt.endswith(".png"), f"alt text: got {alt!r}"


def icons_are_drawn(page, name):
    """The cut-down fonts hold every icon of the theme's bars; an empty one has no width."""
    if name not in CHAPTERS:
        return
    page.evaluate("document.fonts.ready")
    icons = page.locator("i[class*='fa-']:visible, span[class*='fa-']:visible").evaluate_all(
        "icons => icons.map(icon => [icon.className, getComputedStyle(icon, '::before').content])"
    )
    assert len(icons) >= 5
    fonts = page.evaluate("[...document.fonts].filter(f => f.status == 'loaded').map(f => f.family).join()")
    assert "Font Awesome 6 Free" in fonts and "Font Awesome 6 Brands" in fonts
    assert [icon for icon in icons if not re.fullmatch('"."', icon[1])] == []


OPEN = "() => document.querySelectorAll('details:not([open])').forEach(d => { d.open = true; d.dataset.opened = '' })"
CLOSE = "() => document.querySelectorAll('[data-opened]').forEach(d => { d.open = false; delete d.dataset.opened })"


def unfolded(ask):
    """Open all folds for a question about what has no size while it is folded, and close them again."""

    @functools.wraps(ask)
    def asked(page, name):
        page.evaluate(OPEN)
        try:
            ask(page, name)
        finally:
            page.evaluate(CLOSE)

    return asked


@unfolded
def terms_light_up_on_both_sides(page, name):
    """Equation beside code: by keyboard, and from the equation by mouse."""
    page.wait_for_function(
        "() => [...document.querySelectorAll('.lr-beside')].every(e => e.querySelector('mjx-container .lr-t0'))"
    )
    pairs = page.locator(".lr-beside").evaluate_all(LIT)
    assert pairs or name not in PAIRED
    for *terms, after in pairs:
        assert after == ["", 0, "", 0, 0]
        for wanted, stops, code, formula, others in terms:
            assert stops == 1  # one place of each term to tab to
            assert code.split() == wanted.split() and formula > 0 and others == 0
    for pair in page.locator(".lr-beside").all()[:1]:
        pair.locator("mjx-math .lr-t0").first.hover()
        assert pair.locator("pre .lr-t0.lr-lit").count() > 0
        page.mouse.move(0, 0)
        assert pair.locator(".lr-lit").count() == 0


def explorers_move(page, name):
    """By keyboard and by mouse."""
    for explorer in page.locator(".lr-explore").all():
        frame = explorer.locator("[data-frame]").first
        for slider, value_shown in zip(explorer.locator("input[type=range]").all(), explorer.locator("output").all()):
            before, value, start = frame.inner_html(), slider.get_attribute("aria-valuetext"), slider.input_value()
            slider.press("ArrowLeft")
            assert frame.inner_html() != before
            assert slider.get_attribute("aria-valuetext") != value
            box = slider.bounding_box()
            for share in (0.02, 0.98):  # a click near either end chooses the first or the last frame
                slider.click(position={"x": box["width"] * share, "y": box["height"] / 2})
                wanted = slider.get_attribute("min" if share < 0.5 else "max")
                assert slider.input_value() == wanted
            assert slider.get_attribute("aria-valuetext") == value_shown.text_content()
            slider.fill(start)
            assert slider.get_attribute("aria-valuetext") == value
            slider.blur()
    page.mouse.move(0, 0)


def _pair(page):
    """Boxes of the first equation and of its code."""
    for pair in page.locator(".lr-beside").all()[:1]:
        yield pair.locator("div.math").first.bounding_box(), pair.locator("pre").first.bounding_box()


def code_stands_beside_its_equation(page, name):
    for equation, code in _pair(page):
        assert equation["x"] + equation["width"] <= code["x"]
        assert equation["y"] + equation["height"] > code["y"]


def code_stands_below_its_equation(page, name):
    for equation, code in _pair(page):
        assert equation["x"] + equation["width"] > code["x"]
        assert equation["y"] + equation["height"] <= code["y"]


def nothing_scrolls_sideways(page, name):
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def long_formulas_show_their_beginning(page, name):
    gaps = page.locator("div.math").evaluate_all(
        "boxes => boxes.filter(box => box.scrollWidth > box.clientWidth).map(box =>"
        " box.querySelector('mjx-math').getBoundingClientRect().left - box.getBoundingClientRect().left)"
    )
    assert gaps or name != "primer.html"
    assert [gap for gap in gaps if gap < 0] == []


def printed_source_fits(page, name):
    over = page.locator(".cell_output .highlight-python pre").evaluate_all(
        "all => all.map(pre => pre.scrollWidth - pre.clientWidth)"
    )
    assert over or name != "primer.html"
    assert [wide for wide in over if wide > 0] == []


@unfolded
def rows_are_cards_and_stay_a_table(page, name):
    tables = page.locator("table:is(.lr-wide, .lr-notation, .claims)").all()
    assert tables or name not in CARDS
    for table in tables:
        assert table.evaluate("table => table.scrollWidth <= table.parentElement.clientWidth")
        assert table.get_by_role("cell").count() == table.locator("td:visible").count() > 0
        assert table.get_by_role("columnheader").count() == table.locator("th").count()


# What is seen on paper and should not be: what belongs to the screen, what is cut off at the right, a solution of which
# only the title is there, and an explorer without its picture.
ON_PAPER = """([screen, width]) => {
  const article = [...document.querySelectorAll(".bd-article :is(p, pre, table, img, svg, figure, mjx-container)")];
  const told = node => [node.tagName, node.className.baseVal ?? node.className, node.textContent.slice(0, 60)];
  const seen = node => node.checkVisibility({visibilityProperty: true}) && node.getBoundingClientRect().height > 0;
  return [
    [...document.querySelectorAll(screen)].filter(seen).map(told),
    article.filter(node => node.checkVisibility() && node.getBoundingClientRect().right > width + 1).map(told),
    [...document.querySelectorAll("div.solution")].filter(
      one => ![...one.children].slice(1).some(part => part.checkVisibility())).map(told),
    [...document.querySelectorAll(".lr-explore")].filter(
      one => !seen(one.querySelector("[data-frame] :is(svg, dl)"))).map(told),
  ];
}"""


def _prints(page, name, scheme):
    show(page, scheme, media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    try:
        assert page.evaluate("document.documentElement.scrollWidth") <= PAPER["width"], "cut off at the right"
        assert page.evaluate(ON_PAPER, [SCREEN, PAPER["width"]]) == [[], [], [], []]
        inline = "all => all.filter(one => getComputedStyle(one).display == 'block').length"
        assert page.locator("span.math").evaluate_all(inline) == 0, "a formula of a sentence has a line of its own"
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
        if name in PDF:
            assert page.pdf(format="A4", prefer_css_page_size=True)[:5] == b"%PDF-"
    finally:
        page.evaluate("window.dispatchEvent(new Event('afterprint'))")
        show(page, "light")


def prints(page, name):
    _prints(page, name, "light")


def prints_where_the_system_is_dark(page, name):
    _prints(page, name, "dark")


# Contrast of each text of the article with the ground behind it, the lowest first.
CONTRASTS = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const over = (top, under) => { const a = top[3] ?? 1; return under.map((v, k) => a * top[k] + (1 - a) * v); };
  const ground = node => { const layers = [];
    for (; node; node = node.parentElement) layers.push(parse(getComputedStyle(node).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]); };
  const kinds = ":is(p, li, h1, h2, h3, td, th, a, code, summary, output, figcaption)";
  return [...document.querySelectorAll(".bd-article " + kinds)]
    .filter(node => node.checkVisibility() && node.textContent.trim() && !node.closest(".headerlink"))
    .map(node => { const back = ground(node), front = over(parse(getComputedStyle(node).color), back);
      const [high, low] = [light(front), light(back)].sort((a, b) => b - a);
      return [(high + .05) / (low + .05), node.tagName, node.textContent.trim().slice(0, 40)]; })
    .sort((a, b) => a[0] - b[0]);
}"""


def dark_text_is_readable(page, name):
    show(page, "dark")
    contrasts = page.evaluate(CONTRASTS)
    show(page, "light")
    assert name not in CHAPTERS or len(contrasts) > 20
    assert [found for found in contrasts if found[0] < 4.5] == []


FIND = """async ([part, rules]) => {
  const found = await axe.run(part, {resultTypes: ["violations"], preload: false, ...rules});
  return found.violations.filter(v => ["serious", "critical"].includes(v.impact)).flatMap(
    v => v.nodes.map(node => [v.id, node.target.join(" "), node.failureSummary]));
}"""
#: Only these can differ between light and dark.
COLOURS = {"runOnly": ["color-contrast", "link-in-text-block"]}

#: Contrast takes axe milliseconds for each element. Of texts that stand alike, only the first is asked about: with the
#: same tags, classes, colours and grounds all the way up, the others look the same. Of the highlighter's spans only
#: that one is left.
ONE_OF_EACH = """() => {
  const seen = new Set(), numbers = new Map(), places = new Map();
  const place = node => { // a number for all that stand alike
    if (!node) return 0;
    if (!places.has(node)) {
      const s = getComputedStyle(node), row = node.tagName == "TR" ? node.rowIndex % 2 : "";
      const key = [place(node.parentElement), node.tagName, row, node.getAttribute("class"), s.color, s.fill,
        s.fontSize, s.fontWeight, s.backgroundColor, s.backgroundImage, s.opacity, s.filter, s.textShadow, s.position]
        .join();
      if (!numbers.has(key)) numbers.set(key, numbers.size + 1);
      places.set(node, numbers.get(key));
    }
    return places.get(node);
  };
  const texts = [...document.querySelectorAll("body *")].filter(
    node => [...node.childNodes].some(child => child.nodeType == Node.TEXT_NODE && child.data.trim()));
  texts.forEach(place); // before anything changes, or the browser would lay the page out again and again
  for (const node of texts) {
    if (!seen.has(place(node))) node.dataset.one = "";
    else if (node.matches(":is(pre, dt) span:not(:has(*))")) node.replaceWith(node.textContent);
    else delete node.dataset.one;
    seen.add(place(node));
  }
}"""


def find(page, part, scheme, rules):
    """What axe-core finds serious in a part of the page in one scheme."""
    if page.evaluate("!window.axe"):
        page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
        page.evaluate("axe.configure({rules: [{id: 'color-contrast', selector: '[data-one]'}]})")
    show(page, scheme)
    page.evaluate(ONE_OF_EACH)
    return page.evaluate(FIND, [part, rules])


def axe_finds_nothing_serious(page, name):
    # The theme's frame is the same on each reference page, so that one look at it will do.
    part = "main" if name.startswith("api/lowrank_ref.") else "html"
    found = {"dark": find(page, part, "dark", COLOURS), "light": find(page, part, "light", {})}
    assert found == {"dark": [], "light": []}


#: (size of the window, what is asked in it). A change of size costs a layout, so there are few.
ASKS = (
    (DESK, (the_picture_is_seen_at_once, formulas_are_set, pictures_have_words, icons_are_drawn,
            terms_light_up_on_both_sides, explorers_move, code_stands_beside_its_equation, printed_source_fits,
            dark_text_is_readable)),
    (PHONE, (the_picture_is_seen_at_once, nothing_scrolls_sideways, long_formulas_show_their_beginning,
             printed_source_fits, code_stands_below_its_equation, rows_are_cards_and_stay_a_table)),
    (PAPER, (prints, prints_where_the_system_is_dark)),
    (DESK, (axe_finds_nothing_serious,)),
)  # fmt: skip
