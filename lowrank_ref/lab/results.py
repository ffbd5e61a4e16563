"""Results that were measured elsewhere, on a GPU or for minutes on a CPU, and stored as JSON in `book/results/`.

Each part of a file tells in its "provenance" when, on what and with which commit it was measured, and the digests of
the files of code that it depends on. `older_than_code` compares them with the files as they are now.
"""

import ast
import hashlib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_ref.lab.draw.table import Table

__all__ = ["code_digest", "layer_table", "older_than_code", "provenance", "stored"]

# The repository's folder, or its copy inside an installed package, which is all that a notebook in Colab has.
_ROOT = Path(__file__).parents[2]
_FOLDERS = (_ROOT / "book" / "results", Path(__file__).with_name("_results"))


def stored(name: str) -> dict[str, Any]:
    """Return the results file `book/results/<name>.json`.

    Args:
        name: file name without suffix, such as "lora_scale".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a name that leaves the folder, or a file that is not a whole JSON object.
    """
    if Path(name).name != name:
        raise ValueError(f"name: got {name!r}, wanted the name of a file in book/results, without folders")
    for folder in _FOLDERS:
        path = folder / f"{name}.json"
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:  # no JSON, or no text
                raise ValueError(f"name: got {name!r}, but {path} is no whole JSON file: {error}") from error
            if not isinstance(found, dict):
                raise ValueError(f"name: got {name!r}, but {path} holds a {type(found).__name__}, wanted an object")
            return found
    raise FileNotFoundError(f"name: got {name!r}, wanted a file in {' or '.join(map(str, _FOLDERS))}")


def provenance(part: dict[str, Any]) -> str:
    """Say what was measured in a part of a results file, when, on what, and with which command; 79 columns wide.

    A part that grew over several days names them all.
    """
    lines = [part["setting"]]
    for p in part.get("runs", [part["provenance"]]):
        versions = ", ".join(f"{name} {version}" for name, version in p["versions"].items())
        commit = f", commit {p['commit']}" if "commit" in p else ""
        lines.append(f"Measured {p['date']} on {p['hardware']} with Python {p['python']}, {versions}{commit}.")
    lines.append(part["provenance"]["command"])
    return "\n".join(textwrap.fill(line, 79) for line in dict.fromkeys(lines))


def code_digest(path: Path) -> str:
    """Return 12 hexadecimal digits of what a Python file does, the same under every version of Python.

    Layout, comments, docstrings and a paper's card do not count.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not _is_card(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return hashlib.sha256(_dumped(tree).encode()).hexdigest()[:12]


def _is_card(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["PAPER"]


def _dumped(node: Any) -> str:
    """A tree as text, without empty fields and parts of f-strings: versions of Python differ in these."""
    if isinstance(node, ast.JoinedStr):
        parts = [part for part in node.values if getattr(part, "value", None) != ""]
        return f"JoinedStr({_dumped(parts)})"
    if isinstance(node, list):
        return f"[{','.join(map(_dumped, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({','.join(f'{name}={_dumped(value)}' for name, value in fields)})"


def older_than_code(results: Mapping[str, Any], root: Path = _ROOT) -> dict[str, list[str]]:
    """Return part -> files of code that changed since its rows were measured; parts that are up to date are left out.

    Args:
        results: a results file, from `stored`.
        root: folder of the repository. A file that is not there counts as changed.
    """
    found = {}
    for name, part in results.items():
        files = set()
        for run in part.get("runs", [part["provenance"]]):
            for file, digest in run.get("files", {}).items():
                path = root / file
                if not path.exists() or code_digest(path) != digest:
                    files.add(file)
        if files:
            found[name] = sorted(files)
    return found


def layer_table(part: dict[str, Any], *names: str) -> Table:
    """Show time and memory of adapted layers beside their peers', from a part of the results file "layers".

    Args:
        part: its "rows" have a method, median_ms, extra_mib and, if there is one, the name of a peer among them.
        names: methods to show; none for all but PEFT's, which have columns of their own.

    Raises:
        ValueError: a name that is no method.
    """
    rows = {row["method"]: row for row in part["rows"]}
    for name in names:
        if name not in rows:
            raise ValueError(f"names: got {name!r}, wanted some of {', '.join(rows)}")
    frozen = rows["frozen nn.Linear"]["median_ms"]
    body = []
    for name in names or [name for name in rows if not name.startswith("PEFT")]:
        row, peer = rows[name], rows.get(rows[name].get("peer"))
        ms, mib = row["median_ms"], row["extra_mib"]
        theirs = (f"{peer['median_ms']:.2f}", f"{ms / peer['median_ms']:.2f}") if peer else ("-", "-")
        memory = f"{peer['extra_mib']:.0f}" if peer else "-"
        body.append([name, f"{ms:.2f}", *theirs, f"{frozen / ms:.2f}", f"{mib:.0f}", memory])
    return Table(["layer", "ms", "peer, ms", "ratio", "share", "MiB", "peer, MiB"], body)
