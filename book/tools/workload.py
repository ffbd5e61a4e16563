"""What ten weeks with the book take: minutes and points, from the chapters themselves.

python book/tools/workload.py  a line for each week

Reading is counted by reading_time.py, unfolded. Minutes and points of exercises stand
in book/course/exercises.yml, the plan of the weeks in book/course/weeks.yml.
"""

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml

import reading_time
from kernel_notebooks import title
from links import ROOT
from lowrank_ref.core.registry import papers

BOOK = ROOT / "book"
TASK = re.compile(
    r"^(:{3,})\{exercise\}[^\S\n]*(?P<kind>[^\n]*)\n(?P<text>.*?)^\1[^\S\n]*$",
    re.S | re.M,
)
LABEL = re.compile(r"^:label:\s*(\S+)", re.M)
#: What an exercise asks for. Its title says it, or its first words.
KINDS = ("Compute", "Prove", "Break it")


@dataclass(frozen=True)
class Exercise:
    """One exercise, and what it earns: points with what earns them."""

    label: str
    kind: str
    minutes: int
    rubric: tuple[tuple[int, str], ...]

    @property
    def points(self) -> int:
        return sum(points for points, _ in self.rubric)


@dataclass(frozen=True)
class Chapter:
    """A page of a week, with its minutes of reading and its exercises."""

    page: str
    title: str
    reading: int
    exercises: tuple[Exercise, ...]
    needs: tuple[str, ...]

    @property
    def minutes(self) -> int:
        """Of the exercises alone."""
        return sum(exercise.minutes for exercise in self.exercises)

    @property
    def points(self) -> int:
        return sum(exercise.points for exercise in self.exercises)


@dataclass(frozen=True)
class Week:
    """What is read by all, of what one chapter is chosen, and the homework."""

    number: int
    title: str
    goals: tuple[str, ...]
    read: tuple[Chapter, ...]
    choose: tuple[Chapter, ...]
    homework: dict[str, str | int]

    @property
    def minutes(self) -> int:
        """Reading, exercises and homework, without the chapter that is chosen."""
        pages = sum(chapter.reading + chapter.minutes for chapter in self.read)
        return pages + int(self.homework.get("minutes", 0))

    @property
    def chosen(self) -> tuple[int, int]:
        """Least and most minutes of reading the chapter that is chosen."""
        spent = [chapter.reading for chapter in self.choose] or [0]
        return min(spent), max(spent)

    @property
    def points(self) -> int:
        return sum(chapter.points for chapter in self.read)


def labelled(book: Path, page: str) -> dict[str, str]:
    """Label -> kind of each exercise of a page, in order."""
    path, found = book / f"{page}.ipynb", {}
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for task in TASK.finditer(text):
        said = LABEL.sub("", task["text"], count=1)
        first = re.search(r"\*([^*.]+)\.?\*", said)
        kind = task["kind"].strip() or (first[1] if first else "")
        label = LABEL.search(task["text"])
        if label is None or kind not in KINDS:
            raise ValueError(f"{page}: wanted a label and one of {KINDS}: {task[0]}")
        found[label[1]] = kind
    return found


def graded(book: Path) -> dict[str, tuple[int, tuple[tuple[int, str], ...]]]:
    """Label -> minutes and rubric, from exercises.yml."""
    stored = yaml.safe_load((book / "course" / "exercises.yml").read_text("utf-8"))
    out = {}
    for label, entry in stored.items():
        lines = [line.partition(" ") for line in entry["rubric"]]
        rubric = tuple((int(points), text) for points, _, text in lines)
        out[label] = (int(entry["minutes"]), rubric)
    return out


def chapter(book: Path, page: str, grades: dict | None = None) -> Chapter:
    """A page with its minutes.

    Raises:
        ValueError: an exercise without minutes and rubric.
    """
    grades = graded(book) if grades is None else grades
    labels = labelled(book, page)
    if missing := [label for label in labels if label not in grades]:
        raise ValueError(f"course/exercises.yml: wanted rows for {missing} of {page}")
    notebook = nbformat.read(book / f"{page}.ipynb", as_version=4)
    paper = papers().get(page.rpartition("/")[2])
    exercises = (
        Exercise(label, kind, *grades[label]) for label, kind in labels.items()
    )
    return Chapter(
        page,
        paper.name if paper else title(book, page),
        reading_time.minutes(notebook)[0],
        tuple(exercises),
        paper.needs if paper else (),
    )


def homework(planned: dict, folder: Path = BOOK / "course" / "homeworks") -> dict:
    """A homework of the plan; title, minutes and points from its source, if there.

    Of the source only literals are read: `TITLE`, and what each `task` is called with.
    """
    path = folder / f"{planned.get('key')}.py"
    if not path.exists():
        return planned
    tree, found = ast.parse(path.read_text("utf-8")), {"minutes": 0, "points": 0}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TITLE":
            found["title"] = ast.literal_eval(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "task":
            said = {word.arg: word.value for word in node.keywords}
            found["minutes"] += ast.literal_eval(said["minutes"])
            found["points"] += sum(ast.literal_eval(said["points"]).values())
    return planned | found


@functools.cache  # a build asks for each week
def weeks(book: Path = BOOK) -> list[Week]:
    """The plan, with what each chapter takes."""
    plan = yaml.safe_load((book / "course" / "weeks.yml").read_text("utf-8"))
    grades = graded(book)

    def pages(names: list[str]) -> tuple[Chapter, ...]:
        return tuple(chapter(book, name, grades) for name in names)

    return [
        Week(
            number,
            entry["title"],
            tuple(entry["goals"]),
            pages(entry["read"]),
            pages(entry.get("choose", [])),
            homework(entry.get("homework", {})),
        )
        for number, entry in enumerate(plan, start=1)
    ]


def hours(minutes: int) -> str:
    """Such as "4.5 h", to the half hour."""
    return f"{round(minutes / 30) / 2:g} h"


if __name__ == "__main__":
    for week in weeks():
        told = f"{hours(week.minutes)}, {week.points} points in exercises"
        print(f"{week.number:>2}  {week.title:<50} {told}")
