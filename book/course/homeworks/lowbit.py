r"""A quantiser is a grid, a rule for rounding and a rule for gradients. You build three of
your own, and find out on which weights they fail.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from course import given, task, variant

TITLE = "Grids, thresholds and straight-through"
OBJECTIVE = "Derive scales and thresholds, round without bias, and pass gradients through."
AFTER = ("lowbit/low_precision", "lowbit/hgf")

v = variant(
    threshold=(0.4, 0.6, 0.7, 0.8),
    step=(0.125, 0.25, 0.375),
    reach=(1.2, 1.4, 1.6, 1.8, 2),
)


@task(
    minutes=35,
    points={"value": 2, "gradient": 2, "edge cases": 1},
    hint="`values.detach() + (W - W.detach()) * mask` has the value of the first and the "
    "gradient of the second.",
    example="ternary(torch.tensor([[2.0, -1.0, 0.1]]))",
)
def ternary(W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    r"""Three values with the best scale

    Let $\mu$ be the mean of $|W|$. Entries with $|W_{ij}| > «threshold» \mu$ keep their sign,
    all others become 0: a matrix $T$ of $-1$, 0 and 1. Derive the scale $s$ that minimises
    $\lVert W - sT \rVert_F$ for this $T$ and return $sT$; where $T$ is zero, $s$ is 0.

    The gradient is straight-through with a limit: it passes unchanged where
    $|W_{ij}| \le «reach» \mu$, and is 0 elsewhere. Compare your $s$ with BitNet's, which is
    $\mu$ itself.
    """
    size = W.abs()
    mean = size.mean()
    kept = (size > v.threshold * mean).to(W.dtype)
    scale = (size * kept).sum() / kept.sum().clamp(min=1)
    values = scale * W.sign() * kept
    passed = (size <= v.reach * mean).to(W.dtype)
    return values.detach() + (W - W.detach()) * passed.detach()


@task(
    minutes=30,
    points={"value": 3, "gradient": 1, "edge cases": 1},
    given={"bits": [2, 3, 4]},
    hint="The spacing of the grid is fixed by its largest value and the number of steps on one "
    "side, $2^{b-1} - 1$.",
    example="to_grid(torch.tensor([[0.9, -0.3], [0.1, 3.0]]), 3)",
)
def to_grid(W: Float[Tensor, "m n"], bits: int) -> Float[Tensor, "m n"]:
    r"""A grid that cuts off

    Take the whole numbers from $-q$ to $q = 2^{b-1} - 1$ for $b$ = `bits`, times a spacing. A
    grid that reaches the largest weight wastes its values on outliers, so each *row* of $W$
    has a grid that ends at $«reach» \rho$, where $\rho$ is the root mean square of the row.
    Return the nearest grid value of each entry; what lies outside becomes the end. Rows of
    zeros stay zero. The gradient passes straight through, unchanged, everywhere.
    """
    most = 2 ** (bits - 1) - 1
    end = v.reach * W.square().mean(1, keepdim=True).sqrt()
    spacing = (end / most).clamp(min=1e-30)
    values = spacing * (W / spacing).round().clamp(-most, most)
    return values.detach() + W - W.detach()


def _is_neighbour(result, x):
    off = (result - x).abs()
    if bool((off >= v.step).any()):
        return f"an entry moved by {float(off.max()):.3g}"
    multiple = result / v.step
    return True if torch.allclose(multiple, multiple.round()) else f"no multiple of {v.step}"


@task(
    minutes=20,
    points={"value": 3, "generator": 2},
    accept=_is_neighbour,
    draws=150,
    hint="Add a uniform draw from $[0, 1)$ before rounding down.",
)
def jump(x: Float[Tensor, " k"], generator: torch.Generator) -> Float[Tensor, " k"]:
    r"""Rounding without bias

    Return for each entry a multiple of «step»: one of its two neighbours on this grid, drawn
    at random so that the mean is the entry itself. Draw from `generator` and from nothing
    else. What is the variance, and where between two neighbours is it largest? Why does a
    sum of many small updates need this, while a single product does not?
    """
    draw = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    return v.step * (x / v.step + draw).floor()


@given
def own_weight() -> Tensor:
    """A weight of your own, with heavier tails than a Gaussian."""
    noise = {"generator": torch.Generator().manual_seed(v.seed), "dtype": torch.float64}
    W = torch.randn(v.rows, v.columns, **noise)
    return W * (1 + 2 * torch.rand(v.rows, 1, **noise) ** 4)


@task(
    minutes=25,
    points={"value": 5},
    hint="One pass over the sorted sizes $a_1 \\ge a_2 \\ge \\dots$ is enough: with the $k$ "
    "largest kept, the error is $\\sum_i a_i^2 - (a_1 + \\dots + a_k)^2 / k$.",
)
def best() -> tuple[float, float, float]:
    r"""Your weight

    For `own_weight()` return the relative error $\lVert W - Q \rVert_F / \lVert W \rVert_F$ of

    1. your `ternary` of the first task,
    2. the best of *all* matrices $sT$ with $T$ of $-1$, 0 and 1 (derive how to find it),
    3. your `to_grid` with 3 bits.

    How near does the threshold come to the best? What did (3) pay for its lower error?
    """
    W = own_weight()
    size = W.abs().flatten().sort(descending=True).values
    counts = torch.arange(len(size)) + 1
    left = size.square().sum() - (size.cumsum(0) ** 2 / counts).max()
    errors = [(W - ternary(W)).norm(), left.sqrt(), (W - to_grid(W, 3)).norm()]
    return tuple(float(error / W.norm()) for error in errors)
