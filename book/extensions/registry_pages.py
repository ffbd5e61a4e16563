"""Tables made from the registry and from the chapters' own outputs.

`{chooser}`: when to use which method. `{claims}`: every claim of every chapter.
`{status}`: all planned papers.
"""

import functools
import json
from collections import Counter
from html import escape
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from docutils import nodes
from pybtex.database import parse_file
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lowrank_ref.core.registry import PARTS, PaperInfo, papers
from lowrank_ref.lab.claims import VERDICTS

#: What a verdict is called in a count.
SHORT = dict(zip(VERDICTS, ("held", "in part", "too small to tell", "not confirmed")))


def page_of(paper: PaperInfo) -> str:
    return f"{paper.part}/{paper.key}.html"


def link(paper: PaperInfo, fragment: str = "", text: str = "") -> str:
    return f'<a href="{page_of(paper)}{fragment}">{escape(text or paper.name)}</a>'


@functools.cache
def chapter(path: Path) -> tuple[str, list[list[str]]]:
    """Anchor of the experiment and rows of the claim tables, read once a build."""
    notebook = nbformat.read(path, as_version=4)
    return experiment(notebook), claims_of(notebook)


def notebook_of(book: Path, paper: PaperInfo) -> Path:
    return book / paper.part / f"{paper.key}.ipynb"


def experiment(notebook: nbformat.NotebookNode) -> str:
    """The anchor of the section that holds the experiment."""
    for cell in notebook.cells:
        for line in cell.source.split("\n"):
            if line.startswith("## ") and "experiment" in line.lower():
                return "#" + nodes.make_id(line[3:])
    return ""


def claims_of(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """Claim, place, measurement and verdict: the rows of the chapter's claim tables."""
    rows = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            page = BeautifulSoup(
                output.get("data", {}).get("text/html", ""), "html.parser"
            )
            for row in page.select("table.claims tbody tr"):
                rows.append([data.get_text() for data in row.find_all("td")])
    return rows


def counted(claims: list[list[str]]) -> str:
    """Such as "2 held, 1 in part"."""
    verdicts = Counter(row[3] for row in claims)
    return ", ".join(f"{verdicts[v]} {SHORT[v]}" for v in VERDICTS if verdicts[v])


def table(
    header: list[str], rows: list[list[str]], name: str, attributes: str = ""
) -> str:
    """Rows of HTML cells in a box that scrolls by itself."""
    columns = "".join(f'<th scope="col">{title}</th>' for title in header)
    head = f"<thead><tr>{columns}</tr></thead>"
    body = "\n".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="lr-scroll" tabindex="0" role="region" aria-label="{name}">'
        f'<table class="lr-table lr-wide"{attributes}>\n{head}\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def chooser(book: Path) -> str:
    """A table for each part that has a chapter."""
    found, text = papers(), ""
    for part, (title, _) in PARTS.items():
        mine = [paper for paper in found.values() if paper.part == part]
        rows = []
        for paper in mine:
            anchor, claimed = chapter(notebook_of(book, paper))
            instead = "<br>".join(
                f"{link(found[key]) if key in found else key}: {escape(condition)}"
                for key, condition in paper.instead.items()
            )
            evidence = link(paper, anchor, counted(claimed) or "read")
            rows.append([link(paper), escape(paper.use_when), instead, evidence])
        if rows:
            header = ["method", "use it when", "rather", "its claims, measured here"]
            text += f'<h3 class="lr-part">{escape(title)}</h3>' + table(
                header, rows, title
            )
    return text


def claims(book: Path) -> str:
    """One table of all claims, which the script beside it sorts and filters."""
    rows = []
    for paper in papers().values():
        anchor, claimed = chapter(notebook_of(book, paper))
        for claim, where, measured, verdict in claimed:
            cells = [
                link(paper, anchor),
                *map(escape, (claim, where, measured, verdict)),
            ]
            rows.append(cells)
    header = ["paper", "claim", "where", "measured here", "verdict"]
    script = '<script defer src="_static/ledger.js"></script>'
    return table(header, rows, "All claims", " data-ledger") + script


def status(book: Path) -> str:
    """A row for each of the planned papers."""
    found = papers()
    titles = parse_file(book / "references.bib").entries
    timings = json.loads((book / "results" / "timings.json").read_text())
    rows = []
    for part, (_, keys) in PARTS.items():
        for key in keys:
            paper = found.get(key)
            if paper is None:
                title = titles[key].fields["title"].replace("{", "").replace("}", "")
                rows.append([escape(title), "planned", "", "", ""])
                continue
            time = timings.get(f"{part}/{key}")
            measured = sorted((book / "results").glob(f"{key}_*.json"))
            hardware = {
                part["provenance"]["hardware"]
                for path in measured
                for part in json.loads(path.read_text()).values()
            }
            rows.append(
                [
                    link(paper, text=paper.title),
                    f"{paper.status}, {paper.verified}"
                    if paper.verified
                    else paper.status,
                    f"{time['seconds']} s" if time else "",
                    escape(", ".join(sorted(hardware))),
                    counted(chapter(notebook_of(book, paper))[1]),
                ]
            )
    header = ["paper", "state", "runs in", "stored results from", "claims"]
    return table(header, rows, "State of all papers")


class _Made(SphinxDirective):
    """A table made from registry and chapters."""

    def run(self) -> list[nodes.Node]:
        book = Path(self.env.srcdir)
        self.env.note_reread()  # it depends on all chapters
        return [nodes.raw("", TABLES[self.name](book), format="html")]


TABLES = {"chooser": chooser, "claims": claims, "status": status}


def setup(app: Sphinx) -> dict[str, bool]:
    for name in TABLES:
        app.add_directive(name, _Made)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
