"""The notebooks for JupyterLab and Colab: a chapter's code and outputs, and no Markdown that only the book knows."""

import re
from functools import partial
from pathlib import Path

import kernel_notebooks
import links
import nbformat
import pytest
from kernel_notebooks import Converter, converted
from links import ROOT
from still import is_explorer, still

from lowrank_ref.lab.draw import explore, line_chart, readout

BOOK = ROOT / "book"
CHAPTERS = links.chapters()
#: Marks of the book's own Markdown: fences, roles, targets, options of blocks.
MARKS = re.compile(r"^\s*:{3,}|^```\{|\{[a-z:]+\}`|^\([\w-]+\)=$|^:[\w-]+: |^\+\+\+", re.M)


@pytest.fixture
def write(tmp_path):
    """A chapter of some Markdown cells in a book with one other page and one work."""
    (tmp_path / "other.md").write_text("# The other page\n")
    reference = (
        "@article{work, author={Ada One and Bo Two and Cy Three}, title={T}, year={2024}, eprint={2401.00001}}\n"
    )
    (tmp_path / "references.bib").write_text(reference)

    def text(*cells):
        path = tmp_path / "part" / "chapter.ipynb"
        path.parent.mkdir(exist_ok=True)
        made = [nbformat.v4.new_code_cell(c[1:]) if c[0] == ">" else nbformat.v4.new_markdown_cell(c) for c in cells]
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# T"), *made]), path)
        return converted(path, tmp_path).cells[2:]  # after the title and where it comes from

    return text


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_keeps_code_and_outputs_and_loses_every_mark(path):
    before, after = nbformat.read(path, as_version=4), converted(path)
    cells = [[c for c in notebook.cells if c.cell_type == "code"] for notebook in (before, after)]
    assert [c.source for c in cells[0]] == [c.source for c in cells[1]]
    for old, new in zip(*cells):
        for wanted, got in zip(old.outputs, new.outputs, strict=True):
            if is_explorer(wanted.get("data", {}).get("text/html", "")):
                assert got.data.keys() == wanted.data.keys() - {"text/html"} | {"image/png"}
            else:
                assert got == wanted
    prose = [c.source for c in after.cells if c.cell_type == "markdown"]
    assert not [found[0] for text in prose for found in MARKS.finditer(text)]
    assert links.version() in prose[1] and f"{links.site('latest')}/" in prose[1]
    nbformat.validate(after)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_solutions_are_closed(path):
    """Each solution is named once or more, its prose stands in folds, and its code is closed."""
    before, after = nbformat.read(path, as_version=4), converted(path)
    told = "\n".join(c.source for c in before.cells if c.cell_type == "markdown")
    prose = "\n".join(c.source for c in after.cells if c.cell_type == "markdown")
    count = len(re.findall(r"^:::\{exercise\}", told, re.M))
    named = re.findall(r"<b>Solution of exercise (\d)</b>|\*\*Solution of exercise (\d)\*\*", prose)
    assert {int(a or b) for a, b in named} == set(range(1, count + 1))
    assert prose.count("<details>") == prose.count("</details>")
    inside = False
    code = {c.source: c for c in after.cells if c.cell_type == "code"}
    for cell in before.cells:
        if cell.cell_type == "markdown":
            marks = re.findall(r"^:::\{solution-(start|end)\}", cell.source, re.M)
            inside = marks[-1] == "start" if marks else inside
        elif inside:
            assert (
                code[cell.source].metadata.jupyter.source_hidden and code[cell.source].metadata.jupyter.outputs_hidden
            )


def test_every_figure_tells_what_it_shows():
    for path in CHAPTERS:
        cells = converted(path).cells
        for cell, following in zip(cells, cells[1:]):
            if alt := cell.metadata.get("mystnb", {}).get("image", {}).get("alt"):
                assert alt in following.source, f"{path.stem}: {alt}"


def test_citations_and_links_are_plain(write):
    cited, linked, bare = write(
        "See {cite}`work`, `{cite}`.", "{doc}`this <../other>`", "[](../other.md) and {doc}`../other`"
    )
    assert cited.source == "See ([One et al. 2024](https://arxiv.org/abs/2401.00001)), `{cite}`."
    page = f"{links.site('latest')}/other.html"
    assert linked.source == f"[this]({page})"
    assert bare.source == f"[The other page]({page}) and [The other page]({page})"


def test_boxes(write):
    box, folded = write(
        ":::{admonition} Mind\nTwo\nlines.\n:::", ":::{admonition} More\n:class: dropdown\n\nHidden.\n:::"
    )
    assert box.source == "> **Mind**\n>\n> Two\n> lines."
    assert folded.source.split("\n\n") == ["<details>\n<summary><b>More</b></summary>", "Hidden.", "</details>"]


def test_exercises_and_their_solutions(write):
    cells = write(
        ":::{exercise} Compute\n:label: one\n\nHow many?\n:::",
        ":::{solution-start} one\n:class: dropdown\n:::\n\nFour.",
        ">print(4)",
        ":::{solution-end}\n:::\n\nOpen again.",
        ">print(5)",
    )
    assert cells[0].source == "### Exercise 1: Compute\n\nHow many?"
    assert cells[1].source == kernel_notebooks.fold("Solution of exercise 1", "Four.")
    assert cells[2].metadata.jupyter == {"source_hidden": True, "outputs_hidden": True}
    assert cells[2].metadata.cellView == "form"
    assert cells[3].source == "Open again." and "jupyter" not in cells[4].metadata


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{numref}`x`", "has no form in a plain notebook"),
        (":::{figure} a.png\n:::", "has no form in a plain notebook"),
        (":::{admonition} A\nNever closed.", "is never closed"),
        (":::\n", "closes nothing"),
        (":::{solution} two\nFour.\n:::", "no exercise above it"),
        ("{doc}`nowhere`", "is no page of the book"),
    ],
)
def test_what_it_does_not_know_it_refuses(write, text, message):
    with pytest.raises(ValueError, match=message):
        write(text)


def test_the_command_writes_all_and_removes_what_is_old(tmp_path):
    (tmp_path / "old.ipynb").write_text("{}")
    made = kernel_notebooks.make(BOOK, tmp_path)
    assert sorted(tmp_path.rglob("*.ipynb")) == sorted(made) and len(made) == len(CHAPTERS)
    assert {path.relative_to(tmp_path) for path in made} == {path.relative_to(BOOK) for path in CHAPTERS}


def test_a_converter_keeps_nothing_from_chapter_to_chapter():
    first = Converter(BOOK, "primer").convert(nbformat.read(BOOK / "primer.ipynb", as_version=4))
    assert converted(BOOK / "primer.ipynb") == first


def test_a_still_shows_the_middle_frame():
    """Its size follows from its parts, and it changes with the frame."""

    def frame(factor, k):
        return line_chart({"a": ([0, 1], [0, factor * k])}, x_label="x", y_label="y") + readout({"k": k})

    made = [explore(partial(frame, c), title="T", alt="A.", k=[1, 2, 3])._repr_html_() for c in (1, -1)]
    pictures = [still(html) for html in made]
    assert pictures[0] != pictures[1] and all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert still(made[0]) == pictures[0]
    for wrong in ("", "<p>text</p>", explore(lambda k: {"k": k}, title="T", alt="A.", k=[1, 2])._repr_html_()):
        with pytest.raises(ValueError, match="html: wanted the output of an explorer, with a drawing"):
            still(wrong)


def test_a_chapter_may_be_named_from_anywhere(monkeypatch):
    whole = BOOK / "adapters" / "nola.ipynb"
    monkeypatch.chdir(whole.parent)
    assert converted(Path(whole.name)) == converted(whole)
