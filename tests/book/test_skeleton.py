"""The skeleton of a chapter: the picture first, numbered captions, folded plumbing, a reading time that is computed.

Each exception is named and must still be one: when its chapter passes, its test fails until the name is taken out.
"""

import ast
import re

import figures
import links
import nbformat
import pytest
import reading_time
from docutils import nodes
from links import ROOT
from reading import OLD_ORDER, needs_pages, soup

from lowrank_ref.core.registry import papers

BOOK = ROOT / "book"
NAMES = [path.relative_to(BOOK).with_suffix("").as_posix() for path in links.chapters()]
PAPERS = {f"{paper.part}/{paper.key}": paper for paper in papers().values()}

LONGEST_ANSWER = 60  # words below the title
LONGEST_CAPTION = 65
LONGEST_READ = 25  # minutes
#: Chapters that take longer than they may.
TOO_LONG = [
    "adapters/randlora",
    "analysis/artificial_entanglement",
    "optimizers/galore",
    "pretraining/sltrain",
    "ranks/sora",
    "robustness/ramp",
]


def each_but(exceptions, names=NAMES):
    """One test a chapter; those named fail, as long as they are named."""
    fails = pytest.mark.xfail(strict=True, raises=AssertionError, reason="a named exception")
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=fails if name in exceptions else ()) for name in names]
    )


def notebook(name):
    return nbformat.read(BOOK / f"{name}.ipynb", as_version=4)


def tags(cell):
    return set(cell.metadata.get("tags", []))


def shows(cell, mark):
    """Whether an output that a reader sees holds this text."""
    if "remove-output" in tags(cell):
        return False
    return any(mark in str(text) for out in cell.get("outputs", []) for text in out.get("data", {}).values())


def is_explorer(cell):
    return shows(cell, 'class="lr-explore"')


def hides_its_code(cell):
    return bool(tags(cell) & {"hide-input", "hide-cell", "remove-input", "remove-cell"})


# --- the order of cells


@each_but(OLD_ORDER)
def test_the_picture_comes_first(name):
    """Title and answer, the hidden install cell, a heading, the explorer: nothing else before it."""
    first, install, *rest = notebook(name).cells
    title, _, answer = first.source.partition("\n")
    assert title.startswith("# ") and "\n#" not in answer
    assert 0 < reading_time.words(answer) <= LONGEST_ANSWER
    assert "remove-cell" in tags(install) and "find_spec" in install.source
    before = []
    for cell in rest:
        if is_explorer(cell):
            assert hides_its_code(cell)
            break
        before.append(cell)
    assert [cell.source for cell in before] in ([], ["## In one picture"])


@each_but([])
def test_nobody_states_a_reading_time(name):
    """The line about the chapter computes it."""
    assert not re.search(r"minutes you|minute read", notebook(name).cells[0].source)


def built(cell):
    """What a cell calls to build claims, provenance or a table."""
    source = re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.MULTILINE)
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = {ast.unparse(call).split(".")[-1] for call in calls} & {"Claims", "Table", "provenance"}
    adds = {
        ast.unparse(call)
        for call in calls
        if isinstance(call, ast.Attribute) and call.attr in ("add", "beats") and "claims" in ast.unparse(call.value)
    }
    return named | adds


def test_what_builds_a_table_is_seen():
    cell = nbformat.v4.new_code_cell
    assert built(cell("scale_claims.beats(result, 'a', 'b')")) == {"scale_claims.beats"}
    assert built(cell("print(provenance(x)); lab.Table([], [])")) == {"provenance", "Table"}
    assert built(cell("%pip install x\nseen.add(1)\nresult.table({})")) == set()


@each_but(OLD_ORDER)
def test_cells_that_build_tables_are_folded(name):
    code = [cell for cell in notebook(name).cells if cell.cell_type == "code" and "remove-cell" not in tags(cell)]
    unfolded = [cell.source.split("\n")[0] for cell in code if built(cell) and not hides_its_code(cell)]
    assert unfolded == []


# --- captions


def caption_of(cell):
    """The caption of a cell's picture, or None where it draws none."""
    if is_explorer(cell):
        text = next(text for out in cell.outputs for text in [out.get("data", {}).get("text/html", "")] if text)
        return (figures.CAPTION.findall(text) or [""])[0]
    pictures = any(kind.startswith("image/") for out in cell.get("outputs", []) for kind in out.get("data", {}))
    if "remove-output" in tags(cell) or not (pictures or shows(cell, 'class="lr-chart"')):
        return None
    return (cell.metadata.get("mystnb", {}).get("figure") or {}).get("caption", "")


@each_but(OLD_ORDER)
def test_figures_have_captions(name):
    captions = [caption for cell in notebook(name).cells if (caption := caption_of(cell)) is not None]
    assert captions
    for caption in captions:
        assert 10 <= reading_time.words(caption) <= LONGEST_CAPTION and caption.rstrip()[-1] in ".?!", caption


@needs_pages
@each_but([])
def test_captions_are_numbered_in_one_series(name):
    page = soup(f"{name}.html")
    wanted = sum(bool(caption_of(cell)) for cell in notebook(name).cells)
    found = [caption.get_text(" ", strip=True) for caption in page.select("figure.lr-figure > figcaption")]
    assert len(found) == wanted
    assert [re.match(r"Figure \d+\.", text)[0] for text in found] == [f"Figure {n + 1}." for n in range(wanted)]
    assert len(page.select(".bd-article figure")) == wanted  # Sphinx' own series has none
    assert not page.select("figure .caption-number, .lr-caption")  # exercises have numbers of their own
    for figure in page.select("figure.lr-figure"):
        assert figure.select("img[alt], .lr-explore[aria-label], svg.lr-chart")


def explorer(caption):
    told = f'<p class="lr-caption">{caption}</p>\n' if caption else ""
    text = f'<div class="lr-explore" id="a"><p class="lr-title">Title</p><svg></svg>{told}</div>'
    return nodes.raw("", text, format="html", classes=["output"])


def test_an_explorers_caption_leaves_its_box():
    (node,) = figures.numbered(explorer("See &lt;this&gt;."), 3)
    assert node["classes"] == ["output"]
    text = node.astext()
    assert text.endswith("</div><figcaption><p><strong>Figure 3.</strong> See &lt;this&gt;.</p></figcaption></figure>")
    assert text.startswith('<figure class="lr-figure" data-figure="3"><div') and "lr-caption" not in text
    (bare,) = figures.numbered(explorer(""), 1)
    assert "<strong>Figure 1.</strong> Title" in bare.astext()


def test_a_picture_without_a_caption_is_no_figure():
    picture = nodes.figure("", nodes.image(uri="a.png"))
    assert not figures.is_figure(picture)
    picture += nodes.caption("", "See.")
    assert figures.is_figure(picture)
    assert [type(node) for node in figures.numbered(picture, 1)] == [
        nodes.raw,
        nodes.image,
        nodes.raw,
        nodes.paragraph,
        nodes.raw,
    ]


# --- folds


@needs_pages
@each_but([])
def test_folds_are_named_and_stand_below_what_they_make(name):
    page = soup(f"{name}.html")
    folds = page.select("div.cell details.hide")
    assert folds and "code cell" not in str([fold.summary for fold in folds])
    for fold in folds:
        assert not fold.find_next_siblings("div", class_="cell_output")
    for figure in page.select("figure.lr-figure"):
        told = [fold.p.get_text() for fold in figure.find_parent("div", class_="cell").select("details.hide")]
        assert told == [f"Code of Figure {figure['data-figure']}"]


# --- the reading time


def book(*cells):
    """A notebook of (kind, text, tags, outputs)."""
    new = {"md": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    made = []
    for kind, source, *more in cells:
        made.append(new[kind](source))
        made[-1].metadata["tags"] = more[0] if more else []
        if len(more) > 1:
            made[-1].outputs = more[1]
    return nbformat.v4.new_notebook(cells=made)


def output(**data):
    return nbformat.v4.new_output("display_data", {kind.replace("_", "/"): text for kind, text in data.items()})


PROSE, CODE = "word " * 300, "x = 1\n\n" * 24  # two minutes each
TWO = (2, 2)


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        ([("md", PROSE), ("code", CODE)], (4, 4)),
        ([("code", CODE, ["hide-input"])], (0, 2)),
        ([("code", CODE, ["hide-cell"], [output(text_plain=PROSE)])], (0, 4)),
        ([("code", CODE, ["hide-output"], [output(text_plain=PROSE)])], (2, 4)),
        ([("code", CODE, ["remove-input"], [output(text_plain=PROSE)])], TWO),
        ([("code", CODE, ["remove-cell"], [output(text_plain=PROSE)])], (0, 0)),
        ([("code", "", [], [nbformat.v4.new_output("stream", text=PROSE)])], TWO),
        ([("code", "", [], [output(text_html=f"<table><td>{PROSE}</td></table>", text_plain=PROSE)])], TWO),
        ([("code", "", [], [output(text_markdown=f"```python\n{CODE}```", text_plain=CODE)])], TWO),
        ([("code", "", [], [output(image_png="iVBORw", text_plain=PROSE)])], (0, 0)),
        ([("md", f"{PROSE}\n:::{{solution}} a\n:class: dropdown\n{PROSE}\n:::\n")], (2, 4)),
        ([("md", f"::::{{note}} A\n:class: dropdown\n:::{{tip}}\n{PROSE}\n:::\n{PROSE}\n::::\n{PROSE}")], (2, 6)),
        ([("md", f"```{{dropdown}} A\n{PROSE}\n```\n")], (0, 2)),
        ([("md", f"{PROSE}\n:::{{exercise}} a\n{PROSE}\n:::\n")], (4, 4)),
        (
            [
                ("md", f"{PROSE}\n:::{{solution-start}} a\n:class: dropdown\n:::\n{PROSE}"),
                ("code", CODE, [], [output(text_plain=PROSE)]),
                ("md", f"{PROSE}\n:::{{solution-end}}\n:::\n{PROSE}"),
                ("code", CODE),
            ],
            (6, 14),
        ),
        (
            [
                ("md", f":::{{solution-start}} a\n:::\n{PROSE}"),
                ("md", f":::{{solution-end}}\n:::\n{PROSE}\n:::{{solution-start}} b\n:::\n{PROSE}"),
                ("code", CODE),
            ],
            (2, 8),
        ),
    ],
)
def test_minutes_are_counted(cells, wanted):
    assert reading_time.minutes(book(*cells)) == wanted


def test_captions_count_and_pictures_do_not():
    drawn = nbformat.v4.new_code_cell("", outputs=[output(image_png="iVBORw")])
    drawn.metadata["mystnb"] = {"figure": {"caption": PROSE}}
    live = output(text_html=f"<script>{PROSE}</script><dt>{PROSE}</dt><p class='lr-caption'>{PROSE}</p>")
    cells = [drawn, nbformat.v4.new_code_cell("", outputs=[live])]
    assert reading_time.minutes(nbformat.v4.new_notebook(cells=cells)) == (4, 4)


def test_a_reading_time_is_said():
    assert reading_time.said(book(("md", PROSE), ("code", CODE, ["hide-input"]))) == "2 min, 4 with everything open"
    assert reading_time.said(book(("md", PROSE))) == "2 min"


def test_words_leave_markup_out():
    assert reading_time.words("A [link](https://example.org/a-b) to *it*, {cite}`lora`: 0.05 nats.") == 8
    assert reading_time.words(":::{note}\n:label: x\nOne <b class='two'>word</b>\n:::") == 2
    assert reading_time.words(r"$\Delta W = s\,BA$") == 4


@each_but(TOO_LONG, list(PAPERS))
def test_a_chapter_is_read_in_time(name):
    unfolded, _ = reading_time.minutes(notebook(name))
    assert unfolded <= LONGEST_READ
