"""R-MTGB against single-task and pooled boosting, with and without scikit-learn's histograms. CPU only.

    python tests/benchmarks/bench_r_mtgb.py --out book/results/r_mtgb_scale.json

Every method tunes its trees and rounds by cross-validation on each training set, anew in each of ten repetitions.
Minutes on 16 cores; no GPU is used.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that the provenance names the processor, which does the work
os.environ["OMP_NUM_THREADS"] = "1"  # as many processes as cores

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from common import arguments, save
from joblib import Parallel, delayed
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)
from sklearn.model_selection import StratifiedKFold, train_test_split

from lowrank_ref.lab.data import planted_tasks, task_table
from lowrank_ref.robustness import RMTGBClassifier, RMTGBRegressor

Split = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, y, task


# --- test beds


def planted(seed: int, rows: int, outliers: int) -> tuple[Split, Split, np.ndarray]:
    """Made-up tasks; the last `outliers` of ten follow another function."""
    train, test = planted_tasks(seed, rows=rows, outliers=outliers)
    return (train.x, train.y, train.task), (test.x, test.y, test.task), np.arange(10) >= 10 - outliers


def real(seed: int, name: str, liars: int = 0) -> tuple[Split, Split, np.ndarray]:
    """Two thirds train, one third tests, in every task. The last `liars` tasks turn their yes and no around."""
    d = task_table(name)
    outlier = np.arange(d.task.max() + 1) > d.task.max() - liars
    y = np.where(outlier[d.task], 1 - d.y, d.y) if liars else d.y
    train, test = train_test_split(np.arange(len(y)), test_size=1 / 3, random_state=seed, stratify=d.task)
    return (d.x[train], y[train], d.task[train]), (d.x[test], y[test], d.task[test]), outlier


BEDS: dict[str, Callable[[int], tuple[Split, Split, np.ndarray]]] = {
    "planted, 30 rows": lambda seed: planted(seed, 30, 2),
    "planted, 60 rows": lambda seed: planted(seed, 60, 2),
    "planted, 200 rows": lambda seed: planted(seed, 200, 2),
    "planted, 60 rows, no outlier": lambda seed: planted(seed, 60, 0),
    "phishing": lambda seed: real(seed, "phishing"),
    "phishing, 3 of 10 turned": lambda seed: real(seed, "phishing", liars=3),
    "cars": lambda seed: real(seed, "cars"),
    "flares": lambda seed: real(seed, "flares"),
    "chicks": lambda seed: real(seed, "chicks"),
    "yeast": lambda seed: real(seed, "yeast"),
}


# --- methods: each lists its candidates as (model, stages); a stage is a number of rounds after which to look


def multi_task(
    classify: bool, leaves: tuple[int, ...], grid: list[tuple[int, int]], last: list[int], seed: int
) -> Iterator[Any]:
    """Blocks 1 and 2 from the grid, block 3 looked at after several numbers of rounds."""
    kind = RMTGBClassifier if classify else RMTGBRegressor
    for count in leaves:
        for m1, m2 in grid:
            rounds = {"shared_rounds": m1, "gated_rounds": m2, "task_rounds": last[-1]}
            yield kind(**rounds, max_leaf_nodes=count, random_state=seed), [m1 + m2 + m3 for m3 in last]


class Columns:
    """A boosting of scikit-learn, one per output, that drops the task, or gets it one-hot or as a category."""

    def __init__(self, make: Callable[..., Any], task: str) -> None:
        self.make, self.task = make, task

    def inputs(self, x: np.ndarray, task: np.ndarray) -> np.ndarray:
        """Return the features in the form that this model sees."""
        if self.task == "none":
            return x
        return np.column_stack([x, task if self.task == "category" else task[:, None] == np.arange(self.tasks)])

    def fit(self, x: np.ndarray, y: np.ndarray, *, tasks: np.ndarray) -> "Columns":
        """Fit one model per column of y."""
        self.tasks = tasks.max() + 1
        places = [x.shape[1]] if self.task == "category" else None
        self.flat, columns = y.ndim == 1, y.reshape(len(y), -1).T
        self.models = [self.make(places).fit(self.inputs(x, tasks), column) for column in columns]
        return self

    def staged_predict(self, x: np.ndarray, *, tasks: np.ndarray) -> Iterator[np.ndarray]:
        """Yield predictions after every round."""
        for parts in zip(*(model.staged_predict(self.inputs(x, tasks)) for model in self.models)):
            yield parts[0] if self.flat else np.stack(parts, axis=1)


def pooled(
    classify: bool, leaves: tuple[int, ...], task: str, histogram: bool, stages: list[int], seed: int
) -> Iterator[Any]:
    """One model of scikit-learn for all tasks."""

    def make(count: int, least: int, places: list[int] | None) -> Any:
        shared = {"max_leaf_nodes": count, "min_samples_leaf": least, "random_state": seed, "learning_rate": 0.1}
        if histogram:
            kind = HistGradientBoostingClassifier if classify else HistGradientBoostingRegressor
            return kind(**shared, max_iter=stages[-1], early_stopping=False, categorical_features=places)
        kind = GradientBoostingClassifier if classify else GradientBoostingRegressor
        return kind(**shared, n_estimators=stages[-1])

    for count in leaves:
        for least in (5, 20) if histogram else (1,):  # 20, the histograms' default, is more than a small task has
            yield Columns(partial(make, count, least), task), stages


def candidates(method: str, classify: bool, features: int, seed: int, tiny: bool) -> list[Any]:
    """Return the (model, stages) pairs from which a method may choose."""
    long, last, few, many = ([2, 4], [0, 2], 2, 3) if tiny else ([20, 50, 100, 200], [0, 20, 50], 30, 100)
    gated, shared, leaves = [(0, few), (0, many), (few, many)], [(few, 0), (many, 0)], (2, 4)
    if features > 50:  # yeast: a tree costs twenty times as much
        gated, shared, leaves = gated[1:], shared[1:], (2,)
    return list(
        {
            "R-MTGB": lambda: multi_task(classify, leaves, gated, last, seed),
            "MTGB (no gates)": lambda: multi_task(classify, leaves, shared, last, seed),
            "single-task": lambda: multi_task(classify, leaves, [(0, 0)], long[:3], seed),
            "pooled": lambda: pooled(classify, leaves, "none", False, long, seed),
            "pooled, task one-hot": lambda: pooled(classify, leaves, "one-hot", False, long, seed),
            "histogram, pooled": lambda: pooled(classify, (2, 4, 16), "none", True, long, seed),
            "histogram, task as category": lambda: pooled(classify, (2, 4, 16), "category", True, long, seed),
        }[method]()
    )


METHODS = (
    "R-MTGB",
    "MTGB (no gates)",
    "single-task",
    "pooled",
    "pooled, task one-hot",
    "histogram, pooled",
    "histogram, task as category",
)


def losses(y: np.ndarray, predicted: np.ndarray, classify: bool) -> np.ndarray:
    """Squared error per row (mean over outputs), or 1 where the class is wrong."""
    if classify:
        return (y != predicted).astype(float)
    return np.square(y - predicted).reshape(len(y), -1).mean(axis=1)


def error(parts: np.ndarray, classify: bool) -> float:
    """Share of wrong rows, or the root of the mean square."""
    return round(float(parts.mean() if classify else np.sqrt(parts.mean())), 5)


def run(bed: str, method: str, seed: int, tiny: bool) -> dict[str, Any]:
    """Tune by cross-validation, fit once more, test."""
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    (x, y, task), (x_test, y_test, task_test), outlier = BEDS[bed](seed)
    classify = y.dtype.kind == "i"
    if not classify:  # in units of the training targets' spread
        mean, sd = y.mean(axis=0), y.std(axis=0)
        y, y_test = (y - mean) / sd, (y_test - mean) / sd
    folds = list(StratifiedKFold(3, shuffle=True, random_state=seed).split(x, task))
    best: tuple[float, Any, int] = (np.inf, None, 0)
    for model, stages in candidates(method, classify, x.shape[1], seed, tiny):
        found = np.zeros(len(stages))
        for train, held in folds:
            model.fit(x[train], y[train], tasks=task[train])
            seen = dict(enumerate(model.staged_predict(x[held], tasks=task[held]), start=1))
            found += [losses(y[held], seen[s], classify).mean() if s else np.inf for s in stages]
        if found.min() < best[0]:
            best = (found.min(), model, stages[int(found.argmin())])
    _, model, stage = best
    fit_start = time.perf_counter()
    model.fit(x, y, tasks=task)
    fit_seconds = time.perf_counter() - fit_start
    predicted = next(p for s, p in enumerate(model.staged_predict(x_test, tasks=task_test), start=1) if s == stage)
    wrong = losses(y_test, predicted, classify)
    row = {"bed": bed, "method": method, "seed": seed, "error": error(wrong, classify)}
    if outlier.any():
        row["usual"] = error(wrong[~outlier[task_test]], classify)
        row["outlier"] = error(wrong[outlier[task_test]], classify)
    if method == "R-MTGB":
        score = model.outlier_score_
        row["scores"] = [round(float(s), 3) for s in score]
        if outlier.any():
            row["found"] = bool(score[outlier].min() > score[~outlier].max())
        row["rounds"] = [model.shared_rounds, model.gated_rounds, stage - model.shared_rounds - model.gated_rounds]
    row["fit_seconds"], row["seconds"] = round(fit_seconds, 3), round(time.perf_counter() - start, 1)
    return row


def main() -> None:
    """Run all beds, methods and repetitions, in as many processes as there are cores."""
    args = arguments(__doc__ or "", ("comparison",))
    beds, seeds = (list(BEDS)[1:2] + ["cars"], 1) if args.tiny else (list(BEDS), 10)
    slow_first = beds[::-1]
    jobs = [(bed, method, seed) for bed in slow_first for method in METHODS for seed in range(seeds)]
    cores = os.cpu_count() or 1
    setting = (
        f"{seeds} repetitions; trees of 2 or 4 leaves (histograms: up to 16), learning rate 0.1; rounds and "
        f"leaves chosen by 3-fold cross-validation in each (yeast: stumps only); {cores} processes, no GPU"
    )
    rows = []
    parallel = Parallel(n_jobs=cores, return_as="generator_unordered")
    for row in parallel(delayed(run)(*job, args.tiny) for job in jobs):
        rows.append(row)
        print(row, flush=True)
        ordered = sorted(rows, key=lambda r: (beds.index(r["bed"]), METHODS.index(r["method"]), r["seed"]))
        save(args.out, "comparison", {"rows": ordered, "setting": setting}, ("scikit-learn", "numpy", "river"))


if __name__ == "__main__":
    main()
