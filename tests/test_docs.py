"""What a public function or class raises, its docstring says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Modules whose names may change in any version.
PRIVATE = {"fast", "products", "idle", "matching"}
FILES = [
    path
    for path in sorted((ROOT / "lowrank_ref").rglob("*.py"))
    if path.stem not in PRIVATE and path.parent.name != "kernels" and not path.stem.startswith("_")
]
KINDS = {"TypeError", "ValueError", "RuntimeError", "FloatingPointError"}


def raised(function):
    """Errors that the body of a function names after `raise`, and "Error" for a call of one of the checks of core."""
    todo, found = list(function.body), set()
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue  # raises when it is called
        if isinstance(node, ast.Raise) and node.exc is not None:
            found.add(getattr(getattr(node.exc, "func", node.exc), "id", ""))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("check_"):
            found.add("Error")
        todo += ast.iter_child_nodes(node)
    return found & (KINDS | {"Error"})


def silent(text):
    """(name, errors) of what is public, raises, and has a docstring without a word about it."""

    def visit(body, path, told):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, f"{path}{node.name}.", ast.get_docstring(node) or "")
            elif isinstance(node, ast.FunctionDef):
                built = node.name in ("__init__", "__post_init__")
                if node.name.startswith("_") and not built:
                    continue
                words = (ast.get_docstring(node) or "") + (told if built else "")
                missing = {error for error in raised(node) if error not in words}
                if missing and not (missing == {"Error"} and "raises" in words):
                    yield path + node.name, sorted(missing)

    return list(visit(ast.parse(text).body, "", ""))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "lowrank_ref")))
def test_a_docstring_says_what_is_raised(path):
    assert silent(path.read_text()) == []


def test_silence_is_seen():
    text = '''
class A:
    """Hold x. ValueError: x is 0."""
    def __init__(self, x):
        if not x:
            raise ValueError("x")
        check_rank(x)
    def b(self):
        """Return 1."""
        raise TypeError("b")
    def _c(self):
        raise TypeError("c")
def d(x):
    """Return a function; an Error is no kind."""
    def inner():
        raise ValueError("inner")
    check_number("x", x)
    return inner
def e(x):
    """Return x."""
    check_number("x", x)
def f():
    """Return 1."""
    if 2: raise ValueError
'''
    assert silent(text) == [("A.b", ["TypeError"]), ("e", ["Error"]), ("f", ["ValueError"])]
