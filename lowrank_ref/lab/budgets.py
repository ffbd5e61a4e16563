"""Many methods at one budget: from stored rows to one comparison, and to one table against a reference.

    result = at_budget(rows, 586, {"LoRA": Arm("A and B", steps=200), ...}, metric="valid loss", always=["full"])
    versus_table(result, "LoRA r=1", "loss", {"accuracy": 2, "bytes": 0})

Each row has, beside "method" (an arm, such as "LoRA r=1"), "lr" and "seed", the "name" of the method that the arm is a
size of, and "numbers", what it stores for a task.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_ref.lab.compare import Arm, Comparison
from lowrank_ref.lab.draw.table import Table

__all__ = ["at_budget", "best_settings", "versus_table"]


def at_budget(
    rows: Sequence[Mapping[str, Any]],
    budget: float,
    arms: Mapping[str, Arm],
    *,
    metric: str,
    always: Sequence[str] = (),
) -> Comparison:
    """Return the comparison of all methods, each at the size with the most numbers within a budget.

    Args:
        rows: each with method, lr, seed, name and, unless it diverged, numbers and what was measured.
        budget: most numbers, as the mean over an arm's rows.
        arms: every name in the rows, in the order of the tables.
        metric: the number by which rates are chosen.
        always: names that are there at any budget, such as full fine-tuning.

    Raises:
        ValueError: names without an arm, or arms without a row.
    """
    found = {row["name"] for row in rows}
    if found != set(arms):
        raise ValueError(f"arms: got {sorted(arms)}, wanted the names of the rows: {sorted(found)}")
    sizes: dict[str, dict[str, list[float]]] = {name: {} for name in arms}
    for row in rows:
        if "numbers" in row:
            sizes[row["name"]].setdefault(row["method"], []).append(row["numbers"])
    kept: dict[str, Arm] = {}
    for name, arm in arms.items():
        means = {method: statistics.fmean(numbers) for method, numbers in sizes[name].items()}
        within = [method for method, mean in means.items() if mean <= budget or name in always]
        if within:
            kept[max(within, key=means.__getitem__)] = arm
    return Comparison.stored([row for row in rows if row["method"] in kept], kept, metric=metric)


def best_settings(rows: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm], *, metric: str) -> Comparison:
    """Return the comparison of all methods, each at the setting that is best on validation data, at its best rate.

    Args:
        rows: each with method, lr, seed and name, as for `at_budget`; here an arm is a setting of a method.
        arms: every name in the rows.
        metric: the number by which settings and rates are chosen, the less the better.

    Raises:
        ValueError: names without an arm, or arms without a row.
    """
    owner = {row["method"]: row["name"] for row in rows}
    if set(owner.values()) != set(arms):
        raise ValueError(f"arms: got {sorted(arms)}, wanted the names of the rows: {sorted(set(owner.values()))}")
    best = Comparison.stored(rows, {method: arms[name] for method, name in owner.items()}, metric=metric).best()
    kept = {}
    for name in arms:
        settings = [method for method in owner if owner[method] == name]
        kept[min(settings, key=lambda method: best[method].mean)] = arms[name]
    return Comparison.stored([row for row in rows if row["method"] in kept], kept, metric=metric)


def versus_table(
    result: Comparison, reference: str, metric: str, columns: Mapping[str, int] | None = None, *, digits: int = 3
) -> Table:
    """Return a table of all arms, the best first, each beside a reference arm.

    The difference is the arm's minus the reference's, seed by seed, with the 95 % interval of its mean; "(edge)" marks
    a best rate at the end of its grid.

    Args:
        result: from `at_budget`, or any comparison.
        reference: an arm of it.
        metric: what is compared, a number of test data.
        columns: further number -> digits after the point, as means over the seeds.
        digits: of the metric and of its differences.

    Raises:
        ValueError: no such arm, or no run recorded the metric.
    """
    if reference not in result.grid:
        raise ValueError(f"reference: got {reference!r}, wanted one of {', '.join(result.grid)}")
    body = []
    for method, best in result.best().items():
        value = result.mean(method, metric)
        cells = [_number(result.values(method, best.lr, name), places) for name, places in (columns or {}).items()]
        lr = f"{best.lr:g}" + (" (edge)" if best.edge else "")
        difference = "-" if method == reference else _difference(result, method, reference, metric, digits)
        body.append((value, [method, _number([value], digits), difference, *cells, str(best.seeds), lr]))
    order = sorted(body, key=lambda row: (-1 if result.maximize else 1) * row[0])
    header = ["method", metric, f"minus {reference} (95 %)", *(columns or {}), "seeds", "best lr"]
    return Table(header, [cells for _, cells in order])


def _difference(result: Comparison, method: str, reference: str, metric: str, digits: int) -> str:
    paired = result.paired(method, reference, metric)
    if not math.isfinite(paired.mean):
        return "diverged"
    mean, low, high = (f"{value:+.{digits}f}".replace("-", "−") for value in (paired.mean, paired.low, paired.high))
    return f"{mean} ({low} to {high})"


def _number(values: Sequence[float], digits: int) -> str:
    """Return the mean, "-" where nothing was recorded, "diverged" where it is not finite."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:,.{digits}f}" if math.isfinite(mean) else "diverged"
