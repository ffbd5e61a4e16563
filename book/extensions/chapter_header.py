"""What stands under a paper's title, made from its card and from measured data.

Badges (state, time, GPU, Colab, source, tests, arXiv, download), what to read before,
what changed, and how to cite. A page `<part>/<key>` is a paper's chapter if
`lowrank_ref.<part>.<key>` has a `PAPER`.
"""

import json
import sys
from html import escape
from pathlib import Path

import yaml
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
        section, book = title.parent, Path(self.env.srcdir)
        header = [
            search_entries(paper, section["ids"][0]),
            html(badges(name, paper, book)),
            before_you_read(name, paper),
            html(what_changed(paper)),
            *cite(paper, book / "references.bib"),
        ]
        place = section.index(title) + 1
        section[place:place] = header
        keywords = ", ".join([paper.title, f"arXiv:{paper.arxiv}", *paper.aliases])
        for meta, content in (("description", paper.summary), ("keywords", keywords)):
            self.document.insert(0, nodes.meta("", name=meta, content=content))


def chapters() -> dict[str, PaperInfo]:
    """Page name -> card, for the papers that exist."""
    return {f"{paper.part}/{paper.key}": paper for paper in papers().values()}


def html(text: str) -> nodes.raw:
    return nodes.raw("", text, format="html")


def stored_hardware(book: Path, key: str) -> list[str]:
    """Where the stored results of a paper were measured, GPUs first."""
    found = set()
    for path in (book / "results").glob(f"{key}_*.json"):
        for part in json.loads(path.read_text()).values():
            found.add(part["provenance"]["hardware"])
    return sorted(found, key=lambda hardware: ("CPU" in hardware, hardware))


def gpus(book: Path, key: str) -> list[str]:
    return [name for name in stored_hardware(book, key) if "CPU" not in name]


def timing(book: Path, name: str) -> dict[str, str | int]:
    """Seconds and hardware of a chapter's last timed run, or nothing."""
    path = book / "results" / "timings.json"
    return json.loads(path.read_text()).get(name, {}) if path.exists() else {}


def badges(name: str, paper: PaperInfo, book: Path) -> str:
    """Facts first, then plain links."""
    state = " ".join(filter(None, [paper.status, paper.verified]))
    facts = [(f"state-{paper.status}", f"State: {state}")]
    if took := timing(book, name):
        facts.append(("time", f"Runs in {took['seconds']} s on a {took['hardware']}"))
    if found := gpus(book, paper.key):
        facts.append(("gpu", f"GPU results: {', '.join(found)}"))
    to_root = "../" * name.count("/")
    targets = [
        ("Open in Colab", links.colab(f"book/{name}.ipynb")),
        ("Notebook", f"{to_root}_sources/{name}.ipynb"),
        ("Source", links.source(f"lowrank_ref/{name}.py")),
        ("Tests", links.source(f"tests/{paper.part}/test_{paper.key}.py")),
        (f"arXiv:{paper.arxiv}", f"https://arxiv.org/abs/{paper.arxiv}"),
    ]
    cells = [
        f'<li><span class="{css}">{escape(text)}</span></li>' for css, text in facts
    ]
    cells += [
        f'<li><a href="{escape(u)}">{escape(text)}</a></li>' for text, u in targets
    ]
    return f'<ul class="badges" aria-label="About this chapter">{"".join(cells)}</ul>'


def before_you_read(name: str, paper: PaperInfo) -> nodes.Node:
    """A box with a link to each chapter that this one builds on."""
    box = nodes.admonition("", nodes.title("", "Before you read"), classes=["before"])
    if not paper.needs:
        box += nodes.paragraph("", "This chapter stands alone.")
        return box
    cards, items = papers(), nodes.bullet_list()
    for key in paper.needs:
        card = cards.get(key)
        page = f"{card.part}/{key}" if card else key
        text = card.name if card else ""  # a page gives its own title
        xref = addnodes.pending_xref(
            "",
            nodes.inline("", text),
            refdoc=name,
            refdomain="std",
            reftype="doc",
            reftarget=f"/{page}",
            refexplicit=bool(card),
            refwarn=True,
        )
        line = nodes.paragraph("", "", xref)
        if card:
            line += nodes.Text(f". {card.summary}")
        items += nodes.list_item("", line)
    box += items
    return box


def what_changed(paper: PaperInfo) -> str:
    """The card's changes, newest first, folded; nothing where nothing changed."""
    if not paper.changes:
        return ""
    items = "".join(
        f'<li><time datetime="{day}">{day}</time> {escape(text)}</li>'
        for day, text in sorted(paper.changes.items(), reverse=True)
    )
    fold = '<details class="fold"><summary>What changed</summary><ul>'
    return f"{fold}{items}</ul></details>"


def cite(paper: PaperInfo, bibliography: Path) -> list[nodes.Node]:
    """The paper's entry of references.bib and the book's own, folded."""
    entry = parse_file(bibliography).entries[paper.key].to_string("bibtex").strip()
    out = [html('<details class="fold"><summary>Cite</summary>')]
    for about, text in (("The paper:", entry), ("This book:", book_bibtex())):
        out.append(nodes.paragraph("", about))
        out.append(nodes.literal_block(text, text, language="bibtex"))
    return [*out, html("</details>")]


def book_bibtex() -> str:
    """How to cite the book, from CITATION.cff."""
    card = yaml.safe_load((links.ROOT / "CITATION.cff").read_text())
    authors = " and ".join(f"{{{author['name']}}}" for author in card["authors"])
    fields = {
        "title": card["title"],
        "author": authors,
        "version": card["version"],
        "url": card["repository-code"],
    }
    lines = [f"    {key} = {{{value}}}" for key, value in fields.items()]
    return "@software{lowrank_ref,\n" + ",\n".join(lines) + "\n}"


def search_entries(paper: PaperInfo, target: str) -> addnodes.index:
    """Terms of the index; the search box looks there too, numbers included."""
    number = paper.arxiv.partition("v")[0]
    terms = [paper.key, paper.name, paper.title, number, f"arXiv:{number}"]
    unique = dict.fromkeys([*terms, *paper.aliases])
    entries = [("single", term, target, "main", None) for term in unique]
    return addnodes.index(entries=entries)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(ChapterHeader)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
