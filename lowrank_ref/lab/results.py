"""Results that were measured elsewhere, on a GPU or for minutes on a CPU, and stored as JSON in `book/results/`."""

import json
import textwrap
from pathlib import Path
from typing import Any

__all__ = ["provenance", "stored"]

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
