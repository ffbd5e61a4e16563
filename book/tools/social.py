"""Draw the picture that other sites show beside a link to the book: theme/social.png.

python book/tools/social.py

The logo's idea at work: a matrix, and the two thin factors that nearly make it.
"""

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap

from links import ROOT

INK, BLUE, VERMILLION = "#1f2630", "#0072b2", "#d55e00"
CENTRED = {"ha": "center", "va": "center"}
SIGNED = LinearSegmentedColormap.from_list("signed", [BLUE, "white", VERMILLION])


def main() -> None:
    figure = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="white")
    rows, columns, rank = 12, 12, 2
    generator = np.random.default_rng(3)
    B = generator.standard_normal((rows, rank))
    A = generator.standard_normal((rank, columns))
    cell = 0.0165  # of the width; a pixel grid of squares
    tall = cell * 12 / 6.3
    left, bottom = 0.45, 0.36
    places = [
        (B @ A, left),
        (B, left + 15.2 * cell),
        (A, left + 18.2 * cell),
    ]
    for matrix, x in places:
        height = matrix.shape[0] * tall
        y = bottom + rows * tall - height  # tops in line
        axes = figure.add_axes((x, y, matrix.shape[1] * cell, height))
        size = np.abs(matrix).max()
        axes.pcolormesh(
            matrix[::-1], cmap=SIGNED, vmin=-size, vmax=size, edgecolors="white"
        )
        axes.axis("off")
    middle = bottom + rows * tall / 2
    figure.text(left + 13.6 * cell, middle, "=", size=40, color=INK, **CENTRED)
    title = {"size": 50, "color": INK, "family": "serif", "weight": "bold"}
    for row, word in enumerate(("Low-rank,", "sparse,", "ternary")):
        figure.text(0.06, 0.74 - 0.135 * row, word, **title)
    line = "An executable textbook: every method in one file,\nevery claim measured."
    figure.text(0.06, 0.18, line, size=21, color=INK, va="center", linespacing=1.5)
    figure.savefig(ROOT / "book" / "theme" / "social.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
