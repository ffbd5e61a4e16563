"""Write reference pages from docstrings: one for each package, one for each module."""

import functools
import importlib
import inspect
import pkgutil
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

import lowrank_ref
from docstrings import blocks_kept, linked, summary, tables_as_rst
from lowrank_ref.core.registry import papers

MODULE = """# {title}

{chapter}```python
{imports}
```

```{{eval-rst}}
.. automodule:: {module}
   :members:
   :inherited-members: str, object
   :show-inheritance:
```
"""
PACKAGE = """# {title}

```{{eval-rst}}
.. automodule:: {module}
```

{exported}## Modules

```{{eval-rst}}
{modules}
```
"""
EXPORTED = """```python
{imports}
```

## Names

```{{eval-rst}}
{names}
```

"""


def public_packages() -> list[str]:
    """Every package below this one."""
    found = pkgutil.walk_packages(lowrank_ref.__path__, "lowrank_ref.")
    return [item.name for item in found if item.ispkg and "._" not in item.name]


def public_modules() -> list[str]:
    """Every module of the package whose name does not begin with an underscore."""
    found = pkgutil.walk_packages(lowrank_ref.__path__, "lowrank_ref.")
    names = [item.name for item in found if not item.ispkg]
    return [name for name in names if "._" not in name]


def loaded(name: str) -> Any:
    """A module, or None where what it needs is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def is_thing(value: Any) -> bool:
    return inspect.isclass(value) or inspect.isfunction(value)


def own(module: Any) -> dict[str, Any]:
    """The functions and classes that a module's page documents."""
    if module is None:
        return {}
    names = getattr(module, "__all__", None)
    if names is None:
        here = {n: getattr(t, "__module__", "") for n, t in vars(module).items()}
        names = [n for n, home in here.items() if home == module.__name__]
    things = {name: getattr(module, name, None) for name in names if name[0] != "_"}
    return {name: t for name, t in things.items() if is_thing(t) and t.__doc__}


@functools.cache
def documented() -> dict[str, str]:
    """Full name and, where nothing else has it, last part -> full name."""
    full = [*public_packages(), *public_modules()]
    for name in public_modules():
        for key, thing in own(loaded(name)).items():
            if thing.__module__ == name:
                full.append(f"{name}.{key}")
                full += [f"{name}.{key}.{m}" for m in methods(thing)]
    short: dict[str, list[str]] = {}
    for name in full:
        parts = name.removeprefix("lowrank_ref.").split(".")
        for tail in {".".join(parts[i:]) for i in range(len(parts))}:
            short.setdefault(tail, []).append(name)
    # A plain word, such as `rank`, is more often an argument than an object.
    speaks = {tail for tail in short if tail.lower() != tail or {"_", "."} & set(tail)}
    named = {tail: found[0] for tail, found in short.items() if len(found) == 1}
    return {name: name for name in full} | {t: named[t] for t in named.keys() & speaks}


def methods(thing: Any) -> list[str]:
    inside = vars(thing).items() if inspect.isclass(thing) else ()
    return [name for name, t in inside if name[0] != "_" and inspect.isfunction(t)]


def imports(home: str, names: list[str]) -> str:
    """The line that imports these names, folded where it is long."""
    line = f"from {home} import {', '.join(names)}"
    if len(line) <= 79:
        return line
    listed = textwrap.fill(", ".join(names), 75)
    return f"from {home} import (\n{textwrap.indent(listed, '    ')},\n)"


def rst_table(rows: list[tuple[str, str]], head: str) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for name, about in [(head, "what it is"), *rows]:
        lines += [f"   * - {name}", f"     - {about}"]
    return "\n".join(lines)


def told(thing: Any, module: str) -> str:
    """The first sentence about a thing, with links."""
    text = summary(thing.__doc__) if thing is not None else ""
    return linked([text], documented(), module)[0]


def module_page(name: str, exported: dict[str, str]) -> str:
    """One module: its chapter, how to import from it, and everything in it."""
    title, package = name.removeprefix("lowrank_ref."), name.rpartition(".")[0]
    paper, chapter = papers().get(title.split(".")[-1]), ""
    if paper is not None and title == f"{paper.part}.{paper.key}":
        chapter = f"Chapter: {{doc}}`{paper.name} </{paper.part}/{paper.key}>`\n\n"
    things = list(own(loaded(name)))
    short = [key for key in things if exported.get(key) == package]
    homes = {package: short, name: [key for key in things if key not in short]}
    lines = [imports(home, keys) for home, keys in homes.items() if keys]
    text = "\n".join(lines) or f"import {name}"
    return MODULE.format(title=title, module=name, chapter=chapter, imports=text)


def package_page(name: str) -> str:
    """One package: what it exports, and its modules, a line each."""
    package, rows, exported = loaded(name), [], ""
    for key in getattr(package, "__all__", []):
        thing = getattr(package, key)
        full = f"{getattr(thing, '__module__', '')}.{key}"
        shown = f":py:obj:`{key} <{full}>`" if full in documented() else f"``{key}``"
        rows.append((shown, told(thing if is_thing(thing) else None, name)))
    if rows:
        table = rst_table(rows, "name")
        exported = EXPORTED.format(imports=imports(name, package.__all__), names=table)
    below = [*public_packages(), *public_modules()]
    lines = [
        (f":doc:`{module.rpartition('.')[2]} <{module}>`", told(loaded(module), module))
        for module in below
        if module.rpartition(".")[0] == name
    ]
    title, modules = name.removeprefix("lowrank_ref."), rst_table(lines, "module")
    return PACKAGE.format(title=title, module=name, exported=exported, modules=modules)


def write_pages(app: Sphinx, config: Config) -> None:
    if find_spec("triton") is None:  # as on macOS
        app.config.autodoc_mock_imports = ["triton"]
    folder = Path(app.srcdir) / "api"
    for old in folder.glob("lowrank_ref.*.md"):
        old.unlink()
    for package in public_packages():
        (folder / f"{package}.md").write_text(package_page(package))
    for module in public_modules():
        package = loaded(module.rpartition(".")[0])
        names = dict.fromkeys(getattr(package, "__all__", ()), package.__name__)
        (folder / f"{module}.md").write_text(module_page(module, names))
        for thing in own(loaded(module)).values():
            if inspect.isclass(thing):
                show_options(thing)


class _Named:
    """A default that is a function, shown by its name."""

    def __init__(self, function: Any) -> None:
        self.name = function.__name__

    def __repr__(self) -> str:
        return self.name


def show_options(thing: type) -> None:
    """Let a class whose `**options` go to its base show the base's arguments."""
    signature = whole_signature(thing)
    if signature is not None:
        thing.__signature__ = signature  # type: ignore[attr-defined]


def whole_signature(thing: type) -> inspect.Signature | None:
    """A class's arguments with those of its bases for `**options`; None without."""
    found: dict[str, inspect.Parameter] = {}
    for base in thing.__mro__:
        if "__init__" not in vars(base):
            continue
        first, mine = not found, inspect.signature(vars(base)["__init__"]).parameters
        for p in list(mine.values())[1:]:
            wanted = first or (p.kind is p.KEYWORD_ONLY and p.name != "own")
            if wanted and p.name != "options" and p.name not in found:
                is_function = inspect.isfunction(p.default)
                found[p.name] = (
                    p.replace(default=_Named(p.default)) if is_function else p
                )
        if "options" not in mine:
            return None if first else inspect.Signature(list(found.values()))
    return None


def blocks(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Before sections such as `Args:` are read."""
    lines[:] = blocks_kept(lines)


def docstring(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    own_module = getattr(thing, "__module__", None) or name
    others = {key: full for key, full in documented().items() if full != name}
    lines[:] = linked(tables_as_rst(lines), others, own_module)


def skip(
    app: Sphinx, what: str, name: str, thing: Any, skipped: bool, options: Any
) -> bool | None:
    """Leave out what a class has from PyTorch, scikit-learn or transformers.

    What scikit-learn's estimators know after a fit is listed in their docstring.
    """
    if what != "class":
        return None
    home = getattr(getattr(thing, "fget", thing), "__module__", None) or "lowrank_ref"
    foreign = not home.startswith("lowrank_ref")
    return True if foreign or (name.endswith("_") and name[0] != "_") else None


def own_nodes(app: Sphinx, doctree: nodes.document) -> None:
    """Give all nodes of a page to its document.

    What `eval-rst` parsed belongs to a document of its own, which knows the whole
    environment: it was stored with every page, 900 MB in all in the place of 30.
    """
    for node in doctree.findall():
        node.document = doctree


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", write_pages)  # sphinx_external_toc follows at 900
    app.connect("autodoc-process-docstring", blocks, 400)  # napoleon follows at 500
    app.connect("autodoc-process-docstring", docstring, 600)
    app.connect("autodoc-skip-member", skip)
    app.connect("doctree-read", own_nodes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
