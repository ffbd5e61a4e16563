"""Homework that was handed in: by the command, by nbgrader and by otter-grader."""

import csv
import importlib.util
import json
import re
import subprocess
import sys

import course
import pytest
from links import ROOT

NO_NBGRADER = importlib.util.find_spec("nbgrader") is None
NO_OTTER = importlib.util.find_spec("otter") is None
ADAPTERS = course.load("adapters", 7)
RIGHT = {task.name: task.answer for task in ADAPTERS.tasks}
#: What replaces the solution of `update`, and words of the reason.
HOSTILE = {
    "package": (
        "from lowrank_ref.adapters import lora\n\n\ndef update(A, B, alpha):\n"
        "    return lora.delta_weight(A, B, alpha / len(A)**0.4)",
        "it calls lowrank_ref.adapters.lora.delta_weight",
    ),
    "exits": ("import os\n\n\ndef update(A, B, alpha):\n    os._exit(0)", "it ended its process"),
    "loops": ("def update(A, B, alpha):\n    while True:\n        pass", "it had not ended after 1 seconds"),
    "overrides": (
        "import sys\nimport course\nimport lowrank_ref.lab.grade as g\nfrom lowrank_ref.lab import _differences\n"
        "g.GradeReport.points = property(lambda self: 20)\ng.grade_file = lambda *a, **k: g.GradeReport(())\n"
        "course.graded = g.grade_file\n_differences.differences = lambda *a, **k: iter(())\n"
        "torch.isclose = torch.allclose = lambda *a, **k: True\n\n\n"
        "def update(A, B, alpha):\n    return torch.zeros(len(B), A.shape[1], dtype=A.dtype)",
        "the result does not depend on A and B",
    ),
}


def hand_in(folder, answers, homework=ADAPTERS):
    course.write_json(folder / f"{homework.key}.ipynb", course.filled_in(homework, answers))


@pytest.fixture(scope="module")
def grades(tmp_path_factory):
    """Student -> row of the CSV that the command writes."""
    folder = tmp_path_factory.mktemp("handed in")
    students = {"right": 7, "empty": 4, "neighbour": 8, **{name: 7 for name in HOSTILE}}
    students = {name: number + 60 * i for i, (name, number) in enumerate(students.items())}  # the same variant
    with (folder / "students.csv").open("w") as file:
        csv.writer(file).writerows([("id", "number"), *students.items()])
    work = folder / "work"
    hand_in(work / "right", RIGHT)
    hand_in(work / "empty", {})
    hand_in(work / "neighbour", RIGHT)
    for name, (source, _) in HOSTILE.items():
        hand_in(work / name, RIGHT | {"update": source})
    (work / "adapters_stranger.py").write_text(ADAPTERS.solution)
    (work / "right" / "notes.py").write_text("")
    (work / "right" / "primer.ipynb").write_text("{not json")
    command = [sys.executable, "book/tools/course.py", "grade", str(work), "--seconds", "1"]
    command += ["--students", str(folder / "students.csv"), "--out", str(folder / "grades.csv")]
    subprocess.run(command, cwd=ROOT, check=True)
    with (folder / "grades.csv").open(encoding="utf-8-sig", newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def test_the_command_gives_points_and_reasons(grades):
    right, empty, neighbour = (grades[f"{name}/adapters.ipynb"] for name in ("right", "empty", "neighbour"))
    assert (right["student"], right["number"], right["homework"]) == ("right", "7", "adapters")
    assert (right["points"], right["of"]) == ("20", "20")
    assert empty["points"] == "0" and "NotImplementedError" in empty["reasons"]
    assert float(neighbour["points"]) < 12 and "times what is wanted" in neighbour["reasons"]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_loses_its_task_and_no_other(grades, name):
    row = grades[f"{name}/adapters.ipynb"]
    assert row["points"] == "16"
    assert "update 0/4" in row["reasons"] and HOSTILE[name][1] in row["reasons"]


def test_files_that_cannot_be_graded_are_told(grades):
    assert "wanted one id" in grades["adapters_stranger.py"]["reasons"]
    assert "wanted one of primer" in grades["right/notes.py"]["reasons"]
    assert grades["right/primer.ipynb"]["points"] == "0"


def test_names_of_files():
    students = {"1": 1, "11": 11, "anna.k": 5}
    of = lambda name: course.whose(course.Path(name), students)  # noqa: E731
    assert of("11/primer.ipynb") == ("11", 11, "primer")
    assert of("primer_1.py") == ("1", 1, "primer")
    assert of("adapters/anna.k/primer-2.py") == ("anna.k", 5, "primer")
    for name in ("111/primer.ipynb", "1/11/primer.py", "1/homework.py"):
        with pytest.raises(ValueError, match="wanted one"):
            of(name)
    assert course.whose(course.Path("anna/primer.ipynb"), {}) == ("anna", 0, "primer")
    assert course.whose(course.Path("primer_anna.py"), {}) == ("anna", 0, "primer")


def test_a_loop_outside_of_functions_ends_once(tmp_path):
    path = tmp_path / "adapters.py"
    path.write_text("while True: pass")
    done = course.graded(path, "adapters", seconds=0.05)
    assert done.points == 0
    assert {row.reason for report in done.reports.values() for row in report.rows} == {
        "reading it had not ended after 1 seconds"
    }


@pytest.mark.parametrize("text", ["id,number\na,1\na,2\n", "id,number\na,1\nb,1\n", "name\na\n", "id,number\na,x\n"])
def test_students_are_checked(tmp_path, text):
    (tmp_path / "students.csv").write_text(text)
    with pytest.raises(ValueError, match="students.csv: got"):
        course.read_students(tmp_path / "students.csv")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A course of three students."""
    folder = tmp_path_factory.mktemp("course")
    assert course.main(["make", "--numbers", "7-10", "--out", str(folder)]) == 0
    return folder


def test_sheets_hold_neither_references_nor_tests(made):
    for key in course.homeworks():
        for number in range(7, 11):
            text = (made / "sheets" / str(number) / f"{key}.ipynb").read_text()
            cells = json.loads(text)["cells"]
            code = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "code")
            for task in course.load(key, number).tasks:
                body = task.answer.rstrip().splitlines()[-1].strip()
                assert body not in code
                assert task.name in code
            assert "accept" not in code and "grade" not in code.lower().replace("given outside", "")


@pytest.mark.skipif(NO_NBGRADER, reason="nbgrader is not installed: pip install -c constraints.txt -e .[course]")
def test_a_round_with_nbgrader(made, monkeypatch):
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import PyFileConfigLoader

    root = made / "nbgrader"
    monkeypatch.chdir(root)
    for number, answers in {
        7: RIGHT,
        8: RIGHT,
        9: RIGHT | {"update": HOSTILE["overrides"][0]},
        10: {},
    }.items():
        hand_in(root / "submitted" / str(number) / "adapters", answers, course.load("adapters", number))
    api = NbGraderAPI(config=PyFileConfigLoader("nbgrader_config.py", path=str(root)).load_config())
    assert api.generate_assignment("adapters")["success"]
    released = (root / "release" / "adapters" / "adapters.ipynb").read_text()
    assert "raise NotImplementedError" in released and "@ self.A.T" not in released
    for number in (7, 8, 9, 10):
        done = api.autograde("adapters", str(number))
        assert done["success"], done["log"]
    done = api.generate_feedback("adapters")
    assert done["success"], done["error"]
    scores = {s["student"]: s["score"] for s in api.get_submissions("adapters")}
    assert scores["7"] == 20 and scores["10"] == 0
    assert scores["8"] < 12 and scores["9"] < 12
    pages = {n: (root / "feedback" / str(n) / "adapters" / "adapters.html").read_text() for n in (7, 8, 10)}
    assert re.search(r"total +4 / 4", pages[7])
    assert "times what is wanted" in pages[8]
    assert "NotImplementedError" in pages[10]


@pytest.mark.skipif(NO_OTTER, reason="otter-grader is not installed: pip install -c constraints.txt -e .[course]")
def test_a_round_with_otter(made, tmp_path, monkeypatch):
    from otter.generate import main as generate
    from otter.run import main as grade

    root = made / "otter" / "adapters"
    monkeypatch.chdir(root)
    generate(tests_dir="tests", output_path="autograder.zip", files=["grading"], no_environment=True)
    for number, answers, low, high in ((7, RIGHT, 20, 20), (8, RIGHT, 2, 12), (9, {}, 0, 0)):
        hand_in(tmp_path / str(number), answers, course.load("adapters", number))
        path = str(tmp_path / str(number) / "adapters.ipynb")
        done = grade(path, autograder="autograder.zip", output_dir=None, no_logo=True)
        assert done.possible == 20
        assert low <= done.total <= high
