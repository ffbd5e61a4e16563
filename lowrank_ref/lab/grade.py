"""Points for a student's work, by property, with the reason for every point that is lost.

    report = grade(my_delta_weight, lora.delta_weight, given={"scale": [0.5, 2.0]})
    print(report)      # a table
    report.require()   # in a test cell: an AssertionError with the table, unless every point was earned

`grade` runs the work in this process: fine for one's own notebook. `grade_file` runs a student's file in a process of
its own and compares here, so that nothing the file does to Python, PyTorch or this module changes a point. It is no
sandbox: what the file does to the disk, it does.
"""

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_ref.core.checks import check_integer, check_names, check_number
from lowrank_ref.lab._judge import Accept, Judge, told
from lowrank_ref.lab._submission import Job, leaves, run, run_file
from lowrank_ref.lab._trials import ModuleTrials, OptimizerTrials, Trial, Trials

__all__ = ["GradeReport", "PropertyPoints", "grade", "grade_file"]

#: Points of the properties where a teacher names none; those that a reference does not have are left out.
POINTS = {"value": 4, "gradient": 2, "state": 2, "generator": 2, "shapes": 1, "dtype": 1, "inputs": 1, "edge cases": 1}


@dataclass(frozen=True)
class PropertyPoints:
    """What one property earned, and why not more.

    Example:
        >>> from lowrank_ref.lab.grade import PropertyPoints
        >>> PropertyPoints("value", 0, 4, "the result is off by 1").reason
        'the result is off by 1'
    """

    name: str
    points: float
    of: float
    reason: str = ""


@dataclass(frozen=True, repr=False)
class GradeReport:
    """Points by property; its text is a table. It has no truth value: `require` says whether the work passes.

    Example:
        >>> from lowrank_ref.lab.grade import GradeReport, PropertyPoints
        >>> print(GradeReport((PropertyPoints("value", 4, 4), PropertyPoints("dtype", 0, 1, "it is float32"))))
        value   4 / 4
        dtype   0 / 1   it is float32
        total   4 / 5
    """

    rows: tuple[PropertyPoints, ...]

    @property
    def points(self) -> float:
        """Points earned."""
        return sum(row.points for row in self.rows)

    @property
    def of(self) -> float:
        """Points that can be earned."""
        return sum(row.of for row in self.rows)

    @property
    def lost(self) -> dict[str, str]:
        """Property -> reason, of all that lost points."""
        return {row.name: row.reason for row in self.rows if row.points < row.of}

    def require(self, share: float = 1.0) -> None:
        """Raise an AssertionError with the table unless this share of the points, in [0, 1], was earned.

        Raises:
            TypeError, ValueError: share is no number in [0, 1].
        """
        check_number("share", share, low=0, high=1)
        if self.points < share * self.of - 1e-9:
            raise AssertionError(f"{self.points:g} of {self.of:g} points\n{self}")

    def __bool__(self) -> bool:
        raise TypeError("a report has no truth value: use .require(), or .points and .of")

    def __repr__(self) -> str:
        rows = [*self.rows, PropertyPoints("total", self.points, self.of)]
        width = max(len(row.name) for row in rows)
        points = max(len(f"{row.points:g}") for row in rows)
        most = max(len(f"{row.of:g}") for row in rows)
        told = [
            "as above" if r.reason and i and r.reason == rows[i - 1].reason else r.reason for i, r in enumerate(rows)
        ]
        lines = (f"{r.name:<{width}}   {r.points:>{points}g} / {r.of:<{most}g}   {t}" for r, t in zip(rows, told))
        return "\n".join(line.rstrip() for line in lines)


def grade(
    student: Callable,
    reference: Callable,
    *,
    points: Mapping[str, float] | None = None,
    given: Mapping[str, Sequence[Any] | Callable] | None = None,
    edges: Sequence[Mapping[str, Any]] = (),
    hints: Mapping[str, str] | None = None,
    accept: Accept | None = None,
    draws: int = 0,
    forbid: Sequence[str] = ("lowrank_ref",),
    allow: Sequence[str] = (),
    seed: int = 0,
    seconds: float = 5.0,
) -> GradeReport:
    """Try a function, a layer or an optimizer beside its reference, and give points by property.

    | property   | earned by                                                                                 |
    |------------|-------------------------------------------------------------------------------------------|
    | value      | right numbers in float64 where all sizes but a rank are alike                             |
    | gradient   | the reference's gradients; of a layer, also which parameters train                        |
    | state      | layer: state dict, zeros it starts with, no stale copy; optimizer: later steps, resuming   |
    | generator  | a random function draws from its generator and nothing else                               |
    | shapes     | results of the right shape, and right, for all other sizes                                |
    | dtype      | the reference's dtypes, in float64 and float32                                            |
    | inputs     | arguments afterwards as after the reference: unchanged, or changed in the same way        |
    | edge cases | sizes of 1, zeros, transposed memory, `edges`; where the reference raises, the same error |

    A property is tried where the others do not matter, so that a fault costs what it spoils and no more. Everything is
    lost by a work that never runs or returns another kind of thing; that calls a forbidden function; or whose numbers
    are wrong without depending on all tensors that the reference depends on.

    Inputs are drawn as in `check.check`. A layer (a subclass of `nn.Module`) is built from what `given` holds for its
    constructor and called on what `forward` is annotated with. An optimizer gets two matrices and `given`.

    Args:
        student: the work; arguments by position where the reference allows it.
        reference: annotated with jaxtyping where tensors are drawn.
        points: property -> points above 0. Default: value 4, gradient, state and generator 2, others 1, where there.
        given: argument -> values to choose from, or a function of letters of the shapes, for example
            {"base": lambda m, n: nn.Linear(n, m, dtype=torch.float64), "rank": [2]}.
        edges: more edge cases, each argument -> value, the other arguments as drawn.
        hints: property -> what to tell a student who lost it.
        accept: of a random function: called with the result and all arguments by name; True or "" if this may be a
            draw, else False or a reason.
        draws: of a random function: how many draws to compare with as many of the reference, by mean and mean square
            of every entry, to six standard errors; 0 for none. Either of the two makes the function a random one.
        forbid: modules of which no function may be called.
        allow: modules inside of these that may be.
        seed: which inputs.
        seconds: longest time for one call, above 0; kept as `check.check` keeps it. In `grade_file` a process that does
            not keep it is ended, and reading the file may take twenty times as long.

    Raises:
        ValueError: an unknown property or one that this reference does not have; no time; what `check.check` raises.
        TypeError: a number that is none.

    Example:
        >>> from lowrank_ref.adapters.lora import delta_weight
        >>> from lowrank_ref.lab.grade import grade
        >>> report = grade(lambda A, B, scale: scale * (B.detach() @ A), delta_weight, given={"scale": [0.5]})
        >>> report.points, report.of, list(report.lost)
        (8, 10, ['gradient'])
    """
    trials, points = _planned(reference, points, given, edges, hints, accept, draws, seed, seconds)
    outcomes: list[Job] = []
    for job in _limited(trials, forbid, allow, seconds):
        outcomes.append(run(student, job))
        if outcomes[-1].get("late"):
            break
    return _judged(trials, outcomes, points, hints or {}, accept)


def grade_file(
    path: str | Path,
    name: str,
    reference: Callable,
    *,
    points: Mapping[str, float] | None = None,
    given: Mapping[str, Sequence[Any] | Callable] | None = None,
    edges: Sequence[Mapping[str, Any]] = (),
    hints: Mapping[str, str] | None = None,
    accept: Accept | None = None,
    draws: int = 0,
    forbid: Sequence[str] = ("lowrank_ref",),
    allow: Sequence[str] = (),
    seed: int = 0,
    seconds: float = 5.0,
) -> GradeReport:
    """Grade what a student's file defines as `name`, as `grade` does, in a process of its own that is always ended.

    Only tensors, numbers and text come back from there; they are compared here. Where the system can fork, all files
    are children of one process that has loaded PyTorch once.

    Args:
        path: a .py file, or an .ipynb, whose code cells run one after the other; a cell that raises does not stop it.
        name: of the function or class.
        reference: as in `grade`, like all other arguments.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: as `grade`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lowrank_ref.adapters.lora import delta_weight
        >>> from lowrank_ref.lab.grade import grade_file
        >>> file = Path(tempfile.mkdtemp()) / "work.py"
        >>> _ = file.write_text("def delta(A, B, scale):\\n    return B @ A * scale")
        >>> grade_file(file, "delta", delta_weight, given={"scale": [0.5]}).points
        10
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"path: got {path}, wanted a file")
    trials, points = _planned(reference, points, given, edges, hints, accept, draws, seed, seconds)
    jobs = _limited(trials, forbid, allow, seconds)
    # The first step of any optimizer imports this, for longer than a call may take.
    first = "torch._dynamo" if trials[0].job["kind"] == "optimizer" else "torch"
    order = {"path": str(path), "name": name, "jobs": jobs, "forbid": list(forbid), "seconds": seconds}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        torch.save(order, Path(folder) / "job.pt")
        by_itself = run_file(folder, seconds, len(jobs), first)
        found = (_read(Path(folder) / f"{i}.pt") for i in range(len(jobs)))
        outcomes = list(itertools.takewhile(bool, found))
    if len(outcomes) < len(jobs) and not any(outcome.get("late") for outcome in outcomes):
        failed = "it ended its process" if by_itself else f"it had not ended after {seconds:g} seconds, and was ended"
        outcomes.append({"failed": failed, "late": True})
    return _judged(trials, outcomes, points, hints or {}, accept)


# --- inside -----------------------------------------------------------------------------------------------------------


def _read(file: Path) -> Job:
    """Return an outcome, or {} where there is none that could be one."""
    try:
        outcome = torch.load(file, weights_only=True)
    except Exception:  # missing, or not written by us
        return {}
    return outcome if isinstance(outcome, dict) else {}


def _limited(trials: Sequence[Trial], forbid: Sequence[str], allow: Sequence[str], seconds: float) -> list[Job]:
    """Return what a student's work is given, with what it may not do."""
    return [trial.job | {"forbid": forbid, "allow": allow, "seconds": seconds} for trial in trials]


def _planned(
    reference: Callable,
    points: Mapping[str, float] | None,
    given: Mapping[str, Any] | None,
    edges: Sequence[Mapping[str, Any]],
    hints: Mapping[str, str] | None,
    accept: Accept | None,
    draws: int,
    seed: int,
    seconds: float,
) -> tuple[list[Trial], dict[str, float]]:
    """Return what to try, and the points of the properties that this reference has."""
    check_number("seconds", seconds, low=0, open_low=True)
    check_integer("draws", draws, low=0)
    check_names("hints", hints or {}, POINTS)
    check_names("points", points or {}, POINTS)
    for name, value in (points or {}).items():
        check_number(f"points[{name!r}]", value, low=0, open_low=True)
    kind: type[Trials] = Trials
    if isinstance(reference, type) and issubclass(reference, torch.nn.Module):
        kind = ModuleTrials
    elif isinstance(reference, type) and issubclass(reference, torch.optim.Optimizer):
        kind = OptimizerTrials
    is_random = accept is not None or draws > 0
    trials = kind(reference, given or {}, seed, edges=edges, draws=draws, random=is_random).all()
    groups = {trial.group for trial in trials}
    has = {
        "value": True,
        "gradient": "gradient" in groups,
        "state": kind is not Trials,
        "generator": "same" in groups,
        "shapes": "general" in groups,
        "dtype": "dtype" in groups,
        "inputs": kind is OptimizerTrials or any(True for t in trials[:1] for _ in leaves(t.job["inputs"])),
        "edge cases": "edge" in groups,
    }
    if missing := [name for name in points or {} if not has[name]]:
        there = [name for name in has if has[name]]
        raise ValueError(f"points: got {missing}, which this reference does not have, wanted some of {there}")
    return trials, dict(points or {name: value for name, value in POINTS.items() if has[name]})


def _judged(
    trials: Sequence[Trial],
    outcomes: Sequence[Job],
    points: Mapping[str, float],
    hints: Mapping[str, str],
    accept: Accept | None,
) -> GradeReport:
    judge = Judge(trials, outcomes, accept)
    everything = told(judge.everything)
    rows = []
    for name, value in points.items():
        reason = everything or told(getattr(judge, name.replace(" ", "_")))
        if reason and name in hints:
            reason += f". Hint: {hints[name]}"
        rows.append(PropertyPoints(name, 0 if reason else value, value, reason))
    return GradeReport(tuple(rows))
