"""Show the source of a function in a chapter, without its docstring: the page can never disagree with the package."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

__all__ = ["Source", "source"]


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


def _without_docstrings(text: str) -> str:
    lines = text.rstrip().split("\n")
    for node in reversed(list(ast.walk(ast.parse(text)))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            doc = node.body[0]
            assert doc.end_lineno is not None
            del lines[doc.lineno - 1 : doc.end_lineno]
    return "\n".join(lines)
