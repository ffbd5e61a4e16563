"""Print what a first visit to the pages costs, as the last test run recorded it.

python book/tools/page_report.py

Bytes as they come compressed over the wire; times compare pages on one machine, not
machines.
"""

import json
import sys

from links import ROOT

COLUMNS = ("page", "kB", "requests", "first paint ms", "loaded ms", "heaviest kinds")


def rows(report: dict) -> list[tuple[str, ...]]:
    """One row per page, the heaviest first."""
    out = []
    for name, entry in sorted(report.items(), key=lambda item: -item[1]["bytes"]):
        kinds = sorted(entry["by_kind"].items(), key=lambda item: -item[1])[:3]
        heaviest = ", ".join(f"{kind} {size / 1000:.0f}" for kind, size in kinds)
        paint, loaded = entry.get("first_paint_ms", "-"), entry.get("loaded_ms", "-")
        size = f"{entry['bytes'] / 1000:.0f}"
        out.append(
            (name, size, str(entry["requests"]), f"{paint}", f"{loaded}", heaviest)
        )
    return out


def main() -> int:
    folder = ROOT / "_build" / "page_report"
    report = {
        str(path.relative_to(folder).with_suffix(".html")): json.loads(path.read_text())
        for path in folder.rglob("*.json")
    }
    if not report:
        print("No report: run `pytest tests/book/test_visit.py`.", file=sys.stderr)
        return 1
    table = [COLUMNS, *rows(report)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        cells = [cell.rjust(w) for cell, w in zip(row[1:-1], widths[1:-1])]
        print("  ".join([row[0].ljust(widths[0]), *cells, row[-1]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
