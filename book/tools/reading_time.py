"""How long a chapter takes to read.

python book/tools/reading_time.py                          all chapters
python book/tools/reading_time.py book/adapters/lora.ipynb

150 words or 12 lines of code a minute. What a page folds (code, outputs, solutions,
boxes that open) counts apart; what it leaves out does not count. Outputs are read too:
printed lines, tables, printed source, captions.
"""

import argparse
import re
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbformat import NotebookNode

from links import ROOT, chapters

WORDS, LINES = 150, 12  # a minute
#: Tag of a cell -> what the page folds, or leaves out, of it.
FOLDED = {"hide-input": {"in"}, "hide-output": {"out"}, "hide-cell": {"in", "out"}}
GONE = {"remove-input": {"in"}, "remove-output": {"out"}, "remove-cell": {"in", "out"}}
#: A directive with its body; a longer fence holds shorter ones.
BLOCK = re.compile(r"^(:{3,}|`{3,})\{([\w-]+)\}(.*?)^\1\s*$", re.DOTALL | re.MULTILINE)


def minutes(notebook: NotebookNode) -> tuple[int, int]:
    """Minutes of the path that a page shows unfolded, and with everything open."""
    spent = {"open": 0.0, "folded": 0.0}
    solution = False  # a solution may hold cells
    for cell in notebook.cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type != "code":
            for state, text in pieces(cell.source, solution):
                spent[state] += words(text) / WORDS
            gates = re.findall(r"\{solution-(start|end)\}", cell.source)
            solution = gates[-1] == "start" if gates else solution
            continue
        for side, time in (("in", reading(cell.source)), ("out", shown(cell))):
            if any(side in GONE.get(tag, ()) for tag in tags):
                continue
            fold = solution or any(side in FOLDED.get(tag, ()) for tag in tags)
            spent["folded" if fold else "open"] += time
    return round(spent["open"]), round(spent["open"] + spent["folded"])


def pieces(text: str, solution: bool = False) -> list[tuple[str, str]]:
    """Markdown in pieces, each "open" or "folded"."""
    out, at = [], 0
    marks = [
        (match.start(), match.end(), "folded")
        for match in BLOCK.finditer(text)
        if match[2] in ("solution", "dropdown") or "dropdown" in match[3][:200]
    ]
    marks += [
        (match.start(), match.end(), match[1])
        for match in re.finditer(r"^:+\{solution-(start|end)\}.*$", text, re.MULTILINE)
    ]
    for start, end, kind in sorted(marks):
        if start < at:
            continue  # inside the one before
        out.append(("folded" if solution else "open", text[at:start]))
        if kind == "folded":
            out.append(("folded", text[start:end]))
        else:
            solution = kind == "start"
        at = end
    return [*out, ("folded" if solution else "open", text[at:])]


def words(text: str) -> int:
    """Words of Markdown, TeX or HTML text; a number is one, as is a letter of TeX."""
    text = re.sub(r"^(:{3,}|`{3,}).*$|^:[\w-]+:.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)|<[^>]*>|https?://\S+", " ", text)
    return len(re.findall(r"[^\W_]+(?:[-'’.,·/][^\W_]+)*", text))


def reading(source: str) -> float:
    """Minutes that code takes; empty lines take none."""
    return sum(bool(line.strip()) for line in source.split("\n")) / LINES


def shown(cell: NotebookNode) -> float:
    """Minutes of a cell's outputs, with the caption of a figure."""
    time = sum(map(output_time, cell.get("outputs", [])))
    figure = cell.metadata.get("mystnb", {}).get("figure") or {}
    return time + words(figure.get("caption", "")) / WORDS


def output_time(output: NotebookNode) -> float:
    data = output.get("data", {})
    if "text/html" in data:
        return words(html_text(data["text/html"])) / WORDS
    if "text/markdown" in data:  # an equation beside its code
        text = data["text/markdown"]
        code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        rest = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
        return sum(map(reading, code)) + words(rest) / WORDS
    if any(kind.startswith("image/") for kind in data):
        return 0.0
    return words(output.get("text", "") or data.get("text/plain", "")) / WORDS


def html_text(html: str) -> str:
    """What is read of an output: of an explorer its title and its caption."""
    page = BeautifulSoup(html, "html.parser")
    told = page.select(".lr-title, .lr-caption")
    for silent in page(["script", "style", "svg"]):
        silent.extract()
    return " ".join(part.get_text(" ") for part in told or [page])


def said(notebook: NotebookNode) -> str:
    """Such as "25 min, 43 with everything open"."""
    unfolded, everything = minutes(notebook)
    more = f", {everything} with everything open" if everything > unfolded else ""
    return f"{unfolded} min{more}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapter", nargs="*", type=Path, help="default: all")
    for path in parser.parse_args().chapter or chapters():
        path = path.resolve()
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        print(f"{said(nbformat.read(path, as_version=4)):<36} {name}")


if __name__ == "__main__":
    main()
