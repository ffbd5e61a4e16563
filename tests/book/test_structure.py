"""One file, one test file, one chapter per paper, and chapters that keep the rules of the book."""

import ast
import base64
import importlib
import json
import re

import api_pages
import links
import nbformat
import pytest
import yaml
from links import ROOT
from pybtex.database import parse_file

from lowrank_ref.core.registry import papers
from lowrank_ref.lab.claims import VERDICTS

BOOK = ROOT / "book"
PAPERS = papers()
CHAPTERS = links.chapters()

#: Words that name the sections of a paper's chapter, in their order.
SECTIONS = (
    "picture",
    "problem",
    "idea",
    "check",
    "experiment",
    "scale",
    "use it",
    "breaks",
    "exercises",
    "references",
)
LONGEST_FILE = 250
LONGEST_FUNCTION = 8
LONGEST_LINE = 79

#: Chapters written before claims were made from their numbers. Rewriting one takes it off the list; none is added.
TO_BE_REWRITTEN = {
    "adapters/randlora",
    "analysis/artificial_entanglement",
    "optimizers/galore",
    "pretraining/sltrain",
    "robustness/ramp",
}

#: Parts of results files from before they told the commit and the code that made them. Measuring again takes one off.
WITHOUT_COMMIT = {
    "artificial_entanglement_scale, attention",
    "artificial_entanglement_scale, controls",
    "artificial_entanglement_scale, fine_tuning",
    "galore_long, training",
    "galore_scale, memory",
    "galore_scale, pretraining",
    "layers, autocast",
    "layers, bfloat16",
    "layers, float32",
    "lora_minilm, minilm",
    "optimizers, bases",
    "optimizers, ceilings",
    "optimizers, steps",
    "r_mtgb_scale, comparison",
    "ramp_scale, fine_tuning",
    "ramp_scale, scratch",
    "randlora_scale, fine_tuning",
    "randlora_scale, layer",
    "randlora_scale, model",
    "sltrain_scale, layer",
    "sltrain_scale, memory",
    "sltrain_scale, pretraining",
    "sltrain_small, long",
    "sltrain_small, others",
    "sltrain_small, rates",
    "sltrain_small, shares",
    "sora_scale, steps",
    "sora_scale, verses",
    "ternary_kernel, decode",
    "ternary_kernel, prefill",
}

each_paper = pytest.mark.parametrize("paper", PAPERS.values(), ids=lambda paper: paper.key)
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: str(path.relative_to(BOOK)))


def toc() -> list[str]:
    """Every file in the table of contents, without suffix."""
    table = yaml.safe_load((BOOK / "_toc.yml").read_text())
    found = [table["root"]]

    def walk(entries):
        for entry in entries:
            found.extend([entry["file"]] if "file" in entry else [])
            walk(entry.get("chapters", []))
            walk(entry.get("sections", []))

    walk(table["parts"])
    return found


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def tags(cell):
    return cell.metadata.get("tags", [])


def parsed(cell):
    """The cell's syntax tree, with magics left out."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.MULTILINE))


def texts(output):
    """What an output shows as text."""
    data = output.get("data", {})
    return [output.get("text", ""), *(text for mime, text in data.items() if mime.startswith("text/"))]


# --- the three trees


@each_paper
def test_file_is_short(paper):
    lines = (ROOT / "lowrank_ref" / paper.part / f"{paper.key}.py").read_text().splitlines()
    assert len(lines) <= LONGEST_FILE


@each_paper
def test_paper_has_its_test(paper):
    assert (ROOT / "tests" / paper.part / f"test_{paper.key}.py").exists()


@each_paper
def test_paper_has_its_chapter_in_the_toc(paper):
    assert (BOOK / paper.part / f"{paper.key}.ipynb").exists()
    assert f"{paper.part}/{paper.key}" in toc()


@each_paper
def test_paper_has_its_bibtex(paper):
    entry = parse_file(BOOK / "references.bib").entries[paper.key]
    assert entry.fields["title"].replace("{", "").replace("}", "") == paper.title
    assert entry.fields["eprint"] == paper.arxiv.partition("v")[0]


@each_paper
def test_equations_name_functions(paper):
    source = (ROOT / "lowrank_ref" / paper.part / f"{paper.key}.py").read_text()
    names = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert paper.equations and set(paper.equations.values()) <= names


def test_each_module_of_a_part_has_a_test():
    parts = {paper.part for paper in PAPERS.values()} | {"core", "lab", "kernels"}
    for module in api_pages.public_modules():
        _, part, *rooms, name = module.split(".")
        if part in parts:
            assert ROOT.joinpath("tests", part, *rooms, f"test_{name}.py").exists(), module


def test_each_public_module_has_a_page():
    pages = ROOT / "_build" / "html" / "api"
    if not pages.exists():
        pytest.skip("no pages yet: python book/tools/build.py")
    missing = [name for name in api_pages.public_modules() if not (pages / f"{name}.html").exists()]
    assert missing == []


def test_toc_and_folders_agree():
    listed = {f"{name}.ipynb" for name in toc()} | {f"{name}.md" for name in toc()}
    assert [path for path in CHAPTERS if str(path.relative_to(BOOK)) not in listed] == []
    assert [name for name in toc() if not list(BOOK.glob(f"{name}.*"))] == []


def test_results_say_where_they_come_from():
    wanted, without = {"date", "hardware", "versions", "command"}, set()
    for path in (BOOK / "results").glob("*.json"):
        if path.name != "timings.json":
            for name, part in json.loads(path.read_text()).items():
                for run in part.get("runs", [part["provenance"]]):
                    assert wanted <= set(run), f"{path.name}, {name} lacks {wanted - set(run)}"
                    if not {"commit", "files"} <= set(run):
                        without.add(f"{path.stem}, {name}")
                assert all(0 <= row.get("run", 0) < len(part.get("runs", [0])) for row in part.get("rows", []))
    assert without == WITHOUT_COMMIT


# --- what a claim may say


def overclaims(path):
    """Where a chapter breaks a rule on evidence that a program can see; the rules themselves are in lab.claims."""
    for cell in cells(path, "code"):
        tree = parsed(cell)
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield from wrong_call(node)
        if {"compare"} <= imported and "Arm" not in imported:
            yield "compare without arms: import Arm and declare them"
        for output in cell.outputs:
            for line in output.get("text", "").split("\n"):
                if re.search(r": True$", line):
                    yield f"a bare True, wanted the number and its range: {line}"


def wrong_call(call):
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    name = ast.unparse(call.func)
    if name.endswith(".add") and "where" in keywords:
        if not {"numbers", "condition"} <= set(keywords):
            yield f"a claim without numbers and condition: {ast.unparse(call)[:80]}"
        if not isinstance(keywords.get("measured"), ast.Constant):
            yield f"measured is no template: {ast.unparse(call)[:80]}"
    if name == "compare" and not any(word in ast.unparse(call) for word in ("Arm", "arms", "ARMS")):
        yield f"a comparison without arms: {ast.unparse(call)[:80]}"
    verdict = keywords.get("verdict")
    if isinstance(verdict, ast.Constant) and verdict.value not in VERDICTS:
        yield f"a verdict outside the list: {verdict.value!r}"
    if name.endswith(".differing"):
        yield "a cause that follows from what differs: name the facts that are meant, `differences` shows all"
    if name == "print":
        for node in (node for argument in call.args for node in ast.walk(argument)):
            if isinstance(node, ast.Compare) and any(is_number(side) for side in (node.left, *node.comparators)):
                yield f"a comparison with a constant is printed, wanted `checked`: {ast.unparse(node)}"


def is_number(node):
    node = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


@each_chapter
def test_no_chapter_claims_more_than_its_numbers_carry(path):
    found = list(overclaims(path))
    if str(path.relative_to(BOOK).with_suffix("")) in TO_BE_REWRITTEN:
        assert found, "nothing is left to rewrite: take the chapter off the list"
    else:
        assert found == []


@pytest.mark.parametrize(
    "source, output, rule",
    [
        ("claims.add('x', where='T', measured='{a}', verdict='holds', numbers=n, condition='a > 0')", "", ""),
        ("checked('energy', e, 0.7, 0.8)", "energy: 0.78 (checked: 0.70 to 0.80)\n", ""),
        ("print('same:', a == b)", "same: False\n", ""),
        ("claims.add('x', where='T', measured='3', verdict='holds', holds=a > 0)", "", "without numbers"),
        ("claims.add('x', where='T', measured=f'{a}', verdict='holds', numbers=n, condition='a')", "", "no template"),
        ("claims.beats('a', 'b', r, 'm', where='T', verdict='not at this scale')", "", "outside the list"),
        ("from lowrank_ref.lab.compare import compare\ncompare(run, ['a', 'b'], lrs=x)", "", "without arms"),
        ("claims.beats('a', 'b', r, 'm', where='T', cause=list(r.differing('a', 'b')))", "", "a cause that follows"),
        ("def cause(a, b):\n    return [f for f in runs.differing(a, b) if f in FACTS]", "", "a cause that follows"),
        ("print('more than 0.3:', a > 0.3)", "", "`checked`"),
        ("print(f'below zero {a < -0.3}')", "", "`checked`"),
        ("print('exact:', torch.equal(a, b))", "exact: True\n", "a bare True"),
    ],
)
def test_the_rules_on_evidence_see_what_breaks_them(source, output, rule, tmp_path):
    cell = nbformat.v4.new_code_cell(source)
    cell.outputs = [nbformat.v4.new_output("stream", text=output)] if output else []
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "x.ipynb")
    found = list(overclaims(tmp_path / "x.ipynb"))
    assert any(rule in text for text in found) if rule else found == []


# --- what a reader sees in a chapter


@each_paper
def test_sections_of_a_paper(paper):
    heads = [
        line.lower()
        for cell in cells(BOOK / paper.part / f"{paper.key}.ipynb", "markdown")
        for line in cell.source.split("\n")
        if line.startswith("## ")
    ]
    rest = iter(heads)
    missing = [word for word in SECTIONS if not any(word in head for head in rest)]
    assert missing == [], f"wanted these sections in this order: {SECTIONS}, got {heads}"


@each_paper
def test_three_exercises_with_solutions(paper):
    text = "\n".join(cell.source for cell in cells(BOOK / paper.part / f"{paper.key}.ipynb", "markdown"))
    exercises = re.findall(r"^:::+\{exercise\}.*?^:label: (\S+)$", text, re.MULTILINE | re.DOTALL)
    solutions = re.findall(r"^:::+\{solution(?:-start)?\} (\S+)$", text, re.MULTILINE)
    assert len(exercises) >= 3
    assert sorted(solutions) == sorted(exercises)


@each_paper
def test_equations_stand_beside_their_code(paper):
    """At least two pairs, each with a number of its own, first in each a public function of the paper's part."""
    modules = [name for name in api_pages.public_modules() if name.startswith(f"lowrank_ref.{paper.part}.")]
    public = {
        name
        for module in modules
        for name, thing in vars(importlib.import_module(module)).items()
        if not name.startswith("_") and getattr(thing, "__module__", "") == module
    }
    pairs = [
        node
        for cell in cells(BOOK / paper.part / f"{paper.key}.ipynb", "code")
        for node in ast.walk(parsed(cell))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "beside"
    ]
    numbers = [ast.unparse(pair.args[0]) for pair in pairs]
    assert len(pairs) >= 2 and len(set(numbers)) == len(numbers)
    for pair in pairs:
        function = ast.unparse(pair.args[2])
        assert public & set(function.split(".")), f"{function}: wanted a public function of {modules}"


@each_chapter
def test_chapter_opens_with_an_explorer(path):
    """Before its second section, every page shows something to move."""
    sections = 0
    for cell in nbformat.read(path, as_version=4).cells:
        sections += len(re.findall(r"^## ", cell.source, re.MULTILINE)) if cell.cell_type == "markdown" else 0
        if any('class="lr-explore"' in text for output in cell.get("outputs", []) for text in texts(output)):
            break
    else:
        raise AssertionError("no explorer")
    assert sections <= 1


@each_chapter
def test_outputs_are_fresh(path):
    """nbval trusts a notebook without counts, so this does not."""
    code = [cell for cell in cells(path, "code") if cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run: make notebooks"


@each_chapter
def test_cells_that_print_have_outputs(path):
    for cell in cells(path, "code"):
        if {"nbval-ignore-output", "raises-exception"} & set(tags(cell)):
            continue
        shows = [
            statement
            for statement in parsed(cell).body
            if isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Call)
            and ast.unparse(statement.value.func) in ("print", "plt.show", "display")
        ]
        assert not shows or cell.outputs, f"no output stored for:\n{cell.source}"


@each_chapter
def test_outputs_hold_no_errors_and_no_paths(path):
    for cell in cells(path, "code"):
        for output in cell.outputs:
            assert output.output_type != "error" or "raises-exception" in tags(cell), output.get("evalue")
            assert output.get("name") != "stderr", f"a warning is shown: {output.get('text')}"
            for text in texts(output):
                assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|usr)/", text), text[:500]


@each_chapter
def test_outputs_load_nothing(path):
    for cell in cells(path, "code"):
        for text in (text for output in cell.outputs for text in texts(output)):
            assert not re.search(r"""(src|href)=["'](https?:)?//|url\(["']?https?:""", text), text[:500]


@each_chapter
def test_figures_have_alt_texts(path):
    for cell in cells(path, "code"):
        images = [out for out in cell.outputs if any(mime.startswith("image/") for mime in out.get("data", {}))]
        if images and "remove-output" not in tags(cell):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) >= 20, f"mystnb.image.alt: got {alt!r}, wanted 20 characters or more, for:\n{cell.source}"


@each_chapter
def test_figures_are_narrow(path):
    """A picture wider than the text column is shrunk until its letters cannot be read."""
    for cell in cells(path, "code"):
        for png in (out["data"]["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})):
            width = int.from_bytes(base64.b64decode(png)[16:20], "big")
            assert width <= 1600, f"got {width} pixels"


@each_chapter
def test_explorers_have_labels(path):
    for cell in cells(path, "code"):
        for text in (text for output in cell.outputs for text in texts(output)):
            for tag in re.findall(r"<div[^>]*class=\"[^\"]*lr-explore[^>]*>", text):
                assert re.search(r'aria-label="[^"]{20,}"', tag), tag


@each_chapter
def test_methods_live_in_the_package(path):
    """A chapter imports what it teaches: no class, no long function, except for plots."""
    for cell in cells(path, "code"):
        for node in ast.walk(parsed(cell)):
            assert not isinstance(node, ast.ClassDef), f"class {getattr(node, 'name', '')}"
            if isinstance(node, ast.FunctionDef) and "plot" not in tags(cell):
                length = node.end_lineno - node.lineno + 1
                assert length <= LONGEST_FUNCTION, f"def {node.name}: got {length} lines, wanted {LONGEST_FUNCTION}"


@each_chapter
def test_lines_are_short(path):
    for cell in cells(path, "code"):
        if "remove-cell" not in tags(cell):  # the install cell: its address has no place to break
            for line in cell.source.split("\n"):
                assert len(line) <= LONGEST_LINE, line


@each_chapter
def test_notebook_is_normalised(path):
    """Fixed cell ids, no machine's metadata: two people's runs differ in results only."""
    notebook = json.loads(path.read_text())
    assert [cell["id"] for cell in notebook["cells"]] == [f"c{i:02d}" for i in range(1, len(notebook["cells"]) + 1)]
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert all(set(cell["metadata"]) <= {"tags", "mystnb"} for cell in notebook["cells"])
    assert path.stat().st_size <= 1_000_000
