"""The student edition: no word of a solution, a cell for each exercise, and chapters that still run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import links
import nbformat
import pytest
import student_edition
import yaml
from kernel_notebooks import Converter, converted, trust
from links import ROOT
from nbformat.sign import NotebookNotary
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from student_edition import depends, kept, names, split, student

BOOK = ROOT / "book"
CHAPTERS = links.chapters()
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
EXERCISE = ":::{exercise} Compute\n:label: one\n\nHow many?\n:::"
START = ":::{solution-start} one\n:class: dropdown\n:::\n"
END = ":::{solution-end}\n:::\n"


def chapter(*cells):
    """A notebook; cells that begin with `>` are code."""
    new = [new_code_cell(text[1:]) if text.startswith(">") else new_markdown_cell(text) for text in cells]
    return new_notebook(cells=new)


def read(path):
    return nbformat.read(path, as_version=4)


def everything(notebook):
    """All text of a notebook, in its order: sources, and what cells show."""
    parts = []
    for cell in notebook.cells:
        parts.append(cell.source)
        for output in cell.get("outputs", []):
            shown = [output.get("text", ""), *output.get("data", {}).values()]
            parts += [text if isinstance(text, str) else json.dumps(text) for text in shown]
    return "\n".join(parts)


def solutions(notebook):
    """Lines of solutions that stand nowhere else in the chapter, found without the tool: text between two marks."""
    text = everything(notebook)
    mark = re.compile(r"^:::\{solution-start\}.*?^:::\{solution-end\}\n:::$|^(:::+)\{solution\}.*?^\1$", re.M | re.S)
    hidden, elsewhere = "\n".join(found[0] for found in mark.finditer(text)), mark.sub("", text)
    lines = {line.strip() for line in hidden.split("\n") if not line.startswith(":")}
    return {line for line in lines if len(line) >= 20 and line not in elsewhere}


def for_kernels(made, path):
    name = path.relative_to(BOOK).with_suffix("").as_posix()
    return Converter(BOOK, name, stills=False).convert(made)


@each_chapter
def test_no_line_of_a_solution_is_left(path):
    before = read(path)
    made = student(before)
    text = everything(made) + everything(for_kernels(made, path))
    told, tasks = solutions(before), re.findall(r"^:::+\{exercise\}", everything(before), re.M)
    assert len(told) >= 2 * len(tasks)  # so that there is something to look for
    assert [line for line in told if line in text] == []
    assert not re.search(r"\{solution|Solution of exercise", text)


@each_chapter
def test_each_exercise_has_an_empty_cell_and_all_else_stays(path):
    before, after = read(path), student(read(path))
    labels = [
        label
        for cell in before.cells
        if cell.cell_type == "markdown"
        for label in re.findall(r"^:::\{exercise\}.*?^:label: (\S+)$", cell.source, re.M | re.S)
    ]
    answers = [cell for cell in after.cells if cell.source.endswith(": your answer")]
    assert [cell.source for cell in answers] == [f"# {label}: your answer" for label in labels]
    assert all(cell.outputs == [] for cell in answers)
    for answer, label in zip(answers, labels, strict=True):  # each right below its exercise
        above = after.cells[after.cells.index(answer) - 1].source
        assert re.findall(r"^:label: (\S+)$", above, re.M)[-1] == label
    stays = [cell for cell, solves in zip(*split(before), strict=True) if not solves]
    code = [cell for cell in after.cells if cell.cell_type == "code" and cell not in answers]
    assert [cell.source for cell in code] == [cell.source for cell in stays]
    shown = [[out.get("data", out.get("text")) for out in cell.outputs] for cell in code]
    assert shown == [[out.get("data", out.get("text")) for out in cell.outputs] for cell in stays]
    nbformat.validate(after)
    nbformat.validate(for_kernels(after, path))


@each_chapter
def test_chapters_run_without_their_solutions(path):
    """No cell that stays comes after one that goes, so that it runs as in the book, and none reads a removed name."""
    code, solves = split(read(path))
    assert solves == sorted(solves), "a cell after the solutions: run the student notebook, its outputs may differ"
    assert depends(code, solves) == []


@pytest.mark.parametrize(
    ("cells", "lost"),
    [
        ([("f = 1", True), ("print(f)", False)], ["f"]),
        ([("f = 1", False), ("f = 2", True), ("print(f)", False)], ["f"]),
        ([("f = 1", True), ("f = 2", False), ("print(f)", False)], []),
        ([("def f(): pass", True), ("def g():\n    return f()", False)], ["f"]),
        ([("import torch as t", True), ("[t.ones(i) for i in range(3)]", False)], ["t"]),
        ([("f = 1", True), ("def g(f):\n    return f", False)], []),
        ([("f = 1", True), ("%pip install x\nlambda: print(f)", False)], ["f"]),
        ([("class f: pass", True), ("print(f)", True)], []),
        ([("def g():\n    global f\n    f = 1", True), ("f", False)], ["f"]),
    ],
)
def test_a_name_from_a_solution_is_seen(cells, lost):
    code = [new_code_cell(source) for source, _ in cells]
    assert depends(code, [solves for _, solves in cells]) == lost


def test_names_of_a_cell():
    assert names("import a.b\nfrom c import d as e\nx: int = len(y)") == ({"a", "e", "x"}, {"y", "int"} - {"int"})


def test_solutions_go_whatever_their_form():
    folded = ":::{solution} one\n:class: dropdown\nFour.\n:::\nBelow."
    nested = "::::{solution} one\nIt is\n:::{tip}\nfour.\n:::\n::::\nBelow."
    made = student(chapter("# T", EXERCISE + "\nMore.", START + "\nFive.", ">print(4)", "Six.\n" + END + "Open.", ">1"))
    assert [cell.source for cell in made.cells] == ["# T", EXERCISE, "# one: your answer", "More.", "Open.", "1"]
    assert kept(folded, False) == kept(nested, False) == ("Below.", False)
    assert kept(f"A\n{START}B\n{END}C\n{START}D", False) == ("A\nC\n", True)
    assert made.cells[2].metadata.tags == ["remove-cell"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ((EXERCISE, START), "never closed"),
        ((START, START, END), "opens or closes twice"),
        ((END,), "opens or closes twice"),
        ((START, ">f = 4", END, ">f"), "read what solutions set: f"),
        ((":::{exercise} Compute\nHow many?\n:::",), "wanted a label"),
    ],
)
def test_what_would_leak_or_break_is_refused(cells, message):
    with pytest.raises(ValueError, match=message):
        student(chapter(*cells))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    out = tmp_path_factory.mktemp("student")
    student_edition.make_sources(BOOK, out / "book")
    return out / "book"


def test_sources_are_the_book_less_solutions(sources):
    made = {path.relative_to(sources) for path in links.chapters(sources)}
    assert made == {path.relative_to(BOOK) for path in CHAPTERS}
    pages = {path.relative_to(BOOK): path for path in BOOK.rglob("*.md") if "homeworks" not in path.parts}
    for name, path in pages.items():
        same = (sources / name).read_text() == path.read_text()
        assert same == (str(name) not in student_edition.SAID), name
    assert not list(sources.rglob("homeworks"))
    assert "{solution" not in "".join(path.read_text() for path in sources.rglob("*.ipynb"))


def test_settings_offer_no_notebook_with_solutions(tmp_path):
    book, ours = (
        yaml.safe_load(path.read_text()) for path in (ROOT / "_config.yml", student_edition.settings(tmp_path))
    )
    assert "launch_buttons" in book and "launch_buttons" not in ours
    assert ours["sphinx"]["config"].pop("student_edition") is True
    assert ours["sphinx"]["config"] == book["sphinx"]["config"] and ours["parse"] == book["parse"]


def test_notebooks_are_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    path = tmp_path / "chapter.ipynb"
    nbformat.write(chapter("# T", ">1"), path)
    assert not NotebookNotary().check_signature(read(path))
    trust([path])
    assert NotebookNotary().check_signature(read(path))


@pytest.mark.slow
def test_pages_of_two_chapters_build_without_warnings(sources, tmp_path):
    """Built as the book is, warnings as errors; neither a page nor the search index knows a solution."""
    keep = ("primer", "adapters/lora")
    small = tmp_path / "book"
    small.mkdir()
    for name in ("theme", "results", "references.bib"):
        os.symlink(sources / name, small / name)
    (small / "adapters").mkdir()
    for name in keep:
        notebook = read(sources / f"{name}.ipynb")
        for cell in notebook.cells:  # links to pages that are not here become their text
            if cell.cell_type == "markdown":
                cell.source = re.sub(r"\{doc\}`([^<`]+?)\s*(<[^>]*>)?`", r"\1", cell.source)
                cell.source = re.sub(r"\[([^\]]*)\]\((?!http|#)[^)]*\)", r"\1", cell.source)
        nbformat.write(notebook, small / f"{name}.ipynb")
    (small / "_toc.yml").write_text("format: jb-book\nroot: primer\nchapters:\n  - file: adapters/lora\n")
    (small / "bibliography.md").write_text("---\norphan: true\n---\n# Works\n\n```{bibliography}\n```\n")
    (small / "notation.md").write_text("---\norphan: true\n---\n# Notation\n")
    config = yaml.safe_load(student_edition.settings(tmp_path).read_text())
    for name in ("api_pages", "registry_pages"):  # pages that are not here
        del config["sphinx"]["local_extensions"][name]
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config))
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))
    tool = [jupyter_book, "build", str(small), "--config", str(tmp_path / "_config.yml")]
    done = subprocess.run(
        [*tool, "--path-output", str(tmp_path), "-W", "--keep-going", "-q"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    html = tmp_path / "_build" / "html"
    told = "\n".join(path.read_text() for path in [*html.rglob("*.html"), *html.glob("searchindex.js")])
    assert "lora-memory" in told and "colab.research" not in told
    for name in keep:
        for line in solutions(read(BOOK / f"{name}.ipynb")):
            if not re.search(r"[<>&`$*_\\'\"]", line):  # as a page would write it
                assert line not in told
    assert "sphinx-solution" not in told and "solution-" not in told


def test_the_lora_notebook_of_students_opens_with_what_readers_get(sources):
    made = converted(sources / "adapters" / "lora.ipynb", sources)
    assert made.cells[0].source.startswith("# ") and "Exercise 1" in everything(made)
    assert "Solution" not in everything(made)
