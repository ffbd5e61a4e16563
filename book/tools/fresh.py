"""Run the chapters as Colab does: one notebook file alone, and only what it installs.

python book/tools/fresh.py                      all chapters
python book/tools/fresh.py A.ipynb              some
python book/tools/fresh.py --python python3.13  with another interpreter

A new virtual environment gets what a notebook service brings along. The first
chapter's first cell then installs the package, from a wheel of this checkout instead of
the public address. Each chapter runs in an empty folder outside the checkout.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat

from execute import ENVIRONMENT, report, run_all
from links import ROOT, chapters, install_target

FRESH = ROOT / "_build" / "fresh"
CONSTRAINTS = ROOT / "constraints.txt"
#: What is there before the first cell runs.
STOCK = ["torch", "numpy", "pandas", "scikit-learn", "matplotlib", "ipykernel"]


def make_environment(interpreter: str) -> tuple[Path, Path]:
    """Make the environment and the wheel; return its Python and the wheel."""
    subprocess.run([interpreter, "-m", "venv", "--clear", str(FRESH)], check=True)
    python = FRESH / "bin" / "python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    print("[1/3] installing", *STOCK, flush=True)
    subprocess.run([*pip, "install", "-c", str(CONSTRAINTS), *STOCK], check=True)
    print("[2/3] building the wheel", flush=True)
    target = FRESH / "wheel"
    subprocess.run([*pip, "wheel", "--no-deps", "-w", target, str(ROOT)], check=True)
    (wheel,) = target.glob("lowrank_ref-*.whl")
    kernel = FRESH / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "fresh", "language": "python"}
    kernel.write_text(json.dumps(spec))
    return python, wheel


def alone(path: Path, folder: Path, wheel: Path) -> Path:
    """Copy a chapter into its own folder; its first cell installs the wheel."""
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if install_target() not in first.source:
        raise ValueError(f"{path}: its first cell does not install the package")
    ours = f"lowrank-ref[book] @ {wheel.as_uri()}"
    first.source = first.source.replace(install_target(), ours)
    copy = folder / path.stem / path.name
    copy.parent.mkdir()
    nbformat.write(notebook, copy)
    return copy


def run(paths: list[Path], wheel: Path) -> int:
    """Run the chapters one after the other; return how many failed."""
    # Only the new environment's kernel is found, and nothing of the checkout.
    os.environ |= ENVIRONMENT | {
        "JUPYTER_PATH": str(FRESH / "share" / "jupyter"),
        "PIP_CONSTRAINT": str(CONSTRAINTS),
        "PYTHONNOUSERSITE": "1",
    }
    os.environ.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copies = [alone(path, folder, wheel) for path in paths]
        print("[3/3] running the chapters; the first one installs the rest")
        return report(asyncio.run(run_all(copies, folder, 1)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="default: this one")
    parser.add_argument("chapter", nargs="*", type=Path, help="default: all")
    options = parser.parse_args()
    start = time.perf_counter()
    python, wheel = make_environment(options.python)
    failed = run(options.chapter or chapters(), wheel)
    version = subprocess.check_output([python, "--version"], text=True).strip()
    print(f"{version}, {time.perf_counter() - start:.0f} s: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
