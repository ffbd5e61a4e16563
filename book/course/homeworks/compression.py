r"""A trained weight has no low rank of its own. What is lost by a cut depends on where the
inputs look, on which outputs matter, and on how a network was trained before. You derive the
best cut for all three.

Letters as in the chapters: $W$ of shape $(m, n)$, inputs $x$ with covariance
$C = \mathbb{E}\, x x^\top$ of shape $(n, n)$, and $W_r$ the truncated SVD.
"""

from typing import Annotated

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from course import given, task, variant

TITLE = "Cutting where the inputs look"
OBJECTIVE = "Derive the best cut under another measure of error, and spend a budget on layers."
AFTER = ("primer", "compression/trp", "compression/welore", "compression/pela")

v = variant(
    order=(1.5, 3, 2.5, 4),
    ridge=(0.2, 0.5, 1.5),
    cost=(0.25, 0.4, 0.6, 0.75, 0.9),
)


@task(
    minutes=35,
    points={"value": 3, "shapes": 1, "edge cases": 1},
    given={"rank": [1, 2]},
    hint="Find $S$ and $D$ with $\\lVert D\\,(W - X)\\,S \\rVert_F^2$ equal to the error. "
    "Eckart and Young answer for $D W S$; undo $D$ and $S$.",
)
def weighted_cut(
    W: Float[Tensor, "m n"],
    inputs: Float[Tensor, "k n"],
    rows: Annotated[Float[Tensor, " m"], "positive"],
    rank: int,
) -> Float[Tensor, "m n"]:
    r"""The best cut for inputs and outputs

    Let the rows of `inputs` be $k$ examples and $C = \frac1k \sum_x x x^\top + «ridge»\, I$.
    Output $i$ matters with the weight $d_i$, an entry of `rows`. Derive the matrix $X$ of
    rank at most `rank` that minimises

    $$ \sum_i d_i \sum_{j, l} (W - X)_{ij}\, C_{jl}\, (W - X)_{il} , $$

    and return it. In words: the mean squared error of the outputs, weighted, with some
    weight decay. What becomes of it for $C = I$ and equal weights?
    """
    C = inputs.T @ inputs / len(inputs)
    C = C + v.ridge * torch.eye(W.shape[1], dtype=W.dtype)
    L = torch.linalg.cholesky(C)
    D = rows.sqrt()[:, None]
    U, S, Vh = torch.linalg.svd(D * W @ L, full_matrices=False)
    cut = U[:, :rank] * S[:rank] @ Vh[:rank]
    return torch.linalg.solve(L.T, (cut / D).T).T


@task(
    minutes=25,
    points={"value": 3, "shapes": 1, "dtype": 1},
    hint="$\\partial \\sigma_i / \\partial W = u_i v_i^\\top$.",
)
def push(W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    r"""A push towards low rank

    TRP moves a weight along the subgradient of its nuclear norm, $\sum_i u_i v_i^\top$, which
    is the same for large and small singular values. Derive the gradient of

    $$ \frac{1}{«order»} \sum_i \sigma_i^{«order»} $$

    by $W$ and return it, without autograd. Does this push favour low rank more than the
    nuclear norm does, or less? Compare what it does to a large and to a small $\sigma_i$.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U * S ** (v.order - 1) @ Vh


@task(
    minutes=30,
    points={"value": 4, "edge cases": 1},
    given={
        "spectra": lambda k: torch.rand(k, 6).double().sort(descending=True).values,
        "widths": lambda k: torch.randint(1, 30, (k,)).double(),
        "budget": [20.0, 50.0, 90.0],
    },
    edges=[{"budget": 0.0}],
    hint="Squares along a row fall, so that a row's best next direction is its next one. Stop "
    "at the first that the rest of the budget cannot pay.",
)
def spend(
    spectra: Float[Tensor, "k r"], widths: Float[Tensor, " k"], budget: float
) -> Int64[Tensor, " k"]:
    r"""One budget for all layers

    Row $l$ of `spectra` has the singular values of layer $l$, the largest first. A direction
    of it costs $w_l$, the entry of `widths`. Start with rank 0 everywhere. Again and again,
    of all next directions, take the one with the largest $\sigma^2 / w^{«cost»}$; stop when
    the budget cannot pay for it, or when no direction is left. Return the ranks.

    For which exponent is this the greedy solution of a knapsack problem? Why may greedy be
    wrong for it, and by how much at most?
    """
    k, most = spectra.shape
    ranks = torch.zeros(k, dtype=torch.int64)
    worth = spectra**2 / widths[:, None] ** v.cost
    while True:
        best = max(
            (l for l in range(k) if ranks[l] < most),
            key=lambda l: worth[l, ranks[l]].item(),
            default=None,
        )
        if best is None or widths[best] > budget:
            return ranks
        budget = budget - float(widths[best])
        ranks[best] += 1


@given
def own_layer() -> tuple[Tensor, Tensor]:
    """A weight of your own, and inputs that use some directions more than others."""
    noise = {"generator": torch.Generator().manual_seed(v.seed), "dtype": torch.float64}
    turn = torch.linalg.qr(torch.randn(v.columns, v.columns, **noise)).Q
    spread = 0.6 ** torch.arange(v.columns)
    inputs = torch.randn(200, v.columns, **noise) * spread @ turn
    return torch.randn(v.rows, v.columns, **noise), inputs


@task(
    minutes=25,
    points={"value": 5},
    hint="The relative error of an output is $\\lVert (W - X) x \\rVert$ over all examples, "
    "divided by $\\lVert W x \\rVert$ over all examples.",
)
def compare() -> tuple[float, float, int]:
    r"""Your layer

    `own_layer()` returns your $W$ and 200 inputs (rows). Return:

    1. the relative error of the outputs, $\lVert (W - X)\,\text{inputs}^\top \rVert_F /
       \lVert W\,\text{inputs}^\top \rVert_F$, for $X = W_4$, the plain cut,
    2. the same for your cut of the first task at rank 4, with equal weights,
    3. the smallest rank at which the plain cut is as good as (2), or better.
    """
    W, inputs = own_layer()
    ones = torch.ones(len(W), dtype=W.dtype)

    def error(X):
        return float(((W - X) @ inputs.T).norm() / (W @ inputs.T).norm())

    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    plain = [error(U[:, :r] * S[:r] @ Vh[:r]) for r in range(len(S) + 1)]
    best = error(weighted_cut(W, inputs, ones, 4))
    return plain[4], best, next(r for r, e in enumerate(plain) if e <= best)
