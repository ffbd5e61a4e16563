"""The tables of the syllabus, from the chapters, their cards and the plan of the weeks.

`{weeks}`: all in one table. `{week} 3`: goals and chapters of one week. `{exercises}`:
minutes, points and rubric of every exercise.
"""

import re
import sys
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from chapter_header import timing
from lowrank_ref.core.registry import papers
from registry_pages import table

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import workload
from workload import Chapter, Week, hours


def anchor(page: str, text: str, fragment: str = "") -> str:
    """A link from a page of the folder course/."""
    return f'<a href="../{page}.html{fragment}">{escape(text)}</a>'


def overview(book: Path, weeks: list[Week]) -> str:
    """One line a week."""
    rows = []
    for week in weeks:
        fragment = "#" + nodes.make_id(f"Week {week.number}: {week.title}")
        homework = week.homework
        sheet = ""
        if homework:
            sheet = f"{escape(homework['title'])}, {homework['points']} points"
        rows.append(
            [
                f'{week.number}. <a href="{fragment}">{escape(week.title)}</a>',
                ", ".join(anchor(c.page, c.title) for c in week.read),
                hours(week.minutes),
                f"{week.points} points",
                sheet,
            ]
        )
    total = sum(week.minutes for week in weeks)
    sheets = sum(int(week.homework.get("points", 0)) for week in weeks)
    points = sum(week.points for week in weeks)
    rows.append(["all", "", hours(total), f"{points} points", f"{sheets} points"])
    header = ["week", "read by all", "work", "exercises", "homework"]
    return table(header, rows, "The ten weeks")


def before(chapter: Chapter) -> str:
    """What the chapter's card wants to have been read."""
    cards = papers()
    named = [
        anchor(f"{cards[key].part}/{key}", cards[key].name)
        if key in cards
        else anchor(key, key)
        for key in chapter.needs
    ]
    return ", ".join(named) or "nothing"


def one_week(book: Path, week: Week) -> str:
    """Goals, chapters with their minutes, and the sum."""
    goals = "".join(f"<li>{escape(goal)}</li>" for goal in week.goals)
    text = f"<p>After this week you can</p><ul>{goals}</ul>"
    rows = []
    for chosen, chapters in ((False, week.read), (True, week.choose)):
        for chapter in chapters:
            took = timing(book, chapter.page)
            rows.append(
                [
                    ("choice: " if chosen else "")
                    + anchor(chapter.page, chapter.title),
                    before(chapter),
                    f"{chapter.reading} min",
                    f"{took['seconds']} s" if took else "",
                    f"{chapter.minutes} min" if chapter.exercises else "",
                    f"{chapter.points} points" if chapter.exercises else "",
                ]
            )
    header = ["chapter", "read before", "reading", "runs in", "exercises", "points"]
    text += table(header, rows, f"Week {week.number}")
    return text + f"<p>{escape(told(week))}</p>"


def told(week: Week) -> str:
    """The week in a sentence."""
    homework, parts = week.homework, [f"Work: {hours(week.minutes)}"]
    if homework:
        parts.append(
            f"of it {homework['minutes']} minutes for the homework "
            f"“{homework['title']}” ({homework['points']} points)"
        )
    if week.choose:
        least, most = week.chosen
        span = str(least) if least == most else f"{least} to {most}"
        parts.append(f"and {span} minutes to read a chapter of choice")
    return ", ".join(parts) + "."


def coded(text: str) -> str:
    """Text with `code` between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def rubrics(book: Path, weeks: list[Week]) -> str:
    """A table of exercises for each week."""
    text = ""
    for week in weeks:
        rows = []
        for chapter in (*week.read, *week.choose):
            for exercise in chapter.exercises:
                lines = "".join(
                    f"<li><b>{points}</b> {coded(earned)}</li>"
                    for points, earned in exercise.rubric
                )
                rows.append(
                    [
                        anchor(chapter.page, chapter.title),
                        anchor(chapter.page, exercise.label, f"#{exercise.label}"),
                        exercise.kind,
                        f"{exercise.minutes} min",
                        f"{exercise.points} points",
                        f'<ul class="lr-rubric">{lines}</ul>',
                    ]
                )
        if rows:
            name = f"Exercises of week {week.number}"
            header = ["chapter", "exercise", "asks to", "minutes", "points", "rubric"]
            text += f"<h4>{name}</h4>" + table(header, rows, name)
    return text


class _Course(SphinxDirective):
    """HTML made from the plan of the weeks."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        book = Path(self.env.srcdir)
        self.env.note_reread()  # it depends on all chapters
        weeks = workload.weeks(book)
        if self.name == "week":
            made = one_week(book, weeks[int(self.arguments[0]) - 1])
        else:
            made = (overview if self.name == "weeks" else rubrics)(book, weeks)
        return [nodes.raw("", made, format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    for name in ("weeks", "week", "exercises"):
        app.add_directive(name, _Course)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
