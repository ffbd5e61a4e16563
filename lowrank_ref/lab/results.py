"""Results that were measured elsewhere, on a GPU or for minutes on a CPU, and stored as JSON in `book/results/`."""

import json
import textwrap
import urllib.request
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

__all__ = ["provenance", "stored"]


def stored(name: str) -> dict[str, Any]:
    """Return the results file `book/results/<name>.json`.

    Looked for in the `results` folder beside the chapter's folder; where the notebook stands alone, as in Colab, it is
    fetched from the repository.

    Args:
        name: file name without suffix, such as "lora_scale".

    Raises:
        FileNotFoundError: no such file here, and none can be fetched.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        for path in (folder / "results" / f"{name}.json", folder / "book" / "results" / f"{name}.json"):
            if path.exists():
                return json.loads(path.read_text())
    url = _repository() + f"/raw/main/book/results/{name}.json"
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.loads(answer.read())
    except OSError as error:
        raise FileNotFoundError(f"name: got {name!r}, wanted a file in book/results/, here or at {url}") from error


def _repository() -> str:
    links = dict(line.split(", ", 1) for line in metadata("lowrank-ref").get_all("Project-URL") or [])
    return links.get("Repository", "")


def provenance(part: dict[str, Any]) -> str:
    """Say what was measured in a part of a results file, when, on what, and with which command; 79 columns wide."""
    p = part["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in p["versions"].items())
    measured = f"Measured {p['date']} on {p['hardware']} with Python {p['python']}, {versions}."
    return "\n".join(textwrap.fill(line, 79) for line in (part["setting"], measured, p["command"]))
