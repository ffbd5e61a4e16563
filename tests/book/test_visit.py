"""One visit to each page, on which everything is asked of it that stands in `asks.ASKS`; each ask reports alone.

What a first visit costs is part of it. Bytes are bounded; times are recorded in `_build/page_report/`, never asserted.
"""

import json

from asks import ASKS, DESK, find
from links import ROOT
from reading import CHAPTERS, POLICY, each_page, in_browser, read

MOST_BYTES = 1_000_000
WEIGHED = {"intro.html", "claims.html", *CHAPTERS}


@in_browser
@each_page
def test_page(visit, shelf, subtests, site, name):
    if name in WEIGHED:  # by readers who were never here
        page = visit()
        cost = first_visit(page, f"{site}/{name}")
        report = (ROOT / "_build" / "page_report" / name).with_suffix(".json")
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(cost, indent=1) + "\n")
        with subtests.test("a first visit is light"):
            assert cost["requests"] > 10 and 50_000 < cost["bytes"] <= MOST_BYTES
    else:
        page = shelf
        page.complaints.clear()
        page.set_viewport_size(DESK)
        read(page, f"{site}/{name}")
    page.add_style_tag(content="* { transition: none !important; }")
    for size, asks in ASKS:
        page.set_viewport_size(size)
        for ask in asks:
            with subtests.test(f"{ask.__name__}, {size['width']} pixels"):
                ask(page, name)
    with subtests.test("nobody complains"):
        assert page.complaints == []


def first_visit(page, url):
    """Everything that comes over the wire, headers included, until the page is quiet."""
    tools = page.context.new_cdp_session(page)
    tools.send("Network.enable")
    kinds, sizes = {}, {}
    tools.on("Network.responseReceived", lambda event: kinds.update({event["requestId"]: event["type"]}))
    tools.on("Network.loadingFinished", lambda event: sizes.update({event["requestId"]: event["encodedDataLength"]}))
    read(page, url)
    page.wait_for_load_state("networkidle")
    times = page.evaluate(
        """() => ({
          first_paint_ms: performance.getEntriesByName("first-contentful-paint")[0]?.startTime,
          loaded_ms: performance.getEntriesByType("navigation")[0].loadEventEnd,
        })"""
    )
    tools.detach()
    by_kind = {}
    for request, size in sizes.items():
        kind = kinds.get(request, "Other").lower()
        by_kind[kind] = by_kind.get(kind, 0) + int(size)
    rounded = {key: round(value) for key, value in times.items() if value}
    return {"bytes": sum(by_kind.values()), "requests": len(sizes), "by_kind": by_kind, **rounded}


@in_browser
def test_the_policy_is_enforced(page, site):
    """That nobody complains means something: eval and foreign pictures are refused, and told."""
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
def test_axe_would_find_something(page, site):
    page.goto(f"{site}/intro.html")
    page.add_style_tag(content=".pale { color: #999; background: #fff; }")
    bad = "<img src='_static/low-rank.png'><pre><span>dark</span> <span class='pale'>pale</span></pre>" * 2
    page.evaluate("bad => document.querySelector('.bd-article').insertAdjacentHTML('beforeend', bad)", bad)
    found = [rule for rule, *_ in find(page, "html", "light", {})]
    assert found.count("image-alt") == 2 and found.count("color-contrast") == 1
