"""The student edition: the book without solutions, a cell for each exercise.

python book/tools/student_edition.py             sources, notebooks, pages
python book/tools/student_edition.py --no-pages  sources and notebooks only

In _build/student: book/ (sources), notebooks/ (for JupyterLab and Colab, trusted on
this machine), html/. Solutions are taken out of copies, with their code and outputs, so
that no page, notebook or search index holds them. A chapter is refused where a cell
that stays reads a name that a solution has set. (`hide_solutions` of sphinx-exercise
would leave them in the notebooks, and crashes.)
"""

import argparse
import builtins
import re
import shutil
import symtable
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
import yaml
from nbformat import NotebookNode

import build
import kernel_notebooks
from execute import normalise, write
from links import ROOT, chapters
from workload import LABEL, TASK

OUT = ROOT / "_build" / "student"
#: Not copied: sheets with their answers, and what tools leave behind.
LEFT_OUT = ("homeworks", "__pycache__", ".ipynb_checkpoints")
SOLUTION = re.compile(
    r"^(?P<fence>:{3,})\{solution\}[^\n]*\n.*?^(?P=fence)[^\S\n]*$\n?", re.S | re.M
)
GATE = re.compile(
    r"^(?P<fence>:{3,})\{solution-(?P<gate>start|end)\}[^\n]*\n"
    r"(?::[^\n]*\n)*?(?P=fence)[^\S\n]*$\n?",
    re.M,
)
#: What the book says of its solutions, and what this edition says instead.
SAID = {
    "how_to_read.md": (
        "Solutions are folded, and their code runs\nwith every test of the book.",
        "This edition leaves solutions out;\neach exercise has a cell for your answer.",
    ),
}


def kept(text: str, solving: bool) -> tuple[str, bool]:
    """Markdown less its solutions, and whether one is open at its end."""
    out, at = [], 0
    for gate in GATE.finditer(text):
        if (gate["gate"] == "start") == solving:
            raise ValueError(f"{gate[0].strip()!r}: a solution opens or closes twice")
        if not solving:
            out.append(text[at : gate.start()])
        solving, at = gate["gate"] == "start", gate.end()
    rest = "" if solving else text[at:]
    return SOLUTION.sub("", "".join([*out, rest])), solving


def with_answers(text: str) -> Iterator[NotebookNode]:
    """Markdown, cut after each exercise, where an empty cell follows."""
    at = 0
    for exercise in TASK.finditer(text):
        yield nbformat.v4.new_markdown_cell(text[at : exercise.end()].strip())
        label = LABEL.search(exercise[0])
        if label is None:
            raise ValueError(f"{exercise[0][:60]!r}: wanted a label")
        cell = nbformat.v4.new_code_cell(f"# {label[1]}: your answer")
        cell.metadata["tags"] = ["remove-cell"]  # a page has nothing to type into
        yield cell
        at = exercise.end()
    if text[at:].strip():
        yield nbformat.v4.new_markdown_cell(text[at:].strip())


def split(notebook: NotebookNode) -> tuple[list[NotebookNode], list[bool]]:
    """A chapter's code cells, and for each whether it belongs to a solution."""
    code, solves, solving = [], [], False
    for cell in notebook.cells:
        if cell.cell_type == "code":
            code.append(cell)
            solves.append(solving)
        else:
            _, solving = kept(cell.source, solving)
    return code, solves


def student(notebook: NotebookNode) -> NotebookNode:
    """A chapter without solutions. Cells that stay keep their outputs."""
    cells, solving = [], False
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if not solving:
                cells.append(nbformat.from_dict(cell))
            continue
        was_open = solving
        text, solving = kept(cell.source, solving)
        if text == cell.source and not was_open and not TASK.search(text):
            cells.append(nbformat.from_dict(cell))
        else:
            cells += with_answers(text)
    if solving:
        raise ValueError("a solution is never closed")
    if lost := depends(*split(notebook)):
        raise ValueError(f"cells that stay read what solutions set: {', '.join(lost)}")
    made = normalise(nbformat.v4.new_notebook(cells=cells))
    count = 0
    for cell in made.cells:  # as if it had run from the top
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    return made


def depends(code: Iterable[NotebookNode], solves: Iterable[bool]) -> list[str]:
    """Names that a cell outside of solutions reads and that a solution set last."""
    by_solution: dict[str, bool] = {}
    found = set()
    for cell, solution in zip(code, solves, strict=True):
        bound, read = names(cell.source)
        if not solution:
            found |= {name for name in read if by_solution.get(name)}
        by_solution |= dict.fromkeys(bound, solution)
    return sorted(found)


def names(source: str) -> tuple[set[str], set[str]]:
    """Names that a cell binds in the notebook, and names that it reads there."""
    plain = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)
    top = symtable.symtable(plain, "cell", "exec")
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned()}
    bound |= {s.get_name() for s in top.get_symbols() if s.is_imported()}
    bound |= {s.get_name() for s in top.get_symbols() if s.is_namespace()}
    read = {s.get_name() for s in top.get_symbols() if s.is_referenced()}
    inside = list(top.get_children())
    while inside:
        scope = inside.pop()
        inside += scope.get_children()
        outer = [s for s in scope.get_symbols() if s.is_global()]
        read |= {s.get_name() for s in outer if s.is_referenced()}
        bound |= {s.get_name() for s in outer if s.is_assigned()}
    return bound, read - set(dir(builtins))


def make_sources(book: Path, out: Path) -> list[Path]:
    """Copy the book and take out all solutions; return the notebooks written."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(book, out, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for path in chapters(out):
        try:
            made = student(nbformat.read(path, as_version=4))
        except ValueError as error:
            raise ValueError(f"{path.relative_to(out)}: {error}") from error
        write(made, path)
    for name, (before, after) in SAID.items():
        page = out / name
        text = page.read_text(encoding="utf-8")
        if before not in text:
            raise ValueError(f"{name}: wanted the sentence {before!r}")
        page.write_text(text.replace(before, after), encoding="utf-8")
    return chapters(out)


def settings(out: Path) -> Path:
    """The book's settings, less the buttons that open notebooks with solutions."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    config["title"] += " (student edition)"
    del config["launch_buttons"]
    extensions = config["sphinx"]["local_extensions"]
    config["sphinx"]["local_extensions"] = dict.fromkeys(
        extensions, str(ROOT / "book" / "extensions")
    )
    config["sphinx"]["config"]["student_edition"] = True
    path = out / "_config.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def make(out: Path = OUT, *, pages: bool = True) -> int:
    """Everything in `out`; returns the exit status of the build."""
    sources, notebooks = out / "book", out / "notebooks"
    made = make_sources(ROOT / "book", sources)
    print(f"{len(made)} chapters without solutions in {sources}")
    if not pages:
        kernel_notebooks.make(sources, notebooks)
    elif status := build.build(sources, out, settings(out), notebooks):
        return status
    else:
        shutil.rmtree(out / "html", ignore_errors=True)
        (out / "_build" / "html").rename(out / "html")
        shutil.rmtree(out / "_build")
        print(f"Moved to {out / 'html'}")
    kernel_notebooks.trust(chapters(notebooks))
    print(f"Notebooks for JupyterLab and Colab in {notebooks}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-pages", action="store_true", help="no HTML")
    sys.exit(make(pages=not parser.parse_args().no_pages))
