r"""SLTrain writes a weight as low rank plus sparse. You train a relative of it: derive its
gradients, spend a budget on its two parts, and find supports that make the sum full.

Letters as in the chapter: $B$ of shape $(m, r)$, $A$ of shape $(r, n)$; the sparse part has
values at places that are chosen once. A place $(i, j)$ is the whole number $i n + j$.
"""

from typing import Annotated

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from course import given, task, variant

TITLE = "Low rank plus sparse, derived"
OBJECTIVE = "Build a weight of two parts, derive its gradients, and spend a budget on it."
AFTER = ("primer", "adapters/lora", "pretraining/sltrain")

v = variant(
    keep=(0.25, 0.5, 0.75),
    index=(0.5, 1.5, 2, 3),
    shift=(1, 2, 3, 4, 5),
)


@task(
    minutes=25,
    points={"value": 2, "gradient": 1, "inputs": 1, "shapes": 1},
    given={"scale": [0.5, 2.0]},
    hint="`index_add` and `scatter` on a flat view return new tensors. The factor of the "
    "product differs between the places and the rest.",
)
def weight(
    B: Float[Tensor, "m r"],
    A: Float[Tensor, "r n"],
    places: Annotated[Int64[Tensor, " k"], "below m*n", "distinct"],
    values: Float[Tensor, " k"],
    scale: float,
) -> Float[Tensor, "m n"]:
    r"""A weight of two parts

    SLTrain *adds* its values to the product. In your weight they replace a part of it: at
    the places of the support

    $$ W_{ij} = «keep»\, s\,(BA)_{ij} + \text{value} , $$

    and $W_{ij} = s\,(BA)_{ij}$ elsewhere, with $s$ = `scale`. Return $W$.
    """
    product = (scale * (B @ A)).flatten()
    change = values - (1 - v.keep) * product[places]
    return product.index_add(0, places, change).reshape(len(B), -1)


@task(
    minutes=35,
    points={"value": 3, "shapes": 1, "dtype": 1},
    given={"scale": [0.5, 2.0]},
    hint="First the gradient by the product $BA$: it is $sG$, but smaller at the places.",
)
def backward(
    G: Float[Tensor, "m n"],
    B: Float[Tensor, "m r"],
    A: Float[Tensor, "r n"],
    places: Annotated[Int64[Tensor, " k"], "below m*n", "distinct"],
    scale: float,
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"], Float[Tensor, " k"]]:
    r"""Its gradients by hand

    $G$ is the gradient of a loss by the weight $W$ of the first task. Derive the gradients
    by $B$, $A$ and the values, and return them in this order, without autograd.

    SLTrain's gradients by $B$ and $A$ are $sGA^\top$ and $sB^\top G$. In which limit of your
    weight do you get them back?
    """
    H = scale * G.flatten()
    H = H.index_add(0, places, (v.keep - 1) * H[places]).reshape(G.shape)
    return H @ A.T, B.T @ H, G.flatten()[places]


@task(
    minutes=20,
    points={"value": 3, "edge cases": 2},
    given={
        "m": [64, 100, 250],
        "n": [48, 120, 333],
        "density": [0.01, 0.03, 0.05],
        "budget": [0.2, 0.35],
    },
    edges=[
        {"density": 0.4, "budget": 0.2},
        {"density": 0.05, "budget": 5.0, "m": 64, "n": 48},
        {"density": 0.125, "budget": 0.125 * (1 + v.index), "m": 64, "n": 48},
    ],
    hint="Count the places first: `round(density * m * n)`. A rank is a whole number, and "
    "`min(m, n)` is enough.",
    example="largest_rank(100, 120, 0.05, 0.35)",
)
def largest_rank(m: int, n: int, density: float, budget: float) -> int:
    r"""Spend a budget

    A weight of shape $(m, n)$ may cost `budget` times $mn$ numbers. The support has
    `round(density * m * n)` places. Each costs its value, and its index as much as «index»
    numbers. Return the largest rank that the rest pays for, at most $\min(m, n)$. If the
    support alone is too dear, raise a `ValueError`.

    What would you rather have for 0.05 of the numbers: more places, or more rank?
    """
    places = round(density * m * n)
    left = budget * m * n - places * (1 + v.index)
    if left < 0:
        raise ValueError("the support alone is too dear")
    return min(int(left // (m + n)), m, n)


def _is_full(result, n):
    if result.shape != (n,) or len(set(result.tolist())) != n:
        return f"it is not {n} places"
    if int(result.min()) < 0 or int(result.max()) >= n * n:
        return "a place lies outside of the matrix"
    i, j = result // n, result % n
    if bool(((j - i) % n < v.shift).any()):
        return "a place is forbidden"
    draw = torch.Generator().manual_seed(n)
    noise = {"generator": draw, "dtype": torch.float64}
    S = torch.zeros(n, n, dtype=torch.float64)
    S[i, j] = 1 + torch.rand(n, **noise)
    W = torch.randn(n, 1, **noise) @ torch.randn(1, n, **noise) + S
    rank = int(torch.linalg.matrix_rank(W))
    return True if rank == n else f"low rank plus sparse has rank {rank} of {n}"


@task(
    minutes=30,
    points={"value": 4, "edge cases": 1},
    given={"n": [7, 8, 10]},
    edges=[{"n": v.shift}, {"n": v.shift + 1}],
    accept=_is_full,
    hint="When is a matrix with one value in some places of full rank? No row and no column "
    "may stay empty.",
)
def support(n: int) -> Int64[Tensor, " n"]:
    r"""Break it: rank 1 plus almost nothing

    Show that "low rank plus sparse" need not be near low rank: return $n$ places of an
    $(n, n)$ matrix for which *almost every* product of rank 1 plus almost all values at
    these places has rank $n$. Places $(i, j)$ with $(j - i) \bmod n < «shift»$ are
    forbidden. For $n \le «shift»$ there is nothing to choose: raise a `ValueError`.

    A support of $n$ places drawn at random leaves rows empty. About which share of them, for
    large $n$?
    """
    if n <= v.shift:
        raise ValueError("every place is forbidden")
    i = torch.arange(n)
    return i * n + (i + v.shift) % n


@given
def own_weight() -> Tensor:
    """Your own matrix of rank 2 with a few spikes, to try the tasks on."""
    noise = torch.Generator().manual_seed(v.seed)
    B = torch.randn(v.rows, 2, generator=noise, dtype=torch.float64)
    A = torch.randn(2, v.columns, generator=noise, dtype=torch.float64)
    spikes = torch.rand(v.rows, v.columns, generator=noise) < 0.05
    return B @ A + 5 * spikes
