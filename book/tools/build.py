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


def build(
    source: Path,
    folder: Path = ROOT,
    config: Path = ROOT / "_config.yml",
    notebooks: Path = kernel_notebooks.OUT,
) -> int:
    """Run Jupyter Book with warnings as errors; return its exit status.

    The pages lie in `_build/html` of `folder`, the notebooks also in `notebooks`.
    """
    made = folder / "_build"
    for old in ("html", ".doctrees", "jupyter_execute", "page_report"):
        shutil.rmtree(made / old, ignore_errors=True)
    start = time.perf_counter()
    tool = Path(sys.executable).with_name("jupyter-book")
    command = [str(tool), "build", str(source)]
    command += ["--config", str(config), "--path-output", str(folder)]
    command += ["-n", "-W", "--keep-going", "--quiet"]
    print("Building the pages ...", flush=True)
    status = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    if status == 0:
        kernel_notebooks.make(source, notebooks)
        shutil.copytree(notebooks, made / "html" / "notebooks")
        print(f"Built in {time.perf_counter() - start:.0f} s. Open this file:")
        print(f"  {(made / 'html' / 'index.html').as_uri()}")
    return status


if __name__ == "__main__":
    sys.exit(build(ROOT / (sys.argv[1] if len(sys.argv) > 1 else "book")))
