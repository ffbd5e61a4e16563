"""Show the source of a function in a chapter, without its docstring: the page can never disagree with the package.

`source` shows it alone, `beside` next to the equation that it computes. On the book's pages the two stand in columns,
and terms of the equation light up together with the code that computes them (`book/theme/columns.js`); in Colab and in
JupyterLab the equation stands above the code.
"""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

__all__ = ["Beside", "Source", "beside", "source"]


class Source(str):
    """Python source that a notebook shows highlighted."""

    def _repr_markdown_(self) -> str:
        return f"```python\n{self}\n```"

    def __repr__(self) -> str:
        return str(self)


def source(*objects: Callable[..., Any]) -> Source:
    """Return the source of functions, methods or classes, one below the other, without docstrings.

    Args:
        objects: what to show, at least one.

    Raises:
        ValueError: nothing to show.
        TypeError: an object without Python source.

    Example:
        >>> source(source)[:12]
        'def source(*'
    """
    if not objects:
        raise ValueError("objects: got none, wanted at least one function")
    return Source("\n\n".join(_without_docstrings(textwrap.dedent(inspect.getsource(item))) for item in objects))


@dataclass(frozen=True, repr=False)
class Beside:
    """An equation and Python source that a notebook shows set and highlighted."""

    equation: str
    code: Source
    terms: str  # JSON for the page: number, TeX with classes around its terms, places of each in the code

    def _repr_markdown_(self) -> str:
        # Without a backslash no reader of Markdown takes TeX in the attribute for a formula. Blank lines end the HTML.
        terms = escape(self.terms).replace("\\", "&#92;")
        code = self.code._repr_markdown_()
        return f'<div class="lr-beside" data-terms="{terms}">\n\n$$\n{self.equation}\n$$\n\n{code}\n\n</div>'

    def __repr__(self) -> str:
        return f"{self.equation}\n\n{self.code}"


def beside(number: int | str, equation: str, *objects: Callable[..., Any], terms: Sequence[str] = ()) -> Beside:
    """Return a numbered equation beside the source of the functions that compute it.

    Args:
        number: shown as (number), either the chapter's own count or the paper's.
        equation: TeX without dollar signs. Guillemets mark terms, none inside another: `«s»\\,«BA»`.
        objects: functions, methods or classes, at least one.
        terms: for each marked term, in order, the code that computes it, as it stands in the source. Names match whole
            names only; every place in the source belongs to the term.

    Raises:
        ValueError: nothing to show, another number of terms than marks, or a term that the source does not contain.
        TypeError: an object without Python source.

    Example:
        >>> from lowrank_ref.adapters.lora import lora_scaling
        >>> beside(1, "s = «a / r»", lora_scaling, terms=["alpha / rank"]).equation[:9]
        's = a / r'
    """
    code = source(*objects)
    marks = re.findall("«([^«»]*)»", equation)
    if len(marks) != len(terms) or set("«»") & set(re.sub("«[^«»]*»", "", equation)):
        raise ValueError(f"terms: got {len(terms)} for {len(marks)} marked terms «...», wanted one each")
    places = [_places(term, code) for term in terms]
    count = iter(range(len(marks)))
    marked = re.sub("«([^«»]*)»", lambda mark: rf"\class{{lr-term lr-t{next(count)}}}{{{mark[1]}}}", equation)
    data = json.dumps({"number": f"({number})", "tex": marked, "code": places}, separators=(",", ":"))
    return Beside(re.sub("[«»]", "", equation) + rf" \tag{{{number}}}", code, data)


def _places(term: str, code: str) -> list[tuple[int, int]]:
    """First and last + 1 letter of each place of `term` in `code`; within longer names it does not count."""
    before, after = (r"(?<!\w)" if term[:1].isidentifier() else ""), (r"(?!\w)" if re.match(r"\w", term[-1:]) else "")
    places = [match.span() for match in re.finditer(before + re.escape(term) + after, code)]
    if not term or not places:
        raise ValueError(f"terms: got {term!r}, wanted code that stands in\n{code}")
    return places


def _without_docstrings(text: str) -> str:
    lines = text.rstrip().split("\n")
    for node in reversed(list(ast.walk(ast.parse(text)))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            doc = node.body[0]
            assert doc.end_lineno is not None
            del lines[doc.lineno - 1 : doc.end_lineno]
    return "\n".join(lines)
