"""What a first visit costs. Bytes are bounded; times are recorded in `_build/page_report.json`, never asserted."""

import json

from links import ROOT
from reading import CHAPTERS, in_browser

MOST_BYTES = 1_000_000
SLOW_DOWN = 4  # about a phone of the middle class beside a desktop


@in_browser
def test_a_first_visit_is_light(visit, site):
    report = {}
    for name in ["intro.html", "claims.html", *CHAPTERS]:
        page = visit()
        page.set_default_timeout(60_000)
        report[name] = first_visit(page, f"{site}/{name}")
        page.close()
    (ROOT / "_build" / "page_report.json").write_text(json.dumps(report, indent=1) + "\n")
    assert all(entry["requests"] > 10 and entry["bytes"] > 50_000 for entry in report.values())
    assert {name: entry["bytes"] for name, entry in report.items() if entry["bytes"] > MOST_BYTES} == {}


def first_visit(page, url):
    """Everything that comes over the wire, headers included, until the page is quiet."""
    tools = page.context.new_cdp_session(page)
    tools.send("Network.enable")
    tools.send("Emulation.setCPUThrottlingRate", {"rate": SLOW_DOWN})
    kinds, sizes = {}, {}
    tools.on("Network.responseReceived", lambda event: kinds.update({event["requestId"]: event["type"]}))
    tools.on("Network.loadingFinished", lambda event: sizes.update({event["requestId"]: event["encodedDataLength"]}))
    page.goto(url)
    tools.send("Emulation.setCPUThrottlingRate", {"rate": 1})  # what is timed is over
    page.evaluate("() => window.MathJax?.startup?.promise")
    page.wait_for_load_state("networkidle")
    times = page.evaluate(
        """() => ({
          first_paint_ms: performance.getEntriesByName("first-contentful-paint")[0]?.startTime,
          loaded_ms: performance.getEntriesByType("navigation")[0].loadEventEnd,
        })"""
    )
    by_kind = {}
    for request, size in sizes.items():
        kind = kinds.get(request, "Other").lower()
        by_kind[kind] = by_kind.get(kind, 0) + int(size)
    rounded = {key: round(value) for key, value in times.items() if value}
    return {"bytes": sum(by_kind.values()), "requests": len(sizes), "by_kind": by_kind, **rounded}
