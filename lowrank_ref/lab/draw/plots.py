"""Colours and a few drawing helpers for matplotlib. Every helper draws on axes that it is given.

plt.rcParams.update(plots.style())
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lowrank_ref.lab.compare import Comparison
from lowrank_ref.lab.draw.palette import GRAY, HUES, Look, colour, looks

__all__ = ["GRAY", "OKABE_ITO", "bars_with_spread", "colour", "curves", "line", "looks", "lr_sweep", "style"]

#: Hues by name for what is no method, and black for its outlines. A method's colour comes from `colour`.
OKABE_ITO = {"black": "#000000", **HUES}


def style() -> dict[str, Any]:
    """Return rcParams for the book: 5.5 x 3.4 inch, white paper also in dark pages, faint grid, no box."""
    return {
        "figure.figsize": (5.5, 3.4),
        "figure.dpi": 110,
        "figure.facecolor": "white",
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.8,
        "legend.frameon": False,
        "image.cmap": "gray",
        "savefig.facecolor": "white",
    }


def line(look: Look) -> dict[str, Any]:
    """Return the arguments for `Axes.plot` that draw a series as `palette.looks` says, without its marker."""
    strokes = tuple(float(length) / 2.2 for length in look.dash.split())  # SVG counts in units, matplotlib in widths
    return {"color": look.colour, "linestyle": (0, strokes) if strokes else "-"}


def curves(ax: Any, runs: Mapping[str, Sequence[ArrayLike]], *, x: ArrayLike | None = None) -> None:
    """Draw the mean over seeds of each method, and a band from its lowest to its highest seed.

    Args:
        ax: matplotlib axes.
        runs: method -> one row of numbers per seed, all of one length.
        x: places of the numbers; default 1, 2, ...

    Raises:
        ValueError: rows that do not have one length.
    """
    drawn = looks(runs)
    for name, rows in runs.items():
        y = np.asarray(rows, dtype=float)
        if y.ndim != 2:
            raise ValueError(f"runs: got shape {y.shape} for {name!r}, wanted (seeds, steps)")
        places = np.arange(1, y.shape[1] + 1) if x is None else np.asarray(x)
        ax.plot(places, y.mean(axis=0), **line(drawn[name]), label=name)
        ax.fill_between(places, y.min(axis=0), y.max(axis=0), color=drawn[name].colour, alpha=0.18, linewidth=0)
    ax.legend()


def bars_with_spread(ax: Any, values: Mapping[str, Sequence[float]], *, label: str) -> None:
    """Draw one bar per method, its mean over seeds, and every seed as a dot.

    Args:
        ax: matplotlib axes.
        values: method -> one number per seed (`Comparison.at_best`).
        label: what the numbers are, with their unit.
    """
    drawn = looks(values)
    for place, (name, numbers) in enumerate(values.items()):
        ax.barh(place, float(np.mean(numbers)), color=drawn[name].colour, alpha=0.75, height=0.6)
        ax.plot(list(numbers), [place] * len(numbers), "o", color="black", markeredgecolor="white", markersize=5)
    ax.set_yticks(range(len(values)), list(values))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(label)


def lr_sweep(ax: Any, comparison: Comparison, *, metric: str | None = None) -> None:
    """Draw a number against the learning rate for every method: mean over seeds, bars of one standard deviation.

    Rates at which a seed diverged are left out. A method that only wins at one rate is a fragile winner: look here.

    Args:
        ax: matplotlib axes.
        comparison: result of `compare`.
        metric: the number; default the one that chose the learning rates.
    """
    drawn = looks(comparison.grid)
    for method in comparison.grid:
        points = [(lr, *ms) for lr, ms in sorted(comparison.sweep(method, metric).items()) if np.isfinite(ms[0])]
        lr, mean, sd = np.array(points).reshape(-1, 3).T
        marker = {"marker": drawn[method].marker, "markersize": 4}
        ax.errorbar(lr, mean, yerr=sd, capsize=2, label=method, **marker, **line(drawn[method]))
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel(metric or comparison.metric)
    ax.legend()
