"""Write a reference page for each public module, from its docstrings."""

import pkgutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

import lowrank_ref

PAGE = """# {title}

```{{eval-rst}}
.. automodule:: {module}
   :members:
   :show-inheritance:
```
"""


def public_modules() -> list[str]:
    """Every module of the package whose name does not begin with an underscore."""
    found = pkgutil.walk_packages(lowrank_ref.__path__, "lowrank_ref.")
    names = [item.name for item in found if not item.ispkg]
    return [name for name in names if "._" not in name]


def write_pages(app: Sphinx, config: Config) -> None:
    if find_spec("triton") is None:  # as on macOS
        app.config.autodoc_mock_imports = ["triton"]
    folder = Path(app.srcdir) / "api"
    for old in folder.glob("lowrank_ref.*.md"):
        old.unlink()
    for module in public_modules():
        title = module.removeprefix("lowrank_ref.")
        (folder / f"{module}.md").write_text(PAGE.format(title=title, module=module))


def docstring(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = tables_as_rst(lines)


def tables_as_rst(lines: list[str]) -> list[str]:
    """Turn Markdown's tables, easy to read in a file, into reStructuredText."""
    out: list[str] = []
    inside = False
    for line in lines:
        if line.startswith("|") and not inside:
            out += ["", ".. list-table::", "   :header-rows: 1", ""]
        inside = line.startswith("|")
        if not inside:
            out.append(line)
        elif not set(line) <= set("|-: "):  # the rule under the head says nothing
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            out.append(f"   * - {cells[0]}")
            out += [f"     - {cell}" for cell in cells[1:]]
    return out


def skip(
    app: Sphinx, what: str, name: str, thing: Any, skipped: bool, options: Any
) -> bool | None:
    """Leave out what scikit-learn adds to its estimators."""
    return True if name.startswith("set_") and name.endswith("_request") else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", write_pages)  # sphinx_external_toc follows at 900
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
