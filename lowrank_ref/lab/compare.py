"""Fair comparisons: every arm declared, at its own best learning rate, several seeds, paired differences.

    arms = {"LoRA": Arm("A and B of all layers", steps=200), "full": Arm("all weights", steps=200)}
    lrs = {"LoRA": (0.01, 0.03, 0.1), "full": (0.001, 0.003, 0.01)}
    result = compare(run, arms, lrs=lrs, seeds=range(5), metric="valid loss")
    result.table({"loss": 3, "accuracy": 3})
    result.differences("LoRA", "full")           # in what the two arms differ
    result.paired("LoRA", "full", "loss")        # the difference seed by seed, with a 95 % interval

`run(method, lr, seed)` trains once and returns its numbers: among them the one by which the rate is chosen, measured on
validation data, and those that are reported, on test data. The runs go to a few processes with one thread each.
"""

import json
import math
import os
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lowrank_ref.lab._tools import need, numbers, progress_bar
from lowrank_ref.lab.draw.table import Table

__all__ = ["Arm", "Best", "Comparison", "Paired", "compare"]

Run = Callable[[str, float, int], Mapping[str, float]]


@dataclass(frozen=True)
class Arm:
    """What one arm of a comparison is: whatever could make it differ from another one.

    Attributes:
        trains: what trains, in words, such as "A and B of all layers; embeddings and head frozen".
        steps: optimizer steps.
        facts: name -> fact in which arms may differ: {"inner norms": "yes", "start": "pretrained"}. A fact that an arm
            does not name counts as "-".
        numbers: count of trained numbers; None takes "trainable" from the runs.
        state_bytes: bytes of training state; None takes "state bytes" from the runs.

    Raises:
        ValueError: trains is empty, steps no whole number >= 0, or a fact named like what every arm tells.
    """

    trains: str
    steps: int
    facts: Mapping[str, object] = field(default_factory=dict)
    numbers: int | None = None
    state_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.trains.strip():
            raise ValueError(f"trains: got {self.trains!r}, wanted words")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"steps: got {self.steps!r}, wanted a whole number of optimizer steps")
        if strangers := {"trains", "steps", *MEASURED} & set(self.facts):
            raise ValueError(f"facts: got {sorted(strangers)}, which every arm tells anyway, wanted other names")


#: What a comparison counts for every arm; two arms may differ in it without being declared to.
MEASURED = ("trained numbers", "bytes of state", "rates tried", "seeds")


def compare(
    run: Run,
    arms: Mapping[str, Arm] | Sequence[str],
    *,
    lrs: Sequence[float] | Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    metric: str = "loss",
    maximize: bool = False,
    store: str | os.PathLike | None = None,
    version: str = "1",
    workers: int = 2,
    progress: bool | None = None,
) -> "Comparison":
    """Run every method at every learning rate with every seed.

    A run that raises FloatingPointError, ValueError or a LinAlgError counts as diverged: it stays in the rows with its
    message and is worse than any number. Any other exception ends the comparison.

    Args:
        run: (method, lr, seed) -> named numbers, `metric` among them. May be defined in a notebook.
        arms: names handed to `run`, in the order of the table, each with what it is. Names alone can be run and shown,
            but no claim can rest on them.
        lrs: the grid of learning rates, the same for all arms or one per arm.
        seeds: seeds, at least one; three or more show a spread.
        metric: the number by which an arm's learning rate is chosen: one of validation data.
        maximize: whether more of it is better.
        store: JSON-lines file; runs found there are not run again, so a comparison can be interrupted.
        version: part of a stored run's identity: change it when `run` changes.
        workers: processes; 1 runs everything here.
        progress: True or False; None shows a bar unless LOWRANK_PROGRESS=0.

    Raises:
        ValueError: nothing to run, an arm without a grid or a grid without an arm, `metric` missing from a result, a
            store that holds anything but stored runs (it is left as it is), or an arm of which no run came to an end.
    """
    methods = list(arms)
    grid = {method: tuple(lrs.get(method, ()) if isinstance(lrs, Mapping) else lrs) for method in methods}
    if not grid or not len(seeds) or not all(grid.values()):
        raise ValueError(f"arms, lrs, seeds: got {grid}, seeds {list(seeds)}, wanted at least one of each")
    if isinstance(lrs, Mapping) and (strangers := set(lrs) - set(methods)):
        raise ValueError(f"lrs: got grids for {sorted(strangers)}, wanted arms: {', '.join(methods)}")
    if workers < 1:
        raise ValueError(f"workers: got {workers}, wanted at least 1")
    path = Path(store) if store is not None else None
    done = _read(path, version) if path is not None else {}
    wanted = [(method, float(lr), int(seed)) for method in methods for lr in grid[method] for seed in seeds]
    missing = [key for key in dict.fromkeys(wanted) if key not in done]

    for key, row in progress_bar(_run_all(run, missing, workers), total=len(missing), label="runs", show=progress):
        if "error" not in row and metric not in row:
            raise ValueError(f"metric: got {metric!r}, wanted one of the numbers that run returns: {sorted(row)}")
        done[key] = row
        if path is not None:
            with open(path, "a", encoding="utf-8") as file:  # one line per run, at once: an interrupt loses nothing
                file.write(json.dumps({"version": version, "key": key, "row": row}) + "\n")
    rows = [{"method": m, "lr": lr, "seed": seed, **done[m, lr, seed]} for m, lr, seed in wanted]
    return Comparison(rows, grid, metric, maximize, dict(arms) if isinstance(arms, Mapping) else {})


@dataclass(frozen=True)
class Best:
    """An arm at its best learning rate.

    `edge` is "lowest" or "highest" where that is the end of a grid of several rates (then try further), else "".
    """

    lr: float
    mean: float
    sd: float
    seeds: int
    edge: str


@dataclass(frozen=True)
class Paired:
    """The difference of two arms, seed by seed: `differences` is a minus b, `low` to `high` its mean's 95 % interval.

    The interval is Student's, from the differences of the seeds that both arms ran.
    """

    a: str
    b: str
    metric: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    low: float
    high: float

    def __repr__(self) -> str:
        each = ", ".join(f"{d:+.3g}" for d in self.differences)
        return (
            f"{self.metric}, {self.a} - {self.b}: {self.mean:+.3g} "
            f"(95 %: {self.low:+.3g} to {self.high:+.3g}, {len(self.seeds)} seeds: {each})"
        )


@dataclass(frozen=True)
class Comparison:
    """The runs: `rows` holds one dict per run (method, lr, seed, its numbers, or an "error").

    Raises:
        ValueError: a method of the grid has no run with a finite metric.
    """

    rows: list[dict[str, Any]]
    grid: dict[str, tuple[float, ...]]
    metric: str
    maximize: bool = False
    arms: dict[str, Arm] = field(default_factory=dict)

    def __post_init__(self):
        for method in self.grid:
            rows = [row for row in self.rows if row["method"] == method]
            if not any(math.isfinite(row.get(self.metric, math.nan)) for row in rows):
                error = next((row["error"] for row in rows if "error" in row), f"no finite {self.metric}")
                raise ValueError(f"arms: got no finite run of {method!r}: {error}")

    @classmethod
    def stored(
        cls, rows: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm], *, metric: str, maximize: bool = False
    ) -> "Comparison":
        """Make a comparison of runs that were measured elsewhere, such as the "rows" of a results file.

        Args:
            rows: each with method, lr, seed and its numbers.
            arms: every method in the rows, in the order of the table: a row cannot be left out by forgetting its arm.
            metric: the number by which an arm's rate was chosen.
            maximize: whether more of it is better.

        Raises:
            ValueError: rows without an arm, or arms without a row.
        """
        found = {row["method"] for row in rows}
        if found != set(arms):
            raise ValueError(f"arms: got {sorted(arms)}, wanted the methods of the rows: {sorted(found)}")
        grid = {arm: tuple(sorted({float(row["lr"]) for row in rows if row["method"] == arm})) for arm in arms}
        return cls([dict(row) for row in rows], grid, metric, maximize, dict(arms))

    @cached_property
    def _known(self) -> set[str]:
        return {name for row in self.rows for name in row} - {"method", "lr", "seed", "error"}

    @cached_property
    def _runs(self) -> dict[tuple[str, float], list[dict[str, Any]]]:
        """(method, lr) -> its rows: claims over thousands of stored rows ask for them again and again."""
        found: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault((row["method"], row["lr"]), []).append(row)
        return found

    def by_seed(self, method: str, lr: float, metric: str | None = None) -> dict[int, float]:
        """Return seed -> number; a diverged run is infinitely bad, a run that did not record it is left out.

        Raises:
            ValueError: no run recorded this metric.
        """
        metric = metric or self.metric
        if metric not in self._known:
            raise ValueError(f"metric: got {metric!r}, wanted one of {sorted(self._known)}")
        worst = -math.inf if self.maximize else math.inf
        rows = self._runs.get((method, lr), [])
        found = {row["seed"]: row.get(metric, math.nan) for row in rows if metric in row or "error" in row}
        return {seed: worst if math.isnan(value) else value for seed, value in found.items()}

    def values(self, method: str, lr: float, metric: str | None = None) -> list[float]:
        """Return one number per seed; a diverged run is infinitely bad."""
        return list(self.by_seed(method, lr, metric).values())

    def sweep(self, method: str, metric: str | None = None) -> dict[float, tuple[float, float]]:
        """Return learning rate -> (mean, standard deviation over seeds), in the order of the grid."""
        return {lr: _mean_sd(self.values(method, lr, metric)) for lr in self.grid[method]}

    def _means(self, method: str) -> dict[float, float]:
        """Learning rate -> mean of the choosing number, over the seeds that every rate has."""
        runs = {lr: self.by_seed(method, lr) for lr in self.grid[method]}
        common = set.intersection(*map(set, runs.values()))
        if not common:
            raise ValueError(f"rows: got no seed that {method!r} ran at all rates, wanted at least one to choose by")
        return {lr: _mean_sd([run[seed] for seed in sorted(common)])[0] for lr, run in runs.items()}

    def best(self) -> dict[str, Best]:
        """Return every arm at the learning rate with the best mean; the earlier one of a tie."""
        return dict(self._best)

    @cached_property
    def _best(self) -> dict[str, Best]:
        """Chosen once: a table or a claim asks for it many times."""
        best = {}
        for method, grid in self.grid.items():
            means = self._means(method)
            lr = (max if self.maximize else min)(grid, key=means.__getitem__)
            mean, sd = _mean_sd(self.values(method, lr))
            edge = ""
            if len(set(grid)) > 1:
                edge = "lowest" if lr == min(grid) else "highest" if lr == max(grid) else ""
            best[method] = Best(lr, mean, sd, len(self.values(method, lr)), edge)
        return best

    def at_best(self, metric: str) -> dict[str, list[float]]:
        """Return arm -> the values of `metric`, one per seed, at the arm's best learning rate."""
        return {method: self.values(method, best.lr, metric) for method, best in self.best().items()}

    def mean(self, method: str, metric: str) -> float:
        """Return the mean of `metric` over the seeds, at the arm's best learning rate."""
        return _mean_sd(self.values(method, self.best()[method].lr, metric))[0]

    def paired(self, a: str, b: str, metric: str | None = None) -> Paired:
        """Return a minus b, seed by seed, each at its own best rate, with the 95 % interval of the mean.

        Args:
            a, b: two arms.
            metric: the number; default the one that chose the rates.

        Raises:
            ValueError: no such arm, or fewer than two seeds that both ran.
        """
        for name in (a, b):
            if name not in self.grid:
                raise ValueError(f"arms: got {name!r}, wanted one of {', '.join(self.grid)}")
        best, metric = self.best(), metric or self.metric
        first, second = (self.by_seed(name, best[name].lr, metric) for name in (a, b))
        seeds = tuple(sorted(first.keys() & second.keys()))
        if len(seeds) < 2:
            raise ValueError(f"seeds: got {len(seeds)} that both {a!r} and {b!r} ran, wanted at least 2")
        differences = tuple(first[seed] - second[seed] for seed in seeds)
        mean, sd = _mean_sd(list(differences))
        low = high = mean
        if sd > 0:
            student = need("scipy.stats", "scipy").t
            low, high = map(float, student.interval(0.95, len(seeds) - 1, loc=mean, scale=sd / math.sqrt(len(seeds))))
        return Paired(a, b, metric, seeds, differences, mean, low, high)

    def facts(self, method: str) -> dict[str, str]:
        """Return everything that is known of an arm: what it declares, and what the runs count."""
        arm, grid = self._arm(method), self.grid[method]
        counts = (arm.numbers, "trainable"), (arm.state_bytes, "state bytes")
        lr = self.best()[method].lr
        told = [self._count(method, lr, name) if value is None else f"{value:,}" for value, name in counts]
        rates = f"{len(set(grid))}, {min(grid):g} to {max(grid):g}" if len(set(grid)) > 1 else f"1, {grid[0]:g}"
        facts = {"trains": arm.trains, "steps": str(arm.steps), **{k: str(v) for k, v in arm.facts.items()}}
        return facts | dict(zip(MEASURED, (*told, rates, str(len(self.by_seed(method, lr))))))

    def _arm(self, method: str) -> Arm:
        if method not in self.arms:
            raise ValueError(f"arms: got no declaration of {method!r}, wanted one in {list(self.arms)}")
        return self.arms[method]

    def _count(self, method: str, lr: float, name: str) -> str:
        found = {int(row[name]) for row in self._runs.get((method, lr), []) if name in row}
        return " or ".join(f"{count:,}" for count in sorted(found)) or "-"

    def differing(self, a: str, b: str) -> dict[str, tuple[str, str]]:
        """Return fact -> what it is for a and for b, for all facts in which the two arms differ."""
        first, second = self.facts(a), self.facts(b)
        names = dict.fromkeys([*first, *second])
        both = {name: (first.get(name, "-"), second.get(name, "-")) for name in names}
        return {name: pair for name, pair in both.items() if pair[0] != pair[1]}

    def differences(self, a: str, b: str) -> Table:
        """Return a table of all in which two arms differ, for the reader to see under a result."""
        rows = [[name, *pair] for name, pair in self.differing(a, b).items()]
        return Table([f"{a} and {b} differ in", a, b], rows or [["nothing", "-", "-"]], numbers=False)

    def doubts(self, a: str, b: str, metric: str | None = None, *, cause: Sequence[str] = ()) -> list[str]:
        """Return the reasons why no claim about a and b can rest on these runs; none is what one wants.

        Reasons are: an arm is not declared; the arms differ in a declared fact that is not in `cause`; fewer than
        three seeds; a diverged run; different numbers of rates tried; a best rate at the edge of its grid, unless the
        next rate is off by less than a quarter of the difference between the arms.

        Args:
            a, b: two arms.
            metric: the number compared; default the one that chose the rates.
            cause: names of the facts in which the arms are meant to differ, such as ["trains"].

        Raises:
            ValueError: a cause in which the arms do not differ.
        """
        if missing := [name for name in (a, b) if name not in self.arms]:
            return [f"{', '.join(missing)} not declared as an arm"]
        differing = self.differing(a, b)
        if strangers := [name for name in cause if name not in differing]:
            raise ValueError(f"cause: got {strangers}, wanted some in which the arms differ: {list(differing)}")
        found = []
        if others := [name for name in differing if name not in (*cause, *MEASURED)]:
            found.append(f"the arms also differ in {', '.join(others)}")
        paired, best = self.paired(a, b, metric), self.best()
        if len(paired.seeds) < 3:
            found.append(f"{len(paired.seeds)} seeds")
        if not all(map(math.isfinite, paired.differences)):
            found.append("a run diverged")
        tried = {name: len(set(self.grid[name])) for name in (a, b)}
        if tried[a] != tried[b]:
            found.append(f"{tried[a]} rates for {a}, {tried[b]} for {b}")
        for name in (a, b):
            if best[name].edge and not self._flat(name, metric, abs(paired.mean) / 4):
                found.append(f"the best rate of {name} is the {best[name].edge} tried")
        return found

    def _flat(self, method: str, metric: str | None, within: float) -> bool:
        """Whether the rate next to a best one at the edge gives the same number."""
        rates = sorted(set(self.grid[method]))
        edge = self.best()[method]
        beside = rates[1] if edge.edge == "lowest" else rates[-2]
        means = [_mean_sd(self.values(method, lr, metric))[0] for lr in (edge.lr, beside)]
        return abs(means[0] - means[1]) < within

    def table(self, columns: Mapping[str, int] | None = None, *, lr: str = "best lr") -> Table:
        """Return mean ± standard deviation over seeds at each arm's best learning rate: a row for every arm.

        Args:
            columns: number -> digits after the point. A number that is the same for all seeds is shown without ±, one
                that an arm did not record as "-".
                Default: the metric with three digits.
            lr: title of the last column; "(edge)" there marks a best rate at the end of its grid.
        """
        columns = {self.metric: 3} if columns is None else columns
        body = []
        for method, best in self.best().items():
            cells = [_cell(self.values(method, best.lr, name), digits) for name, digits in columns.items()]
            seeds = str(best.seeds)
            body.append([method, *cells, seeds, f"{best.lr:g}" + (" (edge)" if best.edge else "")])
        return Table(["method", *columns, "seeds", lr], body)

    def __repr__(self) -> str:
        methods = ", ".join(self.grid)
        diverged = sum("error" in row for row in self.rows)
        return f"Comparison of {methods}: {len(self.rows)} runs" + (f", {diverged} diverged" if diverged else "")


# --- inside -----------------------------------------------------------------------------------------------------------

Key = tuple[str, float, int]


def _run_all(run: Run, keys: list[Key], workers: int):
    """Yield (key, row) as the runs end."""
    if workers == 1 or len(keys) < 2:
        for key in keys:
            yield _run_one(run, key)
        return
    joblib = need("joblib")
    with warnings.catch_warnings():
        # joblib replaces workers that have grown; nothing is lost, and a warning would be output of the cell.
        warnings.filterwarnings("ignore", message="A worker stopped")
        jobs = (joblib.delayed(_run_in_worker)(run, key) for key in keys)
        yield from joblib.Parallel(n_jobs=min(workers, len(keys)), return_as="generator_unordered")(jobs)


def _run_in_worker(run: Run, key: Key) -> tuple[Key, dict[str, Any]]:
    torch.set_num_threads(1)  # as many processes as cores: more threads would only fight
    os.environ["LOWRANK_PROGRESS"] = "0"
    return _run_one(run, key)


def _run_one(run: Run, key: Key) -> tuple[Key, dict[str, Any]]:
    try:
        return key, numbers(run(*key))
    except (FloatingPointError, ValueError, torch.linalg.LinAlgError) as error:
        return key, {"error": f"{type(error).__name__}: {error}"}


def _read(path: Path, version: str) -> dict[Key, dict[str, Any]]:
    """Read finished runs; a last line torn by an interrupt is cut off the file, if the others are stored runs."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    if not path.is_file():
        raise ValueError(f"store: got {path}, wanted a file of stored runs or a new one")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"store: {path} is no file of stored runs; name another one") from error
    whole = text[: text.rfind("\n") + 1]
    torn = text[len(whole) :]
    done = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            method, lr, seed = entry["key"]
            if entry["version"] == version:
                done[method, lr, seed] = dict(entry["row"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"store: line {number} of {path} is no stored run; delete the line or the file") from error
    if torn and not torn.startswith('{"version": '[: len(torn)]):  # every line of ours begins so
        raise ValueError(f"store: the last line of {path} is no stored run; name another file")
    if torn:
        path.write_text(whole, encoding="utf-8")
    return done


def _mean_sd(values: list[float]) -> tuple[float, float]:
    if not values:
        return math.nan, math.nan
    if not all(map(math.isfinite, values)):
        return max(values, key=abs), math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean, sd = _mean_sd(values)
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:,.{digits}f}" + (f" ± {sd:.{digits}f}" if sd else "")
