"""The quiet line below a chapter's picture, and the graph of what to read before what."""

import chapter_header
import nbformat
import pytest
import reading_time
import yaml
from links import ROOT
from pybtex.database import parse_string
from reading import needs_pages, soup

from lowrank_ref.core.registry import PaperInfo, papers

BOOK = ROOT / "book"
PAPERS = papers()
each_paper = pytest.mark.parametrize("paper", PAPERS.values(), ids=lambda paper: paper.key)


def header(paper):
    """The page, and the items of the line; folds are items as well."""
    page = soup(f"{paper.part}/{paper.key}.html")
    (line,) = page.select("ul.badges")
    return page, line.find_all("li", recursive=False)


def told(paper):
    return [" ".join(item.get_text(" ").split()) for item in header(paper)[1]]


@needs_pages
@each_paper
def test_the_line_stands_right_below_the_first_picture(paper):
    page, _ = header(paper)
    (line,) = page.select("ul.badges")
    cell = page.select_one("figure.lr-figure").find_parent("div", class_="cell")
    assert cell.find_next_sibling() is line
    assert not page.select(".admonition.before")  # no box anywhere


@needs_pages
@each_paper
def test_the_line_tells_what_was_measured(paper):
    items = told(paper)
    notebook = nbformat.read(BOOK / paper.part / f"{paper.key}.ipynb", as_version=4)
    assert items[0] == f"Reads in {reading_time.said(notebook)}"
    assert f"state: {paper.status} {paper.verified}".strip() in items
    assert any(text.startswith("runs in ") and text.endswith("CPU") for text in items)
    gpus = chapter_header.gpus(BOOK, paper.key)
    assert [text for text in items if "GPU" in text] == ([f"GPU results: {', '.join(gpus)}"] if gpus else [])
    assert {"Open in Colab", "Notebook", "Reference", "Source", "Tests", f"arXiv:{paper.arxiv}"} <= set(items)


def test_a_processor_is_no_gpu(tmp_path):
    (tmp_path / "results").mkdir()
    stored = """{"a": {"provenance": {"hardware": "x86_64 CPU"}}, "b": {"provenance": {"hardware": "NVIDIA X"}}}"""
    (tmp_path / "results" / "key_scale.json").write_text(stored)
    assert chapter_header.stored_hardware(tmp_path, "key") == ["NVIDIA X", "x86_64 CPU"]
    assert chapter_header.gpus(tmp_path, "key") == ["NVIDIA X"]
    assert chapter_header.gpus(tmp_path, "other") == []
    assert chapter_header.timing(tmp_path, "part/key") == {}


@needs_pages
@each_paper
def test_the_line_links_what_to_read_before(paper):
    page, _ = header(paper)
    (item,) = page.select("ul.badges > li.needs")
    targets = [link["href"] for link in item.select("a")]
    assert [target.split("/")[-1] for target in targets] == [f"{need}.html" for need in paper.needs]
    text = " ".join(item.get_text().split())
    assert text.startswith("Read before: ") if paper.needs else text == "stands alone"


def card(**changes) -> PaperInfo:
    start = {"key": "lora", "part": "adapters", "name": "N", "title": "T", "authors": ("A",), "arxiv": "2401.00001v1"}
    return PaperInfo(**start, summary="S.", use_when="you test", **changes)


def test_changes_come_newest_first():
    text = chapter_header.what_changed(card(changes={"2026-11-23": "Old <news>.", "2026-12-01": "New."}))
    assert text.index("2026-12-01") < text.index("New.") < text.index("2026-11-23") < text.index("Old &lt;news&gt;.")
    assert chapter_header.what_changed(card()) == ""


@needs_pages
@each_paper
def test_paper_and_book_can_be_cited(paper):
    page, _ = header(paper)
    blocks = [block.get_text() for block in page.select("ul.badges details.fold pre")]
    entries = parse_string("\n".join(blocks), "bibtex").entries
    assert list(entries) == [paper.key, "lowrank_ref"]
    stated = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert entries["lowrank_ref"].fields["title"] == stated["title"]
    assert entries["lowrank_ref"].fields["url"] == stated["repository-code"]


@needs_pages
def test_the_graph_shows_every_chapter_and_every_need():
    (graph,) = soup("intro.html").select("svg.lr-reading")
    said = {link["href"].split("/")[-1].removesuffix(".html"): link["aria-label"] for link in graph.select("a")}
    assert set(PAPERS) <= set(said)
    for key, paper in PAPERS.items():
        for need in paper.needs:
            assert (PAPERS[need].name if need in PAPERS else need) in said[key].partition(", after ")[2]
    assert len(graph.select("path")) == sum(len(paper.needs) for paper in PAPERS.values())
    assert "currentColor" in str(graph) and graph["aria-label"]
