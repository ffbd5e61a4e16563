"""The homeworks: what they promise to a student and to a teacher, and every way to grade them."""

import json
import re

import course
import pytest
import yaml
from links import ROOT
from mutants import mutants

from lowrank_ref.core.registry import PARTS
from lowrank_ref.lab import grade as grading
from lowrank_ref.lab._differences import differences
from lowrank_ref.lab._submission import run

KEYS = course.homeworks()
NUMBERS = range(1, 31)
#: Mutants that are as right as the reference, with the reason: (homework, task) -> change -> why.
EQUIVALENT = {
    ("adapters", "stretched"): {
        "h + (h * h - a * b).sqrt() -> h - (h * h - a * b).sqrt()": "both roots of the quadratic are right",
    },
    ("analysis", "hidden"): {"return W -> return -W": "a sign changes no singular value and no rank"},
    ("primer", "report"): {"errors > 0.08 -> errors >= 0.08": "an error of exactly this size does not occur"},
}


class Trial:
    """Grades many attempts at one task, with inputs drawn once."""

    def __init__(self, task):
        self.task = task
        rest = {"given": None, "edges": (), "hints": None, "accept": None, "draws": 0} | task.options
        self.accept = rest["accept"]
        asked = (rest["given"], rest["edges"], None, rest["accept"], rest["draws"], rest["seed"], 1.0)
        self.trials, self.points = grading._planned(task.reference, task.points, *asked)

    def outcomes(self, others, source):
        """What the attempt does; `others` is what stands above it in the sheet."""
        space = {}
        exec(compile(f"{others}\n\n\n{source}", "attempt", "exec"), space)
        for job in grading._limited(self.trials, (), (), 1.0):
            outcome = run(space[self.task.name], job)
            yield outcome
            if outcome.get("late"):
                return

    def report(self, others, source):
        outcomes = list(self.outcomes(others, source))
        return grading._judged(self.trials, outcomes, self.points, {}, self.accept)

    def accepted(self, trial, outcome):
        try:
            return self.accept(outcome["result"], **trial.job["inputs"]) is True
        except Exception:  # another kind of thing, or another shape
            return False

    def passes(self, others, source):
        """As `report`, but the first wrong value ends it."""
        found = []
        for trial, outcome in zip(self.trials, self.outcomes(others, source)):
            found.append(outcome)
            if trial.group != "square":
                continue
            if "failed" in outcome or self.accept and not self.accepted(trial, outcome):
                return False
            kinds = differences(outcome["result"], trial.wanted["result"], "it")
            if not self.accept and any(kind != "dtype" for kind, _ in kinds):
                return False
        return not grading._judged(self.trials, found, self.points, {}, self.accept).lost


def chapters_of_toc():
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    return [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]


def test_there_is_one_for_the_primer_and_for_each_part():
    assert ["primer", *PARTS] == KEYS


@pytest.mark.parametrize("key", KEYS)
def test_a_homework_says_what_a_student_needs(key):
    homework = course.load(key, 17)
    assert homework.of == 20
    assert 3 <= len(homework.tasks) <= 4
    assert 60 <= homework.minutes <= 120
    assert homework.objective.endswith(".")
    for task in homework.tasks:
        assert task.hint, f"{task.name} has no hint"
        assert len(task.question.split()) > 25, f"{task.name} asks too little"
        assert not re.search(r"\bv\.", task.answer)
    assert "«" not in json.dumps(course.sheet(homework), ensure_ascii=False)


@pytest.mark.parametrize("key", KEYS)
def test_a_homework_needs_earlier_chapters_only(key):
    order = chapters_of_toc()
    homework = course.load(key)
    known = [c for c in order if c == key or c.startswith(f"{key}/")]
    assert set(homework.after) <= set(order[: order.index(known[-1]) + 1])
    assert set(homework.after) & set(known), "nothing of its own part"
    text = homework.opening + "".join(task.question + task.hint for task in homework.tasks)
    assert set(re.findall(r"`(\w+/\w+)`", text)) <= set(homework.after)
    # All that a solution imports comes with the sheet, and none of it is the package.
    assert "lowrank_ref" not in homework.solution


@pytest.mark.parametrize("key", KEYS)
def test_the_empty_sheet_earns_nothing_and_the_reference_everything(key):
    """For thirty numbers; equal tasks of several numbers are tried once."""
    tried = set()
    for number in NUMBERS:
        homework = course.load(key, number)
        for task in homework.tasks:
            own = task.answer + homework.setup * ("own_" in task.answer)
            if own in tried:
                continue
            tried.add(own)
            trial = Trial(task)
            assert trial.report(homework.solution, task.answer).lost == {}, (number, task.name)
            if number == 1:
                assert trial.report(homework.solution, task.starter).points == 0, task.name


@pytest.mark.parametrize("key", KEYS)
def test_neighbours_answers_fail(key):
    """The next number's sheet loses points here in two tasks or more; all thirty sheets differ."""
    sheets = {number: course.load(key, number) for number in NUMBERS}
    assert len({json.dumps(homework.picks) for homework in sheets.values()}) == len(sheets)
    assert len({homework.solution for homework in sheets.values()}) == len(sheets)
    known = {}
    for number in NUMBERS[:-1]:
        mine, other = sheets[number], sheets[number + 1]
        lost = 0
        for task, theirs in zip(mine.tasks, other.tasks):
            pair = (task.answer, theirs.answer)
            if lost >= 2 or "own_" not in task.answer and task.answer == theirs.answer:
                continue
            if "own_" in task.answer or pair not in known:
                known[pair] = not Trial(task).passes(other.solution, theirs.answer)
            lost += known[pair]
        assert lost >= 2, number


@pytest.mark.parametrize("key", KEYS)
def test_small_faults_in_the_reference_cost_points(key):
    homework = course.load(key, 3)
    tried, passed = 0, []
    for task in homework.tasks:
        trial = Trial(task)
        reasons = EQUIVALENT.get((key, task.name), {})
        for change, source in mutants(task.answer, gradient="gradient" in task.points):
            if change.partition(": ")[2] in reasons:
                continue
            tried += 1
            if trial.passes(homework.solution, source):
                passed.append(f"{task.name}: {change}")
    assert tried > 60
    assert len(passed) <= 0.05 * tried, "\n".join(passed)
