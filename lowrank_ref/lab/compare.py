"""Fair comparisons: every method at its own best learning rate, several seeds, spread shown.

    lrs = {"LoRA": (0.01, 0.03, 0.1), "full": (0.001, 0.003, 0.01)}
    result = compare(run, ["LoRA", "full"], lrs=lrs, seeds=range(3))
    result.table({"loss": 3, "accuracy": 3})

`run(method, lr, seed)` trains once and returns its numbers. The runs go to a few processes with one thread each.
"""

import json
import math
import os
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_ref.lab._tools import need, numbers, progress_bar
from lowrank_ref.lab.draw.table import Table

__all__ = ["Best", "Comparison", "compare"]

Run = Callable[[str, float, int], Mapping[str, float]]


def compare(
    run: Run,
    methods: Sequence[str],
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
        methods: names handed to `run`, in the order of the table.
        lrs: the grid of learning rates, the same for all methods or one per method.
        seeds: seeds, at least one; three or more show a spread.
        metric: the number by which a method's learning rate is chosen.
        maximize: whether more of it is better.
        store: JSON-lines file; runs found there are not run again, so a comparison can be interrupted.
        version: part of a stored run's identity: change it when `run` changes.
        workers: processes; 1 runs everything here.
        progress: True or False; None shows a bar unless LOWRANK_PROGRESS=0.

    Raises:
        ValueError: nothing to run, a method without a grid, `metric` missing from a result, a damaged store, or a
            method of which no run came to an end.
    """
    grid = {method: tuple(lrs.get(method, ()) if isinstance(lrs, Mapping) else lrs) for method in methods}
    if not grid or not len(seeds) or not all(grid.values()):
        raise ValueError(f"methods, lrs, seeds: got {grid}, seeds {list(seeds)}, wanted at least one of each")
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
    return Comparison(rows, grid, metric, maximize)


@dataclass(frozen=True)
class Best:
    """A method at its best learning rate.

    `edge` is "lowest" or "highest" where that is the end of a grid of several rates (then try further), else "".
    """

    lr: float
    mean: float
    sd: float
    seeds: int
    edge: str


@dataclass(frozen=True)
class Comparison:
    """The runs: `rows` holds one dict per run (method, lr, seed, its numbers, or an "error")."""

    rows: list[dict[str, Any]]
    grid: dict[str, tuple[float, ...]]
    metric: str
    maximize: bool = False

    def __post_init__(self):
        for method in self.grid:
            rows = [row for row in self.rows if row["method"] == method]
            if not any(math.isfinite(row.get(self.metric, math.nan)) for row in rows):
                error = next((row["error"] for row in rows if "error" in row), f"no finite {self.metric}")
                raise ValueError(f"methods: got no finite run of {method!r}: {error}")

    def values(self, method: str, lr: float, metric: str | None = None) -> list[float]:
        """Return one number per seed; a diverged run is infinitely bad."""
        metric = metric or self.metric
        known = {name for row in self.rows for name in row} - {"method", "lr", "seed", "error"}
        if metric not in known:
            raise ValueError(f"metric: got {metric!r}, wanted one of {sorted(known)}")
        worst = -math.inf if self.maximize else math.inf
        rows = [row for row in self.rows if row["method"] == method and row["lr"] == lr]
        return [worst if math.isnan(value) else value for value in (row.get(metric, math.nan) for row in rows)]

    def sweep(self, method: str, metric: str | None = None) -> dict[float, tuple[float, float]]:
        """Return learning rate -> (mean, standard deviation over seeds), in the order of the grid."""
        return {lr: _mean_sd(self.values(method, lr, metric)) for lr in self.grid[method]}

    def best(self) -> dict[str, Best]:
        """Return every method at the learning rate with the best mean; the earlier one of a tie."""
        best = {}
        for method, grid in self.grid.items():
            means = {lr: mean for lr, (mean, _) in self.sweep(method).items()}
            lr = (max if self.maximize else min)(grid, key=means.__getitem__)
            mean, sd = _mean_sd(self.values(method, lr))
            edge = ""
            if len(set(grid)) > 1:
                edge = "lowest" if lr == min(grid) else "highest" if lr == max(grid) else ""
            best[method] = Best(lr, mean, sd, len(self.values(method, lr)), edge)
        return best

    def at_best(self, metric: str) -> dict[str, list[float]]:
        """Return method -> the values of `metric`, one per seed, at the method's best learning rate."""
        return {method: self.values(method, best.lr, metric) for method, best in self.best().items()}

    def table(self, columns: Mapping[str, int] | None = None, *, lr: str = "best lr") -> Table:
        """Return mean ± standard deviation over seeds at each method's best learning rate.

        Args:
            columns: number -> digits after the point. A number that is the same for all seeds is shown without ±.
                Default: the metric with three digits.
            lr: title of the last column; "(edge)" there marks a best rate at the end of its grid.
        """
        columns = {self.metric: 3} if columns is None else columns
        body = []
        for method, best in self.best().items():
            cells = [_cell(self.values(method, best.lr, name), digits) for name, digits in columns.items()]
            body.append([method, *cells, f"{best.lr:g}" + (" (edge)" if best.edge else "")])
        return Table(["method", *columns, lr], body)

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
    """Read finished runs; a last line torn by an interrupt is cut off the file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    done = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            if entry["version"] == version:
                method, lr, seed = entry["key"]
                done[method, lr, seed] = dict(entry["row"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"store: line {number} of {path} is no stored run; delete the line or the file") from error
    return done


def _mean_sd(values: list[float]) -> tuple[float, float]:
    if not all(map(math.isfinite, values)):
        return max(values, key=abs), math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _cell(values: list[float], digits: int) -> str:
    mean, sd = _mean_sd(values)
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:,.{digits}f}" + (f" ± {sd:.{digits}f}" if sd else "")
