"""Results that were measured elsewhere, on a GPU or for minutes on a CPU, and stored as JSON in `book/results/`."""

import json
import textwrap
from pathlib import Path
from typing import Any

from lowrank_ref.lab.draw.table import Table

__all__ = ["layer_table", "provenance", "stored"]

# The repository's folder, or its copy inside an installed package, which is all that a notebook in Colab has.
_FOLDERS = (Path(__file__).parents[2] / "book" / "results", Path(__file__).with_name("_results"))


def stored(name: str) -> dict[str, Any]:
    """Return the results file `book/results/<name>.json`.

    Args:
        name: file name without suffix, such as "lora_scale".

    Raises:
        FileNotFoundError: no such file.
    """
    for folder in _FOLDERS:
        path = folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
    raise FileNotFoundError(f"name: got {name!r}, wanted a file in {' or '.join(map(str, _FOLDERS))}")


def provenance(part: dict[str, Any]) -> str:
    """Say what was measured in a part of a results file, when, on what, and with which command; 79 columns wide."""
    p = part["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in p["versions"].items())
    measured = f"Measured {p['date']} on {p['hardware']} with Python {p['python']}, {versions}."
    return "\n".join(textwrap.fill(line, 79) for line in (part["setting"], measured, p["command"]))


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
