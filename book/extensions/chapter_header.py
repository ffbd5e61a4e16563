"""One quiet line below a chapter's picture, made from its card and from measured data.

Times, state and GPU; what to read before; Colab, download, source, tests, arXiv; what
changed and how to cite, which open in place. A page `<part>/<key>` is a paper's chapter
if `lowrank_ref.<part>.<key>` has a `PAPER`.
"""

import json
import sys
from html import escape
from pathlib import Path

import nbformat
import yaml
from docutils import nodes
from pybtex.database import parse_file
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from lowrank_ref.core.registry import PaperInfo, papers

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import links
import reading_time


class ChapterHeader(SphinxTransform):
    """Insert the line below the picture, and what the page can be searched by."""

    default_priority = 600  # after the page is parsed, before indices are collected

    def apply(self) -> None:
        name = self.env.docname
        paper = chapters().get(name)
        title = next(self.document.findall(nodes.title), None)
        if paper is None or title is None:
            return
        section, book = title.parent, Path(self.env.srcdir)
        section.insert(
            section.index(title) + 1, search_entries(paper, section["ids"][0])
        )
        picture = first_picture(self.document) or title
        place = picture.parent.index(picture) + 1
        picture.parent[place:place] = quiet_line(
            name, paper, book, student=self.config.student_edition
        )
        keywords = ", ".join([paper.title, f"arXiv:{paper.arxiv}", *paper.aliases])
        for meta, content in (("description", paper.summary), ("keywords", keywords)):
            self.document.insert(0, nodes.meta("", name=meta, content=content))


def first_picture(document: nodes.document) -> nodes.Element | None:
    """The cell that shows the first explorer."""
    for raw in document.findall(nodes.raw):
        if 'class="lr-explore"' in raw.astext():
            cell = raw
            while cell and cell.get("nb_element") != "cell_code":
                cell = cell.parent
            return cell
    return None


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


def quiet_line(
    name: str, paper: PaperInfo, book: Path, *, student: bool = False
) -> list[nodes.Node]:
    """Facts, what to read before, links, and two folds, as one list.

    The students' edition has no link to Colab, where solutions are.
    """
    out = [html('<ul class="badges" aria-label="About this chapter">')]
    for css, text in facts(name, paper, book):
        out.append(html(f'<li class="{css}">{escape(text)}</li>'))
    out += before(name, paper)
    for text, address in targets(name, paper)[student:]:
        out.append(html(f'<li><a href="{escape(address)}">{escape(text)}</a></li>'))
    return [*out, html(what_changed(paper)), *cite(paper, book), html("</ul>")]


def facts(name: str, paper: PaperInfo, book: Path) -> list[tuple[str, str]]:
    """Class and text of what was measured or checked."""
    notebook = nbformat.read(book / f"{name}.ipynb", as_version=4)
    found = [("reading", f"Reads in {reading_time.said(notebook)}")]
    if took := timing(book, name):
        found.append(("time", f"runs in {took['seconds']} s on a {took['hardware']}"))
    if hardware := gpus(book, paper.key):
        found.append(("gpu", f"GPU results: {', '.join(hardware)}"))
    state = " ".join(filter(None, [paper.status, paper.verified]))
    return [*found, (f"state-{paper.status}", f"state: {state}")]


def targets(name: str, paper: PaperInfo) -> list[tuple[str, str]]:
    """Text and address of each link."""
    to_root = "../" * name.count("/")
    return [
        ("Open in Colab", links.colab(name)),
        ("Notebook", f"{to_root}notebooks/{name}.ipynb"),
        ("Reference", f"{to_root}api/lowrank_ref.{name.replace('/', '.')}.html"),
        ("Source", links.source(f"lowrank_ref/{name}.py")),
        ("Tests", links.source(f"tests/{paper.part}/test_{paper.key}.py")),
        (f"arXiv:{paper.arxiv}", f"https://arxiv.org/abs/{paper.arxiv}"),
    ]


def before(name: str, paper: PaperInfo) -> list[nodes.Node]:
    """A link to each chapter that this one builds on."""
    if not paper.needs:
        return [html('<li class="needs">stands alone</li>')]
    cards, line = papers(), nodes.paragraph("", "Read before: ")
    for key in paper.needs:
        card = cards.get(key)
        if len(line) > 1:
            line += nodes.Text(", ")
        line += addnodes.pending_xref(
            "",
            nodes.inline("", card.name if card else ""),  # a page gives its own title
            refdoc=name,
            refdomain="std",
            reftype="doc",
            reftarget=f"/{card.part}/{key}" if card else f"/{key}",
            refexplicit=bool(card),
            refwarn=True,
        )
    return [html('<li class="needs">'), line, html("</li>")]


def what_changed(paper: PaperInfo) -> str:
    """The card's changes, newest first, folded; nothing where nothing changed."""
    if not paper.changes:
        return ""
    items = "".join(
        f'<li><time datetime="{day}">{day}</time> {escape(text)}</li>'
        for day, text in sorted(paper.changes.items(), reverse=True)
    )
    fold = '<li><details class="fold"><summary>What changed</summary><ul>'
    return f"{fold}{items}</ul></details></li>"


def cite(paper: PaperInfo, book: Path) -> list[nodes.Node]:
    """The paper's entry of references.bib and the book's own, folded."""
    entries = parse_file(book / "references.bib").entries
    entry = entries[paper.key].to_string("bibtex").strip()
    out = [html('<li><details class="fold"><summary>Cite</summary>')]
    for about, text in (("The paper:", entry), ("This book:", book_bibtex())):
        out.append(nodes.paragraph("", about))
        out.append(nodes.literal_block(text, text, language="bibtex"))
    return [*out, html("</details></li>")]


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
