"""The syllabus: every exercise has minutes, points and a rubric, and the weeks follow what chapters need."""

import functools
import re

import course_pages
import links
import nbformat
import pytest
import reading_time
import workload
import yaml
from bs4 import BeautifulSoup
from links import ROOT
from workload import KINDS, Chapter, Exercise, Week, graded, labelled

from lowrank_ref.core.registry import papers

BOOK = ROOT / "book"
COURSE = BOOK / "course"
PAGES = [path.relative_to(BOOK).with_suffix("").as_posix() for path in links.chapters()]
LABELS = {label: page for page in PAGES for label in labelled(BOOK, page)}
GRADED = graded(BOOK)
#: A week of more hours is no week. Reading, exercises and homework of all, without the chapter of choice.
LONGEST_WEEK = 8 * 60


def source(path):
    return path.read_text(encoding="utf-8")


def test_every_exercise_has_its_row_and_every_row_its_exercise():
    """Found here without the tool: each directive, and the label below it."""
    told = re.compile(r"^:+\{exercise\}.*\n:label: (\S+)$", re.M)
    cells = [cell for page in PAGES for cell in nbformat.read(BOOK / f"{page}.ipynb", as_version=4).cells]
    found = [label for cell in cells if cell.cell_type == "markdown" for label in told.findall(cell.source)]
    assert len(found) == len(set(found)) >= 90
    assert set(found) == set(LABELS) == set(graded(BOOK))


@pytest.mark.parametrize("label", LABELS)
def test_a_row_is_whole(label):
    minutes, rubric = GRADED[label]
    assert 5 <= minutes <= 60
    assert 3 <= sum(points for points, _ in rubric) <= 10
    assert len(rubric) >= 2 and all(points > 0 and len(text) >= 12 for points, text in rubric)


@functools.cache
def prose(page):
    cells = nbformat.read(BOOK / f"{page}.ipynb", as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("label", LABELS)
def test_a_rubric_pays_for_every_question(label):
    """Each letter, (a), (b) and so on, and each function that is to be written, is named in a line."""
    told = " ".join(text for _, text in GRADED[label][1])
    task = re.search(rf"^:label: {re.escape(label)}$(.*?)^:::", prose(LABELS[label]), re.M | re.S)[1]
    asked = set(re.findall(r"(?:^|\s)\(([a-d])\) ", task))
    assert asked <= set(re.findall(r"\(([a-d])\)", told))
    for function in re.findall(r"`(my_\w+|mine)\(", task):
        assert f"`{function}`" in told


def test_papers_have_one_of_each_kind():
    for paper in papers().values():
        assert set(labelled(BOOK, f"{paper.part}/{paper.key}").values()) == set(KINDS), paper.key


def test_an_exercise_without_a_row_is_refused():
    grades = graded(BOOK)
    del grades["lora-scale"]
    with pytest.raises(ValueError, match=r"wanted rows for \['lora-scale'\] of adapters/lora"):
        workload.chapter(BOOK, "adapters/lora", grades)


def test_an_exercise_without_a_kind_is_refused(tmp_path):
    cell = nbformat.v4.new_markdown_cell(":::{exercise} Guess\n:label: a\n\nHow many?\n:::")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match="a: wanted a label and one of"):
        labelled(tmp_path, "a")


# --- the weeks


def test_ten_weeks_hold_every_chapter_once():
    weeks = workload.weeks()
    read = [chapter.page for week in weeks for chapter in (*week.read, *week.choose)]
    assert len(weeks) == 10 and len(read) == len(set(read))
    assert set(LABELS.values()) <= set(read)
    assert {f"{paper.part}/{paper.key}" for paper in papers().values()} <= set(read)


def test_what_a_chapter_needs_is_read_before_by_all():
    known = {"notation"}
    for week in workload.weeks():
        for chapter in week.read:
            assert {need.rpartition("/")[2] for need in chapter.needs} <= known, chapter.page
            known.add(chapter.page.rpartition("/")[2])
        for chapter in week.choose:
            # A chapter of choice may stand on another one of the same week.
            same = {other.page.rpartition("/")[2] for other in week.choose}
            assert set(chapter.needs) <= known | same, chapter.page


def test_no_week_is_longer_than_a_week():
    assert [week.number for week in workload.weeks() if week.minutes > LONGEST_WEEK] == []
    assert all(1 <= len(week.goals) <= 4 for week in workload.weeks())


def test_homeworks_come_once_and_after_their_chapters():
    sheets = [week.homework["key"] for week in workload.weeks() if week.homework]
    assert len(sheets) == len(set(sheets)) >= 9
    assert {paper.part for paper in papers().values()} | {"primer"} == set(sheets)
    for week in workload.weeks():
        if week.homework:
            part = week.homework["key"]
            assert any(chapter.page.split("/")[0] == part for chapter in week.read), part


def test_a_homework_tells_what_its_source_says(tmp_path):
    planned = {"key": "a", "title": "Planned", "points": 20, "minutes": 100}
    assert workload.homework({}, tmp_path) == {} and workload.homework(planned, tmp_path) == planned
    tasks = '@task(minutes=20, points={"value": 3, "shapes": 1}, hint="")\ndef f(): ...\n' * 2
    (tmp_path / "a.py").write_text(f'TITLE = "Written"\n{tasks}')
    assert workload.homework(planned, tmp_path) == {"key": "a", "title": "Written", "points": 8, "minutes": 40}


def test_every_homework_is_in_the_plan():
    written = {path.stem for path in (COURSE / "homeworks").glob("[!_]*.py")}
    planned = {week.homework["key"] for week in workload.weeks() if week.homework}
    if not written:
        pytest.skip("no homework is written yet")
    assert written == planned


def test_minutes_are_those_of_the_chapters():
    lora = next(c for week in workload.weeks() for c in week.read if c.page == "adapters/lora")
    unfolded, _ = reading_time.minutes(nbformat.read(BOOK / "adapters" / "lora.ipynb", as_version=4))
    assert lora.reading == unfolded
    assert lora.minutes == sum(GRADED[label][0] for label in labelled(BOOK, "adapters/lora"))


# --- the page


def week(**other):
    exercises = (Exercise("x-prove", "Prove", 20, ((2, "`f` < 1"), (1, "the rest"))),)
    chapter = Chapter("adapters/lora", "LoRA", 25, exercises, ("primer",))
    given = {"number": 1, "title": "T", "goals": ("g",), "read": (chapter,), "choose": (), "homework": {}}
    return Week(**given | other)


def test_a_week_adds_up():
    sheet = {"key": "a", "title": "S", "points": 20, "minutes": 100}
    chosen = Chapter("ranks/sora", "SoRA", 31, (), ())
    one = week(homework=sheet, choose=(chosen,))
    assert (one.minutes, one.points, one.chosen) == (145, 3, (31, 31))
    assert workload.hours(145) == "2.5 h" and workload.hours(120) == "2 h"
    assert course_pages.told(one) == (
        "Work: 2.5 h, of it 100 minutes for the homework “S” (20 points), and 31 minutes to read a chapter of choice."
    )
    assert course_pages.told(week()) == "Work: 1 h."


def test_tables_lead_to_chapters_and_exercises():
    page = BeautifulSoup(course_pages.rubrics(BOOK, [week()]), "html.parser")
    assert [a["href"] for a in page.select("td a")] == ["../adapters/lora.html", "../adapters/lora.html#x-prove"]
    assert [item.get_text() for item in page.select("li")] == ["2 f < 1", "1 the rest"]
    assert page.li.code.get_text() == "f"
    page = BeautifulSoup(course_pages.one_week(BOOK, week()), "html.parser")
    assert [td.get_text() for td in page.select("tbody td")][:3] == ["LoRA", "primer", "25 min"]
    assert page.select_one("tbody a")["href"] == "../adapters/lora.html"


def test_headings_are_those_of_the_plan():
    wanted = [f"Week {week.number}: {week.title}" for week in workload.weeks()]
    heads = re.findall(r"^### (Week .*)$", source(COURSE / "syllabus.md"), re.M)
    shown = re.findall(r"^```\{week\} (\d+)$", source(COURSE / "syllabus.md"), re.M)
    assert heads == wanted and shown == [str(number) for number in range(1, len(wanted) + 1)]


def test_the_page_counts_nothing_by_hand():
    """Minutes and points come from directives, so that they cannot go stale."""
    text = source(COURSE / "syllabus.md")
    assert not re.findall(r"\d+ (?:minutes|min|points)\b", text)
    assert {"weeks", "exercises"} <= set(re.findall(r"^```\{(\w+)\}", text, re.M))


def test_the_class_room_installs_what_the_project_says():
    """Each line of the recipe names what pyproject.toml and the Makefile have."""
    text = source(COURSE / "classroom.md")
    assert f"--no-deps {' '.join(links.data_packages())}\n" in text
    assert '".[chapters]"' in text and text.count("-c constraints.txt") == 4
    assert "make student" in text and re.search(r"^student: ", source(ROOT / "Makefile"), re.M)


def test_course_pages_are_in_the_contents():
    table = yaml.safe_load(source(BOOK / "_toc.yml"))
    captions = [part["caption"] for part in table["parts"]]
    assert captions.index("Course") == captions.index("Reference") - 1
    listed = {entry["file"] for part in table["parts"] for entry in part["chapters"]}
    assert {"course/syllabus", "course/classroom"} <= listed


# --- the words

#: Technical words of the chapters of weeks 1 to 6, as a pattern: how a text may write them -> how they are defined.
TERMS = {
    "8-bit": "8-bit optimizer",
    "accuracy": "accuracy",
    "activations?": "activation",
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamw": "AdamW",
    "adapters?": "adapter",
    "attention": "Attention",
    "backward": "backward pass",
    "baselines?": "baseline",
    "batch": "batch",
    "bayesian": "Bayesian",
    "bfloat16": "bfloat16",
    "bias correction": "bias correction",
    "causal": "causal",
    "checkpoint": "checkpoint",
    "clip(ping)?": "clipping",
    "condition number": "condition number",
    "controls?": "control",
    "convex": "convex",
    "cosine": "cosine",
    "covariance": "covariance",
    "cross-entropy": "cross-entropy",
    "ddp": "DDP",
    "distillation": "distillation",
    "dropout": "dropout",
    "eigenvalues?": "eigenvalue",
    "effective rank": "effective rank",
    "embedding": "embedding",
    "encoder": "encoder",
    "entropy": "entropy",
    "epochs?": "epoch",
    "exponents?": "exponent",
    "fine-tuning": "fine-tuning",
    "float64": "float64",
    "forget(ting)?": "forgetting",
    "frobenius": "Frobenius norm",
    "frozen": "frozen",
    "fsdp": "FSDP",
    "gaussian": "Gaussian",
    "gpt": "GPT",
    "gram": "Gram matrix",
    "half precision": "half precision",
    "hard-concrete": "hard-concrete",
    "heads?": "head",
    "hessian": "Hessian",
    "hooks?": "hook",
    "jacobian": "Jacobian",
    "kernels?": "kernel",
    "kl": "Kullback-Leibler divergence",
    "learning rates?": "learning rate",
    "llama": "LLaMA",
    "logistic": "logistic function",
    "logits?": "logit",
    "lu": "LU factorisation",
    "masks?": "mask",
    "merged?": "merge",
    "minilm": "MiniLM",
    "mlp": "MLP",
    "moments?": "moments",
    "momentum": "momentum",
    "nats": "nat",
    "nuclear norm": "nuclear norm",
    "orthogonal": "Orthogonal matrix",
    "orthonormal": "orthonormal",
    "oversampl(e|ing)": "oversampling",
    "paired": "paired",
    "peft": "PEFT",
    "permutation": "permutation",
    "perplexity": "perplexity",
    "pivots?": "pivots",
    "pretrained": "pretrained",
    "prior": "prior",
    "projection": "projection",
    "proximal": "proximal step",
    "qr": "QR",
    "quantis(ed|ation)": "quantisation",
    "queries|query": "Queries",
    "rank": "rank",
    "rmsprop": "RMSprop",
    "seeds?": "seed",
    "sgd": "SGD with momentum",
    "silu": "silu",
    "singular values?": "singular value",
    "soft threshold": "soft threshold",
    "softmax": "softmax",
    "span": "span",
    "stable rank": "stable rank",
    "standard deviations?": "Standard deviation",
    "stationary": "stationary point",
    "straight-through": "straight-through",
    "subgradient": "subgradient",
    "subspace": "subspace",
    "support": "support",
    "temperature": "temperature",
    "test": "test",
    "tokens?": "token",
    "trace": "trace",
    "transformer": "transformer block",
    "triangular": "triangular",
    "triton": "Triton",
    "truncated svd": "truncated SVD",
    "validation": "validation",
    "variance": "variance",
    "vocabulary": "vocabulary",
    "warm-up": "warm-up",
    "weight decay": "weight decay",
    "zero-shot": "zero-shot",
}


@functools.cache
def read_by_week_six():
    weeks = workload.weeks()[:6]
    pages = [chapter.page for week in weeks for chapter in (*week.read, *week.choose)]
    return "\n".join(prose(page) for page in pages if page != "course/prerequisites").lower()


@functools.cache
def definitions():
    """What is set in bold in the two notebooks or stands as a meaning in the notation, in small letters."""
    told = [text for page in ("course/prerequisites", "primer") for text in re.findall(r"\*\*(.+?)\*\*", prose(page))]
    heads = re.findall(r"^#+ (.*)$", prose("course/prerequisites") + "\n" + prose("primer"), re.M)
    starred = re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", prose("course/prerequisites"))
    meanings = [row.split("|")[2] for row in source(BOOK / "notation.md").split("\n") if row.startswith("| $")]
    formulas = re.findall(r"\\text\{([^}]+)\}(?=\([^)]*\)? ?=| =)", prose("primer") + prose("course/prerequisites"))
    return "\n".join([*told, *heads, *starred, *meanings, *formulas]).lower()


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_used_and_defined(term):
    used = re.compile(rf"(?<![\w-])({term})(?![\w-])", re.I)
    assert used.search(read_by_week_six()), "no chapter of the first six weeks has it: take it off"
    defined = re.compile(rf"(?<![\w-]){re.escape(TERMS[term].lower())}(?![\w])")
    assert defined.search(definitions()), f"wanted a definition of {TERMS[term]!r}"


def test_a_term_without_a_definition_is_seen():
    assert "residual network" not in definitions() and "perplexity" in definitions()
