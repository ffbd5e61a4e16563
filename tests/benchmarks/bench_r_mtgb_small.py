"""R-MTGB against its own parts, each at its best learning rate, on planted tasks (CPU).

    python tests/benchmarks/bench_r_mtgb_small.py --out book/results/r_mtgb_small.json --device cpu

Ten tasks of 60 training rows, one draw of all functions and rows a seed. The learning rate is chosen by the error on 60
further rows a task, over all seeds; the number of rounds of the last block on the same rows, run by run. 200 rows a
task test.

stumps: two of ten tasks are outliers. alike: none is. trees: outliers, trees of 4 and 16 leaves, against scikit-learn's
histograms of the same leaves and rounds, told the task as a category.

The stumps are found here, with the sorted order of the rows kept: the same as scikit-learn's, and faster.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from common import Runs, arguments
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.tree import DecisionTreeRegressor

from lowrank_ref.lab.data import planted_tasks
from lowrank_ref.robustness.r_mtgb import boost, gate, outlier_score, staged_scores

TASKS, TRAIN, VALID = 10, 60, 60
RATES = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
TREE_RATES = (0.05, 0.1, 0.2, 0.4)

#: method -> rounds of the three blocks; of the last one that is used, fewer may be chosen
ROUNDS = {
    "pooled": (150, 0, 0),
    "single-task": (0, 0, 150),
    "MTGB": (100, 0, 50),
    "MTGB, as many trees": (200, 0, 50),
    "R-MTGB": (0, 100, 50),
    "R-MTGB, gates fixed": (0, 100, 50),
    "R-MTGB, true groups": (0, 100, 50),
}
TREES = ("R-MTGB", "MTGB", "histogram, task as category")


class Stump:
    """Two leaves."""

    def __init__(self, column: int, threshold: float, values: tuple[float, float]) -> None:
        self.column, self.threshold, self.values = column, threshold, values

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the value of each row's leaf."""
        return np.where(x[:, self.column] <= self.threshold, *self.values)


class Stumps:
    """Finds the stump of the least squared error; tables are told apart by length and first number."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, float], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __call__(self, x: np.ndarray, targets: np.ndarray) -> Stump:
        """Fit one."""
        key = (len(x), float(x[0, 0]))
        if key not in self.known:
            order = np.argsort(x, axis=0).T
            self.known[key] = order, np.sort(x.astype(float), axis=0).T, np.arange(1.0, len(x))
        order, values, count = self.known[key]
        sums = np.cumsum(targets[:, 0][order], axis=1)
        left, total = sums[:, :-1], sums[0, -1]
        gain = left**2 / count + (total - left) ** 2 / (len(x) - count)
        column, place = divmod(int(gain.argmax()), len(x) - 1)
        threshold = (values[column, place] + values[column, place + 1]) / 2
        part = left[column, place]
        return Stump(column, threshold, (part / (place + 1), (total - part) / (len(x) - place - 1)))


def grown(leaves: int) -> Any:
    """A learner of scikit-learn's trees."""

    def fit(x: np.ndarray, targets: np.ndarray) -> Any:
        return DecisionTreeRegressor(max_leaf_nodes=leaves, random_state=0).fit(x, targets, check_input=False).tree_

    return fit


def tables(seed: int, outliers: int) -> tuple[Any, Any, np.ndarray]:
    """Training rows, further rows, and which of these are for validation."""
    train, more = planted_tasks(seed, rows=TRAIN, test_rows=VALID + 200, outliers=outliers)
    return train, more, np.tile(np.arange(VALID + 200) < VALID, TASKS)


def staged(
    method: str, leaves: int, rounds: tuple[int, int, int], lr: float, seed: int, outliers: int, train: Any, more: Any
) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Predictions of the further rows after every round, and the gates."""
    theta = 0.1 * np.random.default_rng(1000 + seed).normal(size=TASKS)
    if method.endswith("true groups"):
        theta = np.where(np.arange(TASKS) >= TASKS - outliers, 30.0, -30.0)
    fixed = {"gate_lr": 1e-30} if method.endswith("gates fixed") else {}
    x, new = train.x.astype(np.float32), more.x.astype(np.float32)
    learner = Stumps() if leaves == 2 else grown(leaves)
    forest = boost(x, train.y[:, None], train.task, theta, fit=learner, rounds=rounds, lr=lr, **fixed)
    return (F[:, 0] for F in staged_scores(forest, new, more.task, outputs=1, lr=lr)), forest.theta_path[-1]


def histogram(
    leaves: int, rounds: int, lr: float, seed: int, train: Any, more: Any
) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """The same of scikit-learn's histograms."""
    model = HistGradientBoostingRegressor(
        max_leaf_nodes=leaves, max_iter=rounds, learning_rate=lr, min_samples_leaf=5, early_stopping=False,
        categorical_features=[train.x.shape[1]], random_state=seed,
    )  # fmt: skip
    model.fit(np.c_[train.x, train.task], train.y)
    return model.staged_predict(np.c_[more.x, more.task]), np.zeros(TASKS)


def rmse(miss: np.ndarray) -> float:
    """Root of the mean square."""
    return round(float(np.sqrt(np.mean(miss**2))), 5)


def run(method: str, leaves: int, lr: float, seed: int, outliers: int) -> dict[str, Any]:
    """One row."""
    train, more, valid = tables(seed, outliers)
    rounds = ROUNDS.get(method, (200, 0, 0))
    if leaves > 2 and method == "R-MTGB":
        rounds = (0, 150, 50)
    elif leaves > 2 and method == "MTGB":
        rounds = (150, 0, 50)
    if method.startswith("histogram"):
        stages, theta = histogram(leaves, sum(rounds), lr, seed, train, more)
    else:
        stages, theta = staged(method, leaves, rounds, lr, seed, outliers, train, more)
    done = sum(rounds[:2]) if rounds[2] and any(rounds[:2]) else 0  # blocks before the last are always whole
    seen = [guess - more.y for count, guess in enumerate(stages, start=1) if count >= max(done, 1)]
    errors = [float(np.mean(miss[valid] ** 2)) for miss in seen]
    best = int(np.argmin(errors))
    miss, task = seen[best][~valid], more.task[~valid]
    usual = task < TASKS - outliers
    row = {"valid rmse": rmse(seen[best][valid]), "rmse": rmse(miss), "usual": rmse(miss[usual])}
    row |= {f"task {r}": rmse(miss[task == r]) for r in range(TASKS)}
    row["rounds"] = max(done, 1) + best
    if done and rounds[2]:
        row["without block 3"] = rmse(seen[0][~valid])
    if outliers:
        row["outliers"] = rmse(miss[~usual])
    if method == "R-MTGB":
        score, own = outlier_score(theta), np.arange(TASKS) >= TASKS - outliers
        row["gates"] = [round(float(g), 4) for g in gate(theta)]
        row["highest usual"] = round(float(score[~own].max()), 4)
        if outliers:
            row["lead"] = round(float(score[own].min() - score[~own].max()), 4)
    return row


def main() -> None:
    """Run what is missing, seed by seed."""
    args = arguments(__doc__ or "", ("stumps", "alike", "trees"))
    said = f"ten planted tasks, {TRAIN} training, {VALID} validation and 200 test rows each; "
    ends = "learning rate and rounds of the last block chosen on validation rows"
    settings = {
        "stumps": f"{said}two outliers; stumps; {ends}",
        "alike": f"{said}no outlier; stumps; {ends}",
        "trees": f"{said}two outliers; trees of 4 or 16 leaves, at most 200 rounds; {ends}",
    }
    parts = {
        part: Runs(args.out, part, setting=text, packages=("numpy", "scikit-learn"), seconds=args.seconds)
        for part, text in settings.items()
        if part in args.part
    }
    seeds = range(1 if args.tiny else 6)

    def fill(part: str, seed: int, method: str, leaves: int, rates: tuple[float, ...], outliers: int) -> None:
        name = method if leaves == 2 else f"{method}, {leaves} leaves"
        for lr in rates if part in parts else ():
            key = {"method": name, "lr": lr, "seed": seed}
            parts[part].row(key, lambda lr=lr: run(method, leaves, lr, seed, outliers))

    for seed in seeds:
        for method in ROUNDS:
            fill("stumps", seed, method, 2, RATES, 2)
    for seed in seeds:
        for method in ("pooled", "MTGB", "R-MTGB", "R-MTGB, gates fixed"):
            fill("alike", seed, method, 2, RATES, 0)
    for seed in seeds:
        for leaves in (4, 16):
            for method in TREES:
                fill("trees", seed, method, leaves, TREE_RATES, 2)


if __name__ == "__main__":
    main()
