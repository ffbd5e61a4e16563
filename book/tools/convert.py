"""Turn a chapter written as py:percent into a notebook.

python book/tools/convert.py chapter.py book/adapters/lora.ipynb

Then `python book/tools/execute.py --in-place book/adapters/lora.ipynb` fills in the outputs.
Tags, caption and alt text stand in a cell's first line:

    # %% tags=["plot", "hide-input"] mystnb={"figure": {"caption": "What to see."}, "image": {"alt": "..."}}
"""  # noqa: E501

import argparse
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat

from execute import normalise, write
from links import install_cell


def with_install_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Make the install cell the first code cell, right under the title."""
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip()]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if code and 'find_spec("lowrank_ref")' in code[0].source:
        cell = code[0]
    else:
        cell = nbformat.v4.new_code_cell()
        notebook.cells.insert(1, cell)
    cell.source = install_cell()
    cell.metadata = {"tags": ["remove-cell"]}
    return notebook


def convert(source: Path, target: Path) -> None:
    """Read py:percent, write a notebook without outputs, with cells formatted."""
    notebook = with_install_cell(jupytext.read(source, fmt="py:percent"))
    target.parent.mkdir(parents=True, exist_ok=True)
    write(normalise(notebook), target)
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "format", "--quiet", str(target)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    convert(options.source, options.target)
