"""Chapters as notebooks for JupyterLab and Colab, which do not know MyST Markdown.

python book/tools/kernel_notebooks.py                 into _build/notebooks
python book/tools/kernel_notebooks.py --from FOLDER   from another copy of book/

Code stays as it is, and so do outputs, but for explorers: their stored output is a
picture, since JupyterLab strips what makes them move until the cell has run. Citations
become links to the papers, links to pages get their full address, boxes become
quotations or folds, exercises become headings, and solutions are closed. What this tool
does not know it refuses, so that no MyST is left.
"""

import argparse
import base64
import re
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.sign import NotebookNotary
from pybtex.database import Entry, parse_file

import links
from execute import write
from links import ROOT
from lowrank_ref.core.registry import papers
from still import PAGE, described, is_explorer, still

OUT = ROOT / "_build" / "notebooks"

#: An opening fence with its kind and what stands behind it, or a closing one.
FENCE = re.compile(r"^(?P<fence>:{3,})(?:\{(?P<kind>[\w-]+)\}(?P<title>.*))?\s*$")
OPTION = re.compile(r"^:(?P<name>[\w-]+):\s*(?P<value>.*)$")
#: What is looked at in a text: a role, code (which stays), a link to another page.
INLINE = re.compile(
    r"\{(?P<role>[a-z:]+)\}`(?P<said>[^`]+)`"
    r"|(?P<code>^```.*?^```|`[^`\n]+`)"
    r"|\[(?P<text>[^\]]*)\]\((?P<path>(?![a-z]+:|#)[^)\s#]+)(?P<hash>#[^)]*)?\)",
    re.S | re.M,
)
#: Tag -> what JupyterLab keeps closed. Colab closes the code of a "form".
CLOSED = {
    "hide-input": ("source_hidden",),
    "remove-input": ("source_hidden",),
    "hide-output": ("outputs_hidden",),
    "hide-cell": ("source_hidden", "outputs_hidden"),
}


def authors(entry: Entry) -> str:
    """Family names: one, two, or the first of more."""
    names = [
        " ".join(p.prelast_names + p.last_names).strip("{}")
        for p in entry.persons["author"]
    ]
    if len(names) > 2:
        return f"{names[0]} et al."
    return " and ".join(names)


def address(entry: Entry) -> str:
    """Where a work can be read: arXiv, else its DOI, else its own address."""
    fields = entry.fields
    if "eprint" in fields:
        return f"https://arxiv.org/abs/{fields['eprint']}"
    if "doi" in fields:
        return f"https://doi.org/{fields['doi']}"
    return fields.get("url", "")


@cache
def bibliography(book: Path) -> dict[str, Entry]:
    return dict(parse_file(book / "references.bib").entries.items())


@cache
def title(book: Path, page: str) -> str:
    """The heading of a page, Markdown or notebook."""
    if (book / f"{page}.md").exists():
        text = (book / f"{page}.md").read_text(encoding="utf-8")
    else:
        text = nbformat.read(book / f"{page}.ipynb", as_version=4).cells[0].source
    found = re.search(r"^# (.+)$", text, re.M)
    if not found:
        raise ValueError(f"{page}: has no heading")
    return found[1]


class Converter:
    """One chapter, and what of it is open while its cells are read."""

    def __init__(self, book: Path, name: str, stills: bool = True):
        self.book, self.name, self.stills = book, name, stills
        self.exercises: dict[str, int] = {}
        self.solving = ""

    def page(self, path: str) -> str:
        """The public address of a page that a chapter names by its path."""
        target = (
            (self.book / self.name).parent / path
            if not path.startswith("/")
            else self.book / path[1:]
        )
        relative = target.resolve().relative_to(self.book.resolve()).as_posix()
        relative = re.sub(r"\.(md|ipynb)$", "", relative)
        made = relative.startswith(
            "api/lowrank_ref."
        )  # a reference page, made by the build
        if not made and not any(
            (self.book / f"{relative}{end}").exists() for end in (".md", ".ipynb")
        ):
            raise ValueError(f"{self.name}: {path} is no page of the book")
        return relative

    def role(self, found: re.Match[str]) -> str:
        """One citation, link or number in the text."""
        kind, text = found["role"], found["said"]
        if kind == "cite":
            return "(" + "; ".join(map(self.citation, text.split(","))) + ")"
        if kind == "doc":
            named = re.fullmatch(r"(.+?)\s*<(.+)>", text, re.S)
            page = self.page(named[2] if named else text)
            shown = named[1] if named else title(self.book, page)
            return f"[{shown}]({links.site('latest')}/{page}.html)"
        if kind in ("sub", "sup"):
            return f"<{kind}>{text}</{kind}>"
        raise ValueError(f"{self.name}: {found[0]} has no form in a plain notebook")

    def citation(self, key: str) -> str:
        entry = bibliography(self.book)[key.strip()]
        text = f"{authors(entry)} {entry.fields['year']}"
        return f"[{text}]({address(entry)})" if address(entry) else text

    def link(self, found: re.Match[str]) -> str:
        """A Markdown link to a page of the book, or to an object of the reference."""
        page = self.page(found["path"])
        text = found["text"] or title(self.book, page)
        return f"[{text}]({links.site('latest')}/{page}.html{found['hash'] or ''})"

    def inline(self, found: re.Match[str]) -> str:
        """A role or a link in plain Markdown; code as it is."""
        if found["code"]:
            return found[0]
        return self.role(found) if found["role"] else self.link(found)

    def box(self, kind: str, heading: str, options: dict[str, str], body: str) -> str:
        """A fenced block as plain Markdown."""
        if kind == "exercise":
            number = self.exercises.setdefault(
                options.get("label", heading), len(self.exercises) + 1
            )
            return (
                f"### Exercise {number}: {heading}\n\n{body}"
                if heading
                else f"### Exercise {number}\n\n{body}"
            )
        if kind == "solution":
            return fold(self.solution(heading), body)
        if kind in ("admonition", "note", "tip", "warning", "important"):
            heading = heading or kind.capitalize()
            if "dropdown" in options.get("class", ""):
                return fold(heading, body)
            return "\n".join(
                f"> {line}".rstrip() for line in f"**{heading}**\n\n{body}".split("\n")
            )
        raise ValueError(f"{self.name}: :::{{{kind}}} has no form in a plain notebook")

    def solution(self, label: str) -> str:
        number = self.exercises.get(label)
        if number is None:
            raise ValueError(
                f"{self.name}: a solution of {label!r}, which is no exercise above it"
            )
        return f"Solution of exercise {number}"

    def text(self, source: str) -> str:
        """A Markdown cell. A solution of several cells is folded cell by cell."""
        out: list[str] = []
        open_solution: list[str] = []
        lines = iter(INLINE.sub(self.inline, source).split("\n"))
        for line in lines:
            found = FENCE.match(line)
            place = open_solution if self.solving else out
            if not found:
                place.append(line)
            elif found["kind"] == "solution-start":
                self.solving = self.solution(found["title"].strip())
                skip_to_close(lines, found["fence"])
            elif found["kind"] == "solution-end":
                skip_to_close(lines, found["fence"])
                out += self.close(open_solution) if open_solution else []
                self.solving = ""
            elif found["kind"]:
                place.append(self.block(found, lines))
            else:
                raise ValueError(f"{self.name}: a fence {line!r} that closes nothing")
        out += self.close(open_solution)
        return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()

    def close(self, prose: list[str]) -> list[str]:
        text = "\n".join(prose).strip()
        prose.clear()
        if text:
            return [fold(self.solving, text)]
        return [f"**{self.solving}**: the closed cell below."] if self.solving else []

    def block(self, opened: re.Match[str], lines: Iterator[str]) -> str:
        """A fenced block, read up to its own fence; blocks in it have shorter ones."""
        options, body, heading = {}, [], True
        for line in lines:
            inner = FENCE.match(line)
            option = OPTION.match(line)
            if inner and not inner["kind"] and inner["fence"] == opened["fence"]:
                text = "\n".join(body).strip()
                return self.box(opened["kind"], opened["title"].strip(), options, text)
            if heading and option:
                options[option["name"]] = option["value"]
                continue
            heading = heading and not line.strip()
            body.append(self.block(inner, lines) if inner and inner["kind"] else line)
        raise ValueError(f"{self.name}: :::{{{opened['kind']}}} is never closed")

    def convert(self, chapter: NotebookNode) -> NotebookNode:
        """The whole chapter; below its title stands where it comes from."""
        cells: list[NotebookNode] = []
        for cell in chapter.cells:
            if cell.cell_type == "markdown":
                if text := self.text(cell.source):
                    cells.append(nbformat.v4.new_markdown_cell(text))
            else:
                cells.append(closed(cell, bool(self.solving), self.stills))
                if said := caption(cell):
                    cells.append(nbformat.v4.new_markdown_cell(said))
        if self.solving:
            raise ValueError(f"{self.name}: {self.solving} is never closed")
        cells.insert(1, nbformat.v4.new_markdown_cell(front(self.name)))
        for number, cell in enumerate(cells, start=1):
            cell.id = f"c{number:02d}"
        return nbformat.v4.new_notebook(cells=cells, metadata=chapter.metadata)


def skip_to_close(lines: Iterator[str], fence: str) -> None:
    """Read over the options of a fence that holds nothing."""
    for line in lines:
        if line.rstrip() == fence:
            return


def fold(summary: str, body: str) -> str:
    """Closed until it is clicked, in JupyterLab and in Colab."""
    return f"<details>\n<summary><b>{summary}</b></summary>\n\n{body}\n\n</details>"


def closed(cell: NotebookNode, solution: bool, stills: bool) -> NotebookNode:
    """The cell with what the page hides closed; code of a solution too."""
    cell = nbformat.from_dict(cell)
    for output in cell.outputs:
        html = output.get("data", {}).get("text/html", "")
        if stills and is_explorer(html):
            output.data["image/png"] = base64.b64encode(still(html)).decode()
            output.metadata["image/png"] = {"width": PAGE}  # it has twice as many dots
            del output.data["text/html"]
    tags = cell.metadata.get("tags", [])
    hidden = {part for tag in tags for part in CLOSED.get(tag, ())}
    if solution:
        hidden |= {"source_hidden", "outputs_hidden"}
    if hidden:
        cell.metadata["jupyter"] = {part: True for part in sorted(hidden)}
    if "source_hidden" in hidden:
        cell.metadata["cellView"] = "form"
    return cell


def caption(cell: NotebookNode) -> str:
    """Below a figure: its caption, and its description for who does not see it."""
    shown = cell.metadata.get("mystnb", {})
    text = shown.get("figure", {}).get("caption", "")
    alt = shown.get("image", {}).get("alt", "")
    for output in cell.outputs:
        html = output.get("data", {}).get("text/html", "")
        if is_explorer(html):
            text = "Run the cell above, and the sliders move the figure."
            alt = described(html)
    about = fold("What the figure shows", alt) if alt else ""
    return "\n\n".join(filter(None, [f"*{text}*" if text else "", about]))


def front(name: str) -> str:
    """Where the notebook comes from, its version, and what to read before."""
    page = f"{links.site('latest')}/{name}.html"
    lines = [f"From [the book's page]({page}), version {links.version()}."]
    paper = papers().get(name.rpartition("/")[2])
    if paper and name == f"{paper.part}/{paper.key}":
        number = f"[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
        code = f"[source]({links.source(f'lowrank_ref/{name}.py')})"
        lines.append(f"The paper is {number}; the method is one file, {code}.")
        if paper.needs:
            lines.append(f"Read before: {', '.join(map(needed, paper.needs))}.")
    return " ".join(lines)


def needed(key: str) -> str:
    """A link to what a card names: a paper's chapter, or a page at the top."""
    paper = papers().get(key)
    text = paper.name if paper else title(ROOT / "book", key)
    page = f"{paper.part}/{key}" if paper else key
    return f"[{text}]({links.site('latest')}/{page}.html)"


def converted(
    path: Path, book: Path = ROOT / "book", *, stills: bool = True
) -> NotebookNode:
    """A chapter's notebook for a kernel; without stills, outputs are the chapter's."""
    path = path.resolve()
    name = (
        path.relative_to(book).with_suffix("").as_posix()
        if path.is_relative_to(book)
        else path.stem
    )
    return Converter(book, name, stills).convert(nbformat.read(path, as_version=4))


def make(book: Path, out: Path) -> list[Path]:
    """Write all notebooks anew; return their paths."""
    shutil.rmtree(out, ignore_errors=True)
    made = []
    for path in links.chapters(book):
        target = out / path.relative_to(book)
        target.parent.mkdir(parents=True, exist_ok=True)
        write(converted(path, book), target)
        made.append(target)
    return made


def trust(paths: list[Path]) -> None:
    """Sign notebooks, so that JupyterLab shows figures that move."""
    notary = NotebookNotary()
    for path in paths:
        notary.sign(nbformat.read(path, as_version=4))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="book", type=Path, default=ROOT / "book")
    parser.add_argument("--to", type=Path, default=OUT)
    parser.add_argument(
        "--trust",
        action="store_true",
        help="so that JupyterLab shows figures that move",
    )
    options = parser.parse_args()
    made = make(options.book.resolve(), options.to)
    if options.trust:
        trust(made)
    print(f"{len(made)} notebooks for JupyterLab and Colab in {options.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
