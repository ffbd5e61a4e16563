"""Run the chapters as Colab does: one notebook file alone, and only what it installs.

python book/tools/fresh.py                      all chapters
python book/tools/fresh.py A.ipynb              some
python book/tools/fresh.py --python python3.13  with another interpreter

First pip is asked what the install cell would do where the packages of STOCK
are: none of them may be replaced, under any version of Python in PYTHONS.

A new virtual environment gets what a notebook service brings along. The install cell,
with which every chapter begins, runs in it once, with a wheel of this checkout instead
of the public address. Then each chapter runs in an empty folder outside the checkout,
and its outputs are compared with the stored ones.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat

import kernel_notebooks
from check import COMPARE, command
from execute import ENVIRONMENT, longest_first
from links import ROOT, chapters, install_cell, install_target

FRESH = ROOT / "_build" / "fresh"
CONSTRAINTS = ROOT / "constraints.txt"
#: What is there before the first cell runs, with versions that notebook services
#: had; careless needs would replace some of them.
STOCK = {
    "torch": "2.6.0",
    "numpy": "2.0.2",
    "scipy": "1.14.1",
    "pandas": "2.2.2",
    "scikit-learn": "1.6.1",
    "matplotlib": "3.10.0",
    "ipython": "7.34.0",
    "ipykernel": "6.17.1",
}
PYTHONS = ("3.11", "3.12", "3.13")
#: Its kernel; a name of its own, so that no other kernel can answer.
KERNEL = "fresh"


def environment() -> dict[str, str]:
    """Variables with which nothing of the checkout and no other kernel is found."""
    variables = os.environ | ENVIRONMENT
    variables.pop("PYTHONPATH", None)
    return variables | {
        "JUPYTER_PATH": str(FRESH / "share" / "jupyter"),
        "PIP_CONSTRAINT": str(CONSTRAINTS),
        "PIP_NO_COMPILE": "1",  # Python compiles what it imports; all takes a minute
        "PYTHONNOUSERSITE": "1",
    }


def make_environment(interpreter: str) -> Path:
    """Make the environment and its kernel; return its Python."""
    subprocess.run([interpreter, "-m", "venv", "--clear", str(FRESH)], check=True)
    python = FRESH / "bin" / "python"
    print("[1/3] installing", *STOCK, flush=True)
    pip(python, "install", *STOCK)
    kernel = FRESH / "share" / "jupyter" / "kernels" / KERNEL / "kernel.json"
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": KERNEL, "language": "python"}
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps(spec))
    return python


def pip(python: Path, *arguments: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check"]
    argv = [str(python), "-m", "pip", *quiet, *arguments]
    subprocess.run(argv, env=environment(), check=True)


def install(python: Path) -> None:
    """Run the install cell with a wheel of this checkout."""
    print("[2/3] running the install cell", flush=True)
    folder = FRESH / "wheel"
    pip(python, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("lowrank_ref-*.whl")
    ours = f"lowrank-ref[chapters] @ {wheel.as_uri()}"
    pip(python, "install", "--upgrade", "pip")  # old ones ask for no other Python
    for version in PYTHONS:
        new = would_install(python, ours, version)
        replaced = sorted(set(new) & set(STOCK))
        text = (
            f"Python {version}: {len(new)} packages are new, {len(replaced)} replaced"
        )
        print(text, *replaced, flush=True)
        if replaced:
            raise SystemExit("the install cell replaces what a notebook service has")
    cell = install_cell().replace(install_target(), ours)
    for step in (["-m", "IPython", "-c", cell], ["-c", "import lowrank_ref"]):
        argv = [str(python), *step]
        subprocess.run(argv, cwd=folder, env=environment(), check=True)


def would_install(python: Path, target: str, version: str) -> list[str]:
    """Ask pip what it would install where STOCK are, names only."""
    with tempfile.TemporaryDirectory() as name:
        stock = Path(name) / "stock"
        argv = [str(python), "-m", "venv", "--without-pip", str(stock)]
        subprocess.run(argv, check=True)
        (site,) = stock.glob("lib/python*/site-packages")
        for package, held in STOCK.items():
            folder = site / f"{package.replace('-', '_')}-{held}.dist-info"
            folder.mkdir()
            head = f"Metadata-Version: 2.1\nName: {package}\nVersion: {held}\n"
            (folder / "METADATA").write_text(head)
            (folder / "INSTALLER").write_text("pip\n")
            (folder / "RECORD").touch()
        report = stock / "report.json"
        options = ["--python", str(stock / "bin" / "python"), "--quiet", "install"]
        options += ["--dry-run", "--report", str(report), "--only-binary=:all:"]
        argv = [str(python), "-m", "pip", *options, "--python-version", version, target]
        variables = environment()
        variables.pop("PIP_CONSTRAINT")  # readers have none
        subprocess.run(argv, env=variables, check=True)
        new = json.loads(report.read_text())["install"]
        return [entry["metadata"]["name"].lower().replace("_", "-") for entry in new]


def alone(path: Path, folder: Path) -> Path:
    """Put a chapter, as readers in Colab get it, into a folder of its own."""
    notebook = kernel_notebooks.converted(path, stills=False)  # no kernel makes these
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if first.source != install_cell():
        raise ValueError(f"{path}: its first cell does not install the package")
    copy = (
        folder / f"{path.stem} alone" / path.name
    )  # people have spaces in their paths
    copy.parent.mkdir()
    nbformat.write(notebook, copy)
    return copy


def run(paths: list[Path]) -> int:
    """Run the chapters, two at a time; return pytest's exit status."""
    print("[3/3] running the chapters", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copies = [alone(path, folder) for path in longest_first(paths)]
        options = f"--nbval-kernel-name {KERNEL} --rootdir {folder}"
        options += f" -c {ROOT}/pyproject.toml -p no:cacheprovider"
        step = command(f"{COMPARE} {options}", copies)
        return subprocess.run(step, cwd=folder, env=environment()).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="default: this one")
    parser.add_argument("chapter", nargs="*", type=Path, help="default: all")
    options = parser.parse_args()
    start = time.perf_counter()
    python = make_environment(options.python)
    install(python)
    print(f"installed in {time.perf_counter() - start:.0f} s")
    status = run(options.chapter or chapters())
    version = subprocess.check_output([python, "--version"], text=True).strip()
    outcome = "FAILED" if status else "ok"
    print(f"{version}, {time.perf_counter() - start:.0f} s: {outcome}")
    return status


if __name__ == "__main__":
    sys.exit(main())
