"""Under a paper's title: time, Colab, source, test, arXiv, download, and its BibTeX.

A page `<part>/<key>` is a paper's chapter if `lowrank_ref.<part>.<key>` has a `PAPER`.
"""

import json
import sys
from html import escape
from pathlib import Path

from docutils import nodes
from pybtex.database import parse_file
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from lowrank_ref.core.registry import PaperInfo, papers

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import links


class ChapterHeader(SphinxTransform):
    """Insert the header after the title, and what the page can be searched by."""

    default_priority = 600  # after the page is parsed, before indices are collected

    def apply(self) -> None:
        name = self.env.docname
        paper = chapters().get(name)
        title = next(self.document.findall(nodes.title), None)
        if paper is None or title is None:
            return
        section = title.parent
        header = [
            search_entries(paper, section["ids"][0]),
            nodes.raw("", badges(name, paper, Path(self.env.srcdir)), format="html"),
            *bibtex(paper, Path(self.env.srcdir) / "references.bib"),
        ]
        place = section.index(title) + 1
        section[place:place] = header
        keywords = ", ".join([paper.title, f"arXiv:{paper.arxiv}", *paper.aliases])
        for meta, content in (("description", paper.summary), ("keywords", keywords)):
            self.document.insert(0, nodes.meta("", name=meta, content=content))


def chapters() -> dict[str, PaperInfo]:
    """Page name -> card, for the papers that exist."""
    return {f"{paper.part}/{paper.key}": paper for paper in papers().values()}


def badges(name: str, paper: PaperInfo, book: Path) -> str:
    """A list of plain links."""
    notebook = f"{'../' * name.count('/')}_sources/{name}.ipynb"
    items = [
        ("Open in Colab", links.colab(f"book/{name}.ipynb")),
        ("Source", links.source(f"lowrank_ref/{name}.py")),
        ("Tests", links.source(f"tests/{paper.part}/test_{paper.key}.py")),
        (f"arXiv:{paper.arxiv}", f"https://arxiv.org/abs/{paper.arxiv}"),
        ("Notebook", notebook),
    ]
    cells = [
        f'<li><a href="{escape(url)}">{escape(text)}</a></li>' for text, url in items
    ]
    timings = book / "results" / "timings.json"
    timing = (json.loads(timings.read_text()) if timings.exists() else {}).get(name)
    if timing:
        text = f"{timing['seconds']} s on a {timing['hardware']}"
        cells.insert(0, f"<li><span>Runs in {escape(text)}</span></li>")
    return f'<ul class="badges" aria-label="About this chapter">{"".join(cells)}</ul>'


def bibtex(paper: PaperInfo, bibliography: Path) -> list[nodes.Node]:
    """The paper's entry of references.bib, folded."""
    entries = parse_file(bibliography).entries
    if paper.key not in entries:
        return []
    text = entries[paper.key].to_string("bibtex").strip()
    fold = '<details class="bibtex"><summary>BibTeX</summary>'
    return [
        nodes.raw("", fold, format="html"),
        nodes.literal_block(text, text, language="bibtex"),
        nodes.raw("", "</details>", format="html"),
    ]


def search_entries(paper: PaperInfo, target: str) -> addnodes.index:
    """Terms of the index; the search box looks there too, numbers included."""
    number = paper.arxiv.partition("v")[0]
    terms = [paper.key, paper.title, number, f"arXiv:{number}", *paper.aliases]
    unique = dict.fromkeys(terms)
    entries = [("single", term, target, "main", None) for term in unique]
    return addnodes.index(entries=entries)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(ChapterHeader)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
