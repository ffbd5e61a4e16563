"""What is mended on written pages, what a page says about itself, and the report on its weight."""

import page_report
from docutils import nodes
from docutils.utils import new_document
from finish_pages import description, mended

SCRIPTS = [
    f'<script src="_static/{name}.js?v=1"></script>' for name in ("searchtools", "scripts/fontawesome", "doctools")
]
INDEX = '<script src="searchindex.js"></script>'


def test_scripts_are_loaded_where_they_are_used():
    page = "\n".join([*SCRIPTS, INDEX])
    assert mended(page, "lora.html") == SCRIPTS[2] + "\n"
    assert mended(page, "search.html") == "\n".join([SCRIPTS[0], SCRIPTS[2], INDEX])


def test_grids_keep_their_style_where_they_are_used():
    style = '<link rel="stylesheet" href="_static/sphinx-design.min.css?v=1" />\n'
    assert mended(style + "<p>text</p>", "a.html") == "<p>text</p>"
    used = style + '<div class="sd-card">text</div>'
    assert mended(used, "a.html") == used


def test_a_button_gets_a_name_and_a_signature_is_no_list():
    toggle = '<summary><span class="toctree-toggle" role="presentation"></span></summary>'
    assert 'summary aria-label="Pages below">' in mended(toggle, "a.html")
    assert mended("<summary>Cite</summary>", "a.html") == "<summary>Cite</summary>"
    signature = '<dt>(<dl>\n<dd>a,</dd>\n<dd>b,</dd>\n</dl>\n)</dt><dl class="simple"><dt>x</dt><dd>y</dd></dl>'
    wanted = '<dt>(<div>\n<div class="sig-line">a,</div>\n<div class="sig-line">b,</div>\n</div>\n)</dt>'
    assert mended(signature, "a.html") == wanted + '<dl class="simple"><dt>x</dt><dd>y</dd></dl>'


def test_a_fold_of_code_is_named_by_its_own_words():
    fold = '<summary aria-label="Toggle hidden content">\n<p>Code of Figure 2</p></summary>'
    assert mended(fold, "a.html") == "<summary>\n<p>Code of Figure 2</p></summary>"


def document(*texts):
    page = new_document("page")
    page += [nodes.paragraph("", text) for text in texts]
    return page


def test_the_bibliography_has_no_half_roles():
    entry = '<div role="list" class="citation-list"><div class="citation" role="doc-biblioentry">a</div></div>'
    assert "role" not in mended(entry, "bibliography.html")


def test_description_is_the_first_paragraph_of_some_length():
    text = "A sentence that says what stands on the page,\nin two lines."
    assert description(document("Short.", text, "Another paragraph, which is long enough as well.")) == " ".join(
        text.split()
    )
    assert description(None) == description(document("Short."))
    page = document(text)
    page += nodes.meta("", name="description", content="Declared.")
    assert description(page) == "Declared."


def test_a_long_description_ends_between_words():
    text = description(document("seven77 " * 60))
    assert len(text) <= 200
    assert text == "seven77 " * 24 + "…"


def test_the_report_names_the_heaviest_page_first():
    entry = {"requests": 20, "by_kind": {"script": 300_000, "font": 60_000, "document": 20_000, "other": 1}}
    report = {
        "light.html": {"bytes": 380_001, "first_paint_ms": 500, **entry},
        "heavy.html": {"bytes": 900_000, **entry},
    }
    assert page_report.rows(report) == [
        ("heavy.html", "900", "20", "-", "-", "script 300, font 60, document 20"),
        ("light.html", "380", "20", "500", "-", "script 300, font 60, document 20"),
    ]


def test_spaces_stand_before_links_and_titles_have_no_tex():
    assert mended('Solution to<a href="#x"> Exercise 3.1</a>', "a.html") == 'Solution to <a href="#x">Exercise 3.1</a>'
    assert mended("Multiple $l_p$ attacks", "status.html") == "Multiple <i>l<sub>p</sub></i> attacks"
    assert mended("title = {Multiple $l_p$ attacks}", "robustness/ramp.html") == "title = {Multiple $l_p$ attacks}"
