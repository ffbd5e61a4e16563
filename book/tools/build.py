"""Build the HTML pages from a folder with executed chapters.

python book/tools/build.py              from book/, with the committed outputs
python book/tools/build.py _build/book  from the copy that execute.py made

Always from scratch: a page left over from an earlier build would hide its warnings.
The notebooks for JupyterLab and Colab are made beside the pages, in _build/notebooks.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import kernel_notebooks
from links import ROOT

BUILD = ROOT / "_build"


def build(source: Path) -> int:
    """Run Jupyter Book with warnings as errors; return its exit status."""
    for old in ("html", ".doctrees", "jupyter_execute", "page_report"):
        shutil.rmtree(BUILD / old, ignore_errors=True)
    start = time.perf_counter()
    tool = Path(sys.executable).with_name("jupyter-book")
    command = [str(tool), "build", str(source)]
    command += ["--config", "_config.yml", "--path-output", "."]
    command += ["-n", "-W", "--keep-going", "--quiet"]
    print("Building the pages ...", flush=True)
    status = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    if status == 0:
        kernel_notebooks.make(source, kernel_notebooks.OUT)
        shutil.copytree(kernel_notebooks.OUT, BUILD / "html" / "notebooks")
        print(f"Built in {time.perf_counter() - start:.0f} s. Open this file:")
        print(f"  {(BUILD / 'html' / 'index.html').as_uri()}")
    return status


if __name__ == "__main__":
    sys.exit(build(ROOT / (sys.argv[1] if len(sys.argv) > 1 else "book")))
