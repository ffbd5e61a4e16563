"""Tables whose rows belong to tasks."""

import csv
import gzip
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lowrank_ref.lab._tools import package_file
from lowrank_ref.lab.data.sources import Arrays, arrays, split

__all__ = ["TASK_TABLES", "TaskTable", "multitask", "planted_tasks", "task_table"]


@dataclass(frozen=True)
class TaskTable:
    """Rows of many tasks: x (n, p) float64, y (n,) or (n, K) float64, or classes as integers, task (n,) from 0."""

    x: np.ndarray
    y: np.ndarray
    task: np.ndarray
    name: str
    source: str
    licence: str


def multitask() -> Arrays:
    """Yeast genes with 14 yes/no functions each: fourteen related tasks on one table.

    2,417 genes, 103 expression features. The split is torch.randperm under seed 0: 1,500 train, 417 validate,
    500 test.

    Source: river (Elisseeff and Weston, 2001). 0.8 MB. Licence: BSD-3 with the package. There is no hub counterpart.

    Returns:
        x_train (1500, 103), y_train (1500, 14) of 0 and 1, and the same for valid (417 rows) and test (500).
    """
    _, cells = _river("yeast.csv.gz")
    x = torch.from_numpy(cells[:, :-14].astype(np.float32))
    y = torch.from_numpy(cells[:, -14:].astype(np.int64))
    return arrays(x, y, split(len(x), 1500, 500), "Yeast", "river", "BSD-3 (package)")


def _river(name: str) -> tuple[list[str], np.ndarray]:
    """Heads of the columns and cells, as text, of a table that river brings."""
    path = package_file("river", "datasets", name)
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as folder:
            raw = folder.read(folder.namelist()[0])  # the only one
    heads, *rows = csv.reader(io.StringIO(raw.decode("utf-8")))
    return heads, np.array(rows)


TASK_TABLES = ("chicks", "cars", "flares", "yeast", "phishing")


def task_table(name: str) -> TaskTable:
    """Real tables whose rows belong to tasks.

        name      rows of a task             tasks   rows  features             target
        chicks    one chick's weighings         47    561  day, diet 1 to 4     weight, grams
        cars      one continent's cars           3    392  6, of the engine     miles per gallon
        flares    one class of sunspot groups    6  1,066  9, of the group      3 counts of flares in 24 hours
        yeast     genes asked for one function  14  2,417  103, expression      has it (0 or 1)
        phishing  one annotator's web sites     10  1,250  9, of the address    is phishing (0 or 1)

    Chicks with fewer than 10 weighings are left out. In yeast gene i is asked for function i mod 14 only, so tasks
    share no row. Phishing has no annotators: row i is given to number i mod 10, who are alike until a chapter makes
    one err.

    Source: river (chicks as in R's ChickWeight; flares, phishing and yeast from UCI and Mulan) and, for cars, mlxtend
    (UCI Auto MPG). Below 1 MB. Licence: BSD-3 with the packages. There is no hub counterpart.

    Raises:
        ValueError: another name.
    """
    if name not in TASK_TABLES:
        raise ValueError(f"name: got {name!r}, wanted one of {', '.join(TASK_TABLES)}")
    if name == "cars":
        table = np.genfromtxt(package_file("mlxtend", "data", "data", "autompg.csv.gz"), delimiter=",")
        x, y = table[:, :-1], table[:, -1]
        return TaskTable(x[:, :6], y, x[:, 6].astype(int) - 1, "Auto MPG", "mlxtend", "BSD-3 (package)")
    origin = ("river", "BSD-3 (package)")
    if name == "chicks":
        heads, cells = _river("chick-weights.csv")
        cells = cells[:, [heads.index(head) for head in ("chick", "time", "diet", "weight")]].astype(float)
        _, chick, count = np.unique(cells[:, 0], return_inverse=True, return_counts=True)
        cells = cells[count[chick] >= 10]
        task = np.unique(cells[:, 0], return_inverse=True)[1]
        return TaskTable(cells[:, 1:3], cells[:, 3], task, "Chick weights", *origin)
    if name == "flares":
        _, cells = _river("solar-flare.csv.zip")
        codes = [np.unique(column, return_inverse=True)[1] for column in cells.T[:-3]]  # letters become their place
        return TaskTable(
            np.stack(codes[1:], axis=1).astype(float), cells[:, -3:].astype(float), codes[0], "Solar flares", *origin
        )
    if name == "yeast":
        _, cells = _river("yeast.csv.gz")
        task = np.arange(len(cells)) % 14
        y = cells[np.arange(len(cells)), 103 + task].astype(int)
        return TaskTable(cells[:, :103].astype(float), y, task, "Yeast", *origin)
    _, cells = _river("phishing.csv.gz")
    return TaskTable(
        cells[:, :-1].astype(float), cells[:, -1].astype(int), np.arange(len(cells)) % 10, "Phishing", *origin
    )


def planted_tasks(
    seed: int, *, rows: int = 60, test_rows: int = 200, tasks: int = 10, outliers: int = 2, features: int = 5
) -> tuple[TaskTable, TaskTable]:
    """Make up tasks of which the last `outliers` follow another rule; no noise.

    Each task's function is 0.9 of a function that its group shares and 0.1 of one of its own. All are sums of 500
    random cosines, √(2/500)·Σ a·cos(w·x/ℓ + b) with a, w ~ N(0, 1), b ~ U[0, 2π], ℓ = features/4, and x ~ U[-1, 1].

    Source: scenario 4 of the R-MTGB paper's code (`DataUtils/func_gen.py`); only the order of the draws differs.

    Returns:
        (training table, test table), rows and test_rows for each task.
    """
    rng = np.random.default_rng(seed)

    def draw() -> Callable[[np.ndarray], np.ndarray]:
        a, b, w = rng.normal(size=500), rng.uniform(0, 2 * np.pi, 500), rng.normal(size=(features, 500))
        return lambda x: np.cos(4 * x @ w / features + b) @ a * np.sqrt(2 / 500)

    groups = (draw(), draw())
    own = [draw() for _ in range(tasks)]
    tables = []
    for count in (rows, test_rows):
        task = np.repeat(np.arange(tasks), count)
        x = rng.uniform(-1, 1, (len(task), features))
        y = np.empty(len(task))
        for r in range(tasks):
            mine = x[task == r]
            y[task == r] = 0.9 * groups[r >= tasks - outliers](mine) + 0.1 * own[r](mine)
        tables.append(TaskTable(x, y, task, "Planted tasks", "made up", "-"))
    return tables[0], tables[1]
