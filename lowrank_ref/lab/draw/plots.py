"""Colours and a few drawing helpers for matplotlib. Every helper draws on axes that it is given.

plt.rcParams.update(plots.style())
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lowrank_ref.lab.compare import Comparison

__all__ = ["OKABE_ITO", "bars_with_spread", "colour", "curves", "lr_sweep", "style"]

# Okabe and Ito's palette without its yellow, which is too pale for lines on white.
OKABE_ITO = {
    "black": "#000000",
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
}

# Baselines keep their colour through the whole book; methods that meet in one figure differ.
METHOD = {
    "full": "black", "full fine-tuning": "black", "dense": "black", "AdamW": "black", "Adam": "black",
    "head": "orange", "biases": "purple",
    "LoRA": "blue", "GaLore": "vermillion", "Fira": "green", "DoRA": "sky", "rsLoRA": "orange", "PiSSA": "purple",
    "ReLoRA": "sky", "SLTrain": "blue", "low-rank": "orange", "LOST": "green", "SST": "purple",
    "SVFit": "green", "RandLoRA": "vermillion", "NOLA": "purple", "LoLDU": "orange", "LoRA-SB": "vermillion",
    "LoRA-XS": "sky", "LoRA-Squeeze": "vermillion", "ALLoRA": "vermillion", "BA-LoRA": "vermillion",
    "SARA": "vermillion", "SoRA": "vermillion", "IncreLoRA": "green", "AdaLoRA": "sky", "DiffoRA": "purple",
    "CoDyRA": "orange", "DCT-AdamW": "purple",
}  # fmt: skip


def colour(name: str) -> str:
    """Return the colour of a method; "LoRA r=4" has that of "LoRA", an unknown name always the same one.

    Args:
        name: a method's name, alone or followed by a space and details.
    """
    for known in (name, name.split(" ")[0]):
        if known in METHOD:
            return OKABE_ITO[METHOD[known]]
    hues = list(OKABE_ITO.values())[1:]  # black stays with the dense baselines
    return hues[zlib.crc32(name.encode()) % len(hues)]


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


def curves(ax: Any, runs: Mapping[str, Sequence[ArrayLike]], *, x: ArrayLike | None = None) -> None:
    """Draw the mean over seeds of each method, and a band from its lowest to its highest seed.

    Args:
        ax: matplotlib axes.
        runs: method -> one row of numbers per seed, all of one length.
        x: places of the numbers; default 1, 2, ...
    """
    for name, rows in runs.items():
        y = np.asarray(rows, dtype=float)
        if y.ndim != 2:
            raise ValueError(f"runs: got shape {y.shape} for {name!r}, wanted (seeds, steps)")
        places = np.arange(1, y.shape[1] + 1) if x is None else np.asarray(x)
        ax.plot(places, y.mean(axis=0), color=colour(name), label=name)
        ax.fill_between(places, y.min(axis=0), y.max(axis=0), color=colour(name), alpha=0.18, linewidth=0)
    ax.legend()


def bars_with_spread(ax: Any, values: Mapping[str, Sequence[float]], *, label: str) -> None:
    """Draw one bar per method, its mean over seeds, and every seed as a dot.

    Args:
        ax: matplotlib axes.
        values: method -> one number per seed (`Comparison.at_best`).
        label: what the numbers are, with their unit.
    """
    for place, (name, numbers) in enumerate(values.items()):
        ax.barh(place, float(np.mean(numbers)), color=colour(name), alpha=0.75, height=0.6)
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
    for method in comparison.grid:
        points = [(lr, *ms) for lr, ms in sorted(comparison.sweep(method, metric).items()) if np.isfinite(ms[0])]
        lr, mean, sd = np.array(points).reshape(-1, 3).T
        ax.errorbar(lr, mean, yerr=sd, marker="o", markersize=4, capsize=2, color=colour(method), label=method)
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel(metric or comparison.metric)
    ax.legend()
