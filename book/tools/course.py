"""Homework from one source each: sheets, solutions, nbgrader, otter-grader, grading.

python book/tools/course.py make                   one sheet for all students
python book/tools/course.py make --numbers 1-30    a sheet for each number
python book/tools/course.py make --students FILE   the same; a CSV with id,number
python book/tools/course.py grade FOLDER           write grades.csv: points, reasons

`make` writes into _build/course. The sheets there (sheets/ID/KEY.ipynb) are right for
nbgrader, otter-grader and this command. None holds a reference or a test: work is
graded outside of the notebook by `lowrank_ref.lab.grade`, in a process of its own.

A homework is a file book/course/homeworks/KEY.py. Its docstring opens the sheet, each
function marked with `task` is the reference of a task and its docstring the question.
`variant` gives a student's number its values: `v.name` in code, «name» in text. In the
sheets and the solutions the value itself is in their place.
"""

import argparse
import ast
import csv
import inspect
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank_ref.core.registry import PARTS
from lowrank_ref.lab.grade import GradeReport, PropertyPoints, grade, grade_file

HERE = Path(__file__).resolve().parent
#: Where homeworks lie: in the book, or beside this file in otter's archive.
SOURCES = next(
    (
        p
        for p in (HERE.parent / "course" / "homeworks", HERE / "homeworks")
        if p.is_dir()
    ),
    HERE,
)
OUT = HERE.parents[1] / "_build" / "course"
#: Whole numbers up to this one are students' numbers.
LARGEST = 10**9

RULES = """\
**Rules.** Keep names, arguments and their order. Your functions are called with other
inputs than yours: other shapes, sizes of 1, zeros, float32, gradients. Points are given
by property, so that a correct formula earns its points even where an edge case fails.
`lowrank_ref` may be read but not called. Numbers in this sheet are yours: those of
others give other answers. What takes longer than a second goes below
`if __name__ == "__main__":`, which is not run for grading."""


# --- what a source says --------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One function or class to write; `options` go to `lab.grade`."""

    name: str
    reference: Callable
    question: str
    answer: str
    starter: str
    minutes: int
    points: Mapping[str, float]
    hint: str
    example: str
    options: Mapping[str, Any]

    @property
    def of(self) -> float:
        return sum(self.points.values())

    def grade(self, student: Callable, **more: Any) -> GradeReport:
        """Grade what is already here, in this process."""
        options = self.options | more
        return grade(student, self.reference, points=self.points, **options)

    def grade_file(self, path: Path, **more: Any) -> GradeReport:
        """Grade what a file defines, in another process."""
        options = self.options | more
        return grade_file(
            path, self.name, self.reference, points=self.points, **options
        )


@dataclass(frozen=True)
class Homework:
    """A source, read for one student's number."""

    key: str
    title: str
    objective: str
    after: tuple[str, ...]
    number: int
    opening: str
    setup: str
    tasks: tuple[Task, ...]
    picks: Mapping[str, Any]

    @property
    def of(self) -> float:
        return sum(task.of for task in self.tasks)

    @property
    def minutes(self) -> int:
        return sum(task.minutes for task in self.tasks)

    @property
    def solution(self) -> str:
        """Everything in one file that earns all points."""
        return "\n\n\n".join([self.setup, *(task.answer for task in self.tasks)]) + "\n"


@dataclass
class _Reading:
    """What the functions below collect while a source runs."""

    number: int
    picks: dict[str, Any] = field(default_factory=dict)
    tasks: list[tuple[Callable, dict[str, Any]]] = field(default_factory=list)
    given: list[str] = field(default_factory=list)


_readings: list[_Reading] = []


def variant(**axes: Sequence[Any]) -> types.SimpleNamespace:
    """Choose a value of each axis by the student's number.

    The lengths of the axes have no common divisor: neighbours differ in all values, and
    two numbers agree in all only if they differ by a multiple of the product. `seed`,
    `rows` and `columns` come along; the seed is another for every number.
    """
    lengths = [len(values) for values in axes.values()]
    if math.lcm(*lengths) != math.prod(lengths) or min(lengths, default=2) < 2:
        raise ValueError(f"axes: got lengths {lengths}, wanted some without a divisor")
    reading = _readings[-1]
    n = reading.number
    reading.picks = {name: values[n % len(values)] for name, values in axes.items()}
    reading.picks |= {"seed": n, "rows": 18 + n * 5 % 11, "columns": 12 + n * 3 % 7}
    return types.SimpleNamespace(**reading.picks)


def given(function: Callable) -> Callable:
    """Mark a function that the sheet gives to the student."""
    _readings[-1].given.append(function.__name__)
    return function


def task(
    *,
    minutes: int,
    points: Mapping[str, float],
    hint: str = "",
    example: str = "",
    **options: Any,
) -> Callable:
    """Mark a reference. `example` is shown with the reference's answer beside it."""
    said = {"minutes": minutes, "points": points, "hint": hint, "example": example}

    def mark(function: Callable) -> Callable:
        _readings[-1].tasks.append(
            (function, said | {"options": {"seed": _readings[-1].number} | options})
        )
        return function

    return mark


def homeworks() -> list[str]:
    """All homeworks, in the order of their numbers in the book."""
    found = {path.stem for path in SOURCES.glob("[a-z]*.py")}
    order = ("primer", *PARTS)
    return sorted(found, key=lambda k: (order.index(k) if k in order else 99, k))


def load(key: str, number: int = 0) -> Homework:
    """Read a homework for a student's number, 0 for the sheet that is for all.

    Raises:
        ValueError: no such homework, or a number outside of 0 to 10**9.
    """
    path = SOURCES / f"{key}.py"
    if not path.is_file():
        raise ValueError(f"key: got {key!r}, wanted one of {', '.join(homeworks())}")
    if not 0 <= number <= LARGEST:
        raise ValueError(f"number: got {number}, wanted 0 to {LARGEST}")
    text = path.read_text(encoding="utf-8")
    module = types.ModuleType(f"homework_{key}")
    module.__file__ = str(path)
    _readings.append(_Reading(number))
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    finally:
        reading = _readings.pop()
    parts = _Parts(text, reading.picks)
    space = vars(module)
    tasks = []
    for function, said in reading.tasks:
        name = function.__name__
        said["hint"] = parts.filled(said["hint"])
        if said["example"]:
            said["example"] = _shown(parts.filled(said["example"]), space)
        starter = parts.starter(name)
        question = parts.filled(inspect.cleandoc(function.__doc__ or ""))
        tasks.append(Task(name, function, question, parts.code(name), starter, **said))
    imports = parts.imports()
    setup = "\n\n\n".join([imports, *(parts.code(n, doc=True) for n in reading.given)])
    return Homework(
        key=key,
        title=space["TITLE"],
        objective=space["OBJECTIVE"],
        after=tuple(space["AFTER"]),
        number=number,
        opening=parts.filled(inspect.cleandoc(module.__doc__ or "")),
        setup=setup,
        tasks=tuple(tasks),
        picks=reading.picks,
    )


class _Parts:
    """The pieces of a source's text, with a student's values put in."""

    def __init__(self, text: str, picks: Mapping[str, Any]) -> None:
        self.lines, self.picks = text.splitlines(), picks
        self.nodes = ast.parse(text).body
        self.named = {n.name: n for n in self.nodes if hasattr(n, "name")}

    def filled(self, text: str) -> str:
        """Text with «name» replaced."""
        return re.sub(r"«(\w+)»", lambda m: _number(self.picks[m[1]]), text)

    def between(self, first: int, last: int) -> str:
        """Lines of code, with v.name replaced."""
        text = "\n".join(self.lines[first - 1 : last])
        return re.sub(r"\bv\.(\w+)", lambda m: _number(self.picks[m[1]]), text)

    def imports(self) -> str:
        kinds = (ast.Import, ast.ImportFrom)
        found = [n for n in self.nodes if isinstance(n, kinds)]
        ours = [n for n in found if getattr(n, "module", "") != "course"]
        return "\n".join(self.between(n.lineno, n.end_lineno) for n in ours)

    def code(self, name: str, *, doc: bool = False) -> str:
        """A function or class without what is above its name, and without the text."""
        node = self.named[name]
        first = node.body[0]
        if doc or not _is_text(first):
            return self.between(node.lineno, node.end_lineno)
        head = self.between(node.lineno, first.lineno - 1)
        return f"{head}\n{self.between(first.end_lineno + 1, node.end_lineno)}"

    def starter(self, name: str) -> str:
        """Heads only: of the function, or of the class and its methods."""
        node = self.named[name]
        if isinstance(node, ast.FunctionDef):
            return f"{self.head(node)}\n    raise NotImplementedError"
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        rest = [f"{self.head(n)}\n        raise NotImplementedError" for n in methods]
        return "\n\n".join([self.head(node), *rest])

    def head(self, node: Any) -> str:
        return self.between(node.lineno, node.body[0].lineno - 1)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _number(value: Any) -> str:
    return f"({value})" if value < 0 else str(value)


def _shown(example: str, space: dict[str, Any]) -> str:
    """An example with what the reference makes of it."""
    answer = eval(example, dict(space))
    if isinstance(answer, torch.Tensor):
        answer = (answer.detach().double().numpy().round(4) + 0.0).tolist()  # no -0.0
    elif isinstance(answer, float):
        answer = round(answer, 4)
    main = 'if __name__ == "__main__":  # not run for grading'
    return f"{main}\n    print({example})  # should be {answer}"


# --- sheets --------------------------------------------------------------------------


def points_of(task: Task) -> str:
    """Points by property, in words."""
    return ", ".join(f"{name} {value:g}" for name, value in task.points.items())


def sheet(homework: Homework) -> dict[str, Any]:
    """A notebook with nbgrader's marks (schema 3); others ignore them."""
    whose = f", sheet of number {homework.number}" if homework.number else ""
    after = ", ".join(f"`{chapter}`" for chapter in homework.after)
    head = (
        f"# {homework.title}\n\n{homework.of:g} points, about {homework.minutes} "
        f"minutes, after the chapters {after}{whose}.\n\n{homework.opening}\n\n{RULES}"
    )
    cells = [_cell("markdown", head), _cell("code", homework.setup)]
    for i, work in enumerate(homework.tasks, 1):
        title, _, question = work.question.partition("\n")
        text = f"## {i}. {title}\n\n{question.strip()}\n\n"
        text += f"*{work.of:g} points ({points_of(work)}), {work.minutes} minutes.*"
        if work.hint:
            hint = f"<details><summary>Hint</summary>\n\n{work.hint}\n\n</details>"
            text += f"\n\n{hint}"
        cells.append(_cell("markdown", text))
        cells.append(_cell("code", work.starter, solution=work.name))
        if work.example:
            cells.append(_cell("code", work.example))
        note = f"# {work.name}: {work.of:g} points, given outside of this notebook."
        cells.append(_cell("code", note, grade=work))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"homework": homework.key, "number": homework.number}
    for i, cell in enumerate(cells):
        cell["id"] = f"{homework.key}-{i}"
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "lowrank_ref": about},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(kind: str, source: str, *, solution: str = "", grade: Task | None = None):
    cell: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": source}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    if solution or grade:
        mark = {"schema_version": 3, "cell_type": kind, "task": False}
        mark |= {"grade": bool(grade), "locked": bool(grade), "solution": not grade}
        mark["grade_id"] = f"points-{grade.name}" if grade else f"work-{solution}"
        if grade:
            mark["points"] = grade.of
        cell["metadata"] = {"nbgrader": mark}
    return cell


def filled_in(homework: Homework, answers: Mapping[str, str]) -> dict[str, Any]:
    """A sheet in which a student wrote something under some tasks."""
    notebook = sheet(homework)
    for cell in notebook["cells"]:
        mark = cell["metadata"].get("nbgrader", {"solution": False})
        name = mark.get("grade_id", "").removeprefix("work-")
        if mark["solution"] and name in answers:
            cell["source"] = answers[name]
    return notebook


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


NBGRADER = '''"""Grade outside of the notebook. Use nbgrader as ever:

    nbgrader generate_assignment primer
    nbgrader autograde primer
    nbgrader generate_feedback primer
"""

import os
import sys

# nbgrader starts `alembic`, which lies beside it.
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
sys.path.insert(0, {tools!r})
from course_nbgrader import PREPROCESSORS  # noqa: E402

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "lowrank"
c.Autograde.autograde_preprocessors = PREPROCESSORS
c.GradeOutside.students = {students!r}
'''

OTTER_TEST = '''"""Points for {name}, by property."""

import sys

OK_FORMAT = False
sys.path.insert(0, "grading")

from otter.test_files import test_case  # noqa: E402

from course import lost  # noqa: E402

name = {name!r}
points = None

'''
OTTER_CASE = """
@test_case(points={points}, name="{task}: {name}")
def test_{function}():
    reason = lost({key!r}, {task!r}, {name!r})
    assert not reason, reason

"""


def otter(homework: Homework, folder: Path) -> None:
    """Tests and configuration for `otter generate`, and the archive if it is there."""
    for work in homework.tasks:
        text = OTTER_TEST.format(name=work.name)
        for name, points in work.points.items():
            text += OTTER_CASE.format(
                points=points,
                task=work.name,
                name=name,
                key=homework.key,
                function=name.replace(" ", "_"),
            )
        (folder / "tests").mkdir(parents=True, exist_ok=True)
        (folder / "tests" / f"{work.name}.py").write_text(text)
    grading = folder / "grading"
    (grading / "homeworks").mkdir(parents=True, exist_ok=True)
    (grading / "course.py").write_text(Path(__file__).read_text(encoding="utf-8"))
    source = (SOURCES / f"{homework.key}.py").read_text(encoding="utf-8")
    (grading / "homeworks" / f"{homework.key}.py").write_text(source)
    write_json(folder / "otter_config.json", {"show_stdout": True, "pdf": False})
    (folder / "requirements.txt").write_text("lowrank-ref[chapters]\n")


def make(students: Mapping[str, int], out: Path = OUT) -> None:
    """Write everything that a course needs below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "students.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "number"), *students.items()])
    for key in homeworks():
        common = load(key)
        write_json(out / "nbgrader" / "source" / key / f"{key}.ipynb", sheet(common))
        otter(common, out / "otter" / key)
        for name, number in students.items() or [("", 0)]:
            own = load(key, number)
            write_json(out / "sheets" / name / f"{key}.ipynb", sheet(own))
            solution = out / "solutions" / name / f"{key}.py"
            solution.parent.mkdir(parents=True, exist_ok=True)
            solution.write_text(own.solution, encoding="utf-8")
    places = {"tools": str(HERE), "students": str(out / "students.csv")}
    (out / "nbgrader" / "nbgrader_config.py").write_text(NBGRADER.format(**places))


# --- grading -------------------------------------------------------------------------


@dataclass(frozen=True)
class Graded:
    """One student's work on one homework."""

    homework: Homework
    reports: Mapping[str, GradeReport]

    @property
    def points(self) -> float:
        return sum(report.points for report in self.reports.values())

    def __str__(self) -> str:
        lines = []
        for name, report in self.reports.items():
            lines.append(f"{name} {report.points:g}/{report.of:g}")
            before = ""
            for row in report.rows:
                if row.points < row.of:
                    told = "as above" if row.reason == before else row.reason
                    lines.append(f"- {row.name} {row.points:g}/{row.of:g}: {told}")
                    before = row.reason
        return "\n".join(lines)


def graded(path: Path, key: str, number: int = 0, **options: Any) -> Graded:
    """Grade one file as one homework."""
    homework = load(key, number)
    reports: dict[str, GradeReport] = {}
    endless = ""
    for work in homework.tasks:
        if endless:
            rows = [PropertyPoints(n, 0, of, endless) for n, of in work.points.items()]
            reports[work.name] = GradeReport(tuple(rows))
            continue
        report = work.grade_file(path, **options)
        reports[work.name] = report
        reason = report.rows[0].reason
        endless = reason if reason.startswith("reading it had not ended") else ""
    return Graded(homework, reports)


_seen: dict[tuple[str, ...], GradeReport] = {}


def lost(key: str, task: str, name: str) -> str:
    """Why the only notebook (or .py file) of this folder lost a property; for otter."""
    path = next(iter([*Path().glob("*.ipynb"), *Path().glob("*.py")]))
    number = 0
    if path.suffix == ".ipynb":
        about = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        number = int(about.get("lowrank_ref", {}).get("number", 0))
    here = (str(path.resolve()), key, task)
    if here not in _seen:
        work = next(t for t in load(key, number).tasks if t.name == task)
        _seen[here] = work.grade_file(path)
    return _seen[here].lost.get(name, "")


def read_students(path: Path) -> dict[str, int]:
    """id -> number.

    Raises:
        ValueError: no columns id and number, an id or a number twice, no number.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"id", "number"} <= set(rows[0]):
        raise ValueError(f"{path}: got columns {[*rows[0]]}, wanted id and number")
    bad = [row for row in rows if not row["id"] or not (row["number"] or "").isdigit()]
    if bad:
        raise ValueError(f"{path}: got {bad[0]}, wanted an id and a whole number")
    found = {row["id"]: int(row["number"]) for row in rows}
    if len(found) < len(rows) or len(set(found.values())) < len(rows):
        raise ValueError(f"{path}: got an id or a number twice")
    return found


def _named(text: str, words: Iterable[str]) -> list[str]:
    """Those words that stand in a text, with no letter or digit beside them."""
    edge = r"(?<![A-Za-z0-9]){}(?![A-Za-z0-9])"
    return [w for w in words if re.search(edge.format(re.escape(w)), text)]


def whose(path: Path, students: Mapping[str, int]) -> tuple[str, int, str]:
    """Student, number and homework of a file, from its name and its folders.

    Raises:
        ValueError: the name does not tell.
    """
    text = "/".join([*path.parts[:-1], path.stem])

    # The file's own name counts first: a course's folder may be called as a homework.
    found = _named(path.stem, homeworks()) or _named(text, homeworks())
    if len(found) != 1:
        raise ValueError(
            f"name: got {text}, wanted one of {', '.join(homeworks())} in it"
        )
    if not students:
        rest = path.parent.name or path.stem.replace(found[0], "").strip("_- ")
        return rest or path.stem, 0, found[0]
    # Of "anna" and "anna.k" only one is meant by "anna.k/primer.py".
    owner = max(_named(text, students), key=len, default="")
    if not owner or _named(text.replace(owner, ""), students):
        raise ValueError(f"name: got {text}, wanted one id of students.csv in it")
    return owner, students[owner], found[0]


COLUMNS = ("file", "student", "number", "homework", "points", "of", "reasons")


def grade_folder(
    folder: Path, students: Mapping[str, int], **options: Any
) -> Iterator[dict[str, Any]]:
    """A row of `COLUMNS` for every notebook and .py file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".ipynb", ".py"))
    for path in files:
        inner = path.relative_to(folder)
        if any(part.startswith((".", "__")) for part in inner.parts):
            continue
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"file": inner.as_posix()}
        try:
            student, number, key = whose(inner, students)
        except ValueError as error:
            yield row | {"reasons": f"not graded: {error}"}
            continue
        done = graded(path, key, number, **options)
        yield row | {
            "student": student,
            "number": number,
            "homework": key,
            "points": f"{done.points:g}",
            "of": f"{done.homework.of:g}",
            "reasons": str(done),
        }


@contextmanager
def _table(path: Path) -> Iterator[csv.DictWriter]:
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # for Excel
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        yield writer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write sheets and all that grades them")
    making.add_argument("--numbers", help="students' numbers: 1-30 or 7,12,40")
    making.add_argument("--students", type=Path, help="a CSV with columns id, number")
    making.add_argument("--out", type=Path, default=OUT)
    grading = commands.add_parser("grade", help="grade a folder of handed-in work")
    grading.add_argument("folder", type=Path)
    grading.add_argument(
        "--students", type=Path, help="the CSV; default: what `make` was told last"
    )
    grading.add_argument("--out", type=Path, default=Path("grades.csv"))
    grading.add_argument("--seconds", type=float, default=2.0, help="for one call")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        if options.command == "make":
            _make(options)
        else:
            _grade(options)
    except ValueError as error:
        parser.error(str(error))
    return 0


def _make(options: argparse.Namespace) -> None:
    students: dict[str, int] = {}
    if options.students:
        students = read_students(options.students)
    elif options.numbers:
        for part in options.numbers.split(","):
            first, _, last = part.partition("-")
            if not first.isdigit() or not (last or first).isdigit():
                raise ValueError(
                    f"--numbers: got {part!r}, wanted such as 1-30 or 7,12"
                )
            numbers = range(int(first), int(last or first) + 1)
            students |= {str(n): n for n in numbers}
    make(students, options.out)
    sheets = len(list((options.out / "sheets").rglob("*.ipynb")))
    print(f"{len(homeworks())} homeworks, {sheets} sheets in {options.out}")


def _grade(options: argparse.Namespace) -> None:
    if not options.folder.is_dir():
        raise ValueError(f"folder: got {options.folder}, wanted a folder of work")
    told = options.students or OUT / "students.csv"
    if options.students and not told.is_file():
        raise ValueError(f"--students: got {told}, wanted a file")
    students = read_students(told) if told.is_file() else {}
    with _table(options.out) as table:
        for row in grade_folder(options.folder, students, seconds=options.seconds):
            table.writerow(row)
            points = f"{row['points'] or '-':>4} of {row['of'] or '-'}"
            print(f"{points}  {row['file']}", flush=True)
    print(f"points and reasons: {options.out}")


if __name__ == "__main__":
    from course import main as run  # the sources import `course`: one module, not two

    sys.exit(run())
