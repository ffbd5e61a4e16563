"""Pages that everyone can read: what axe-core finds, and contrast on dark pages."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from reading import CHAPTERS, each_page, in_browser, read

needs_axe = pytest.mark.skipif(
    not find_spec("axe_playwright_python"), reason="no axe: pip install axe-playwright-python"
)

FIND = """async ([part, rules]) => {
  const found = await axe.run(part, {resultTypes: ["violations"], preload: false, ...rules});
  return found.violations.filter(v => ["serious", "critical"].includes(v.impact)).flatMap(
    v => v.nodes.map(node => [v.id, node.target.join(" "), node.failureSummary]));
}"""
#: Only these can differ between light and dark.
COLOURS = {"runOnly": ["color-contrast", "link-in-text-block"]}
#: The page in the other scheme, at once, as after a click on the theme's button.
THEME = "theme => { document.documentElement.dataset.theme = document.documentElement.dataset.mode = theme; }"

#: Code has a span for every word, and axe takes milliseconds for each. Of spans that stand alike, the first stays: with
#: the same classes all the way up, the others have the same colours in any scheme.
ONE_OF_EACH = """() => {
  const seen = new Set();
  for (const span of document.querySelectorAll(":is(pre, dt) span:not(:has(*), [style])")) {
    let place = "";
    for (let up = span; up; up = up.parentElement) place += `${up.tagName} ${up.className}/`;
    if (seen.has(place)) span.replaceWith(span.textContent);
    seen.add(place);
  }
}"""

#: Contrast of each text of the article with the ground behind it, the lowest first.
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


@pytest.fixture(scope="module")
def axe():
    return (Path(find_spec("axe_playwright_python").origin).parent / "axe.min.js").read_text(encoding="utf-8")


@needs_axe
@in_browser
@each_page
def test_axe_finds_nothing_serious_and_dark_text_is_readable(reader, site, name, axe):
    read(reader, f"{site}/{name}")
    reader.add_style_tag(content="* { transition: none !important; }")
    reader.evaluate(THEME, "dark")
    contrasts = reader.evaluate(CONTRASTS)
    assert name not in CHAPTERS or len(contrasts) > 20
    assert [found for found in contrasts if found[0] < 4.5] == []
    reader.evaluate(axe)
    reader.evaluate(ONE_OF_EACH)
    # The theme's frame is the same on each reference page, so that one look at it will do.
    part = "main" if name.startswith("api/lowrank_ref.") else "html"
    assert reader.evaluate(FIND, [part, COLOURS]) == []
    reader.evaluate(THEME, "light")
    assert reader.evaluate(FIND, [part, {}]) == []


@needs_axe
@in_browser
def test_axe_would_find_something(reader, site, axe):
    reader.goto(f"{site}/intro.html")
    reader.evaluate(axe)
    reader.add_style_tag(content=".pale { color: #999; background: #fff; }")
    bad = "<img src='_static/low-rank.png'><pre><span>dark</span> <span class='pale'>pale</span></pre>" * 2
    reader.evaluate("bad => document.querySelector('.bd-article').insertAdjacentHTML('beforeend', bad)", bad)
    reader.evaluate(ONE_OF_EACH)
    found = [rule for rule, *_ in reader.evaluate(FIND, ["html", {}])]
    assert found.count("image-alt") == 2 and found.count("color-contrast") == 1


@in_browser
def test_a_dark_system_gets_dark_pages(visit, site):
    page = visit(color_scheme="dark")
    page.goto(f"{site}/intro.html")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
